"""Train one small GPT twice, with `optax.adamw` and with `gefen_jax.gefen`, and compare them.

The text is real and already on every machine: the sources of Python's standard library, read as
bytes. All optimizers see the same initial weights, batches, learning rate and weight decay.

    python examples/char_lm.py                                # a few minutes on a laptop's CPU
    python examples/char_lm.py --seeds 3 --optimizers adamw,gefen,gefen-shared
    python examples/char_lm.py --data my_texts --d-model 256 --bf16
    python examples/char_lm.py --quick                        # a few seconds: does it run?

It prints a table, and writes `char_lm.json` and `char_lm.png` into `char_lm_results`.
The part to copy into your own program is `make_optimizer` and `train`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import gefen_jax as gx

matplotlib.use("Agg")  # the figure goes to a file, so no display is needed
import matplotlib.pyplot as plt  # noqa: E402

Params = Any  # an nnx.State of parameters; gradients and updates have the same structure
COLOURS = {"adamw": "tab:blue", "gefen": "tab:orange", "gefen-shared": "tab:green"}


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; every field is a command-line flag."""

    steps: int = 800
    seeds: tuple[int, ...] = (0,)
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 64
    batch: int = 8
    lr: float = 2e-3  # for AdamW better than 0.004 and 0.008 (research.jsonl)
    b2: float = 0.99
    weight_decay: float = 0.1
    calibration_batches: int = 1
    validation_batches: int = 64
    timing_rounds: int = 40
    corpus_bytes: int = 8_000_000
    bf16: str = "no"
    optimizers: tuple[str, ...] = ("adamw", "gefen")
    data: Path | None = None
    out: Path = Path("char_lm_results")


QUICK = dict(steps=12, d_model=64, layers=1, heads=2, context=32, batch=4, validation_batches=2,
             timing_rounds=3, corpus_bytes=200_000)  # fmt: skip


# ------------------------------------------------------------------------------------ the text


@dataclass(frozen=True)
class Corpus:
    train: np.ndarray
    validation: np.ndarray
    source: str
    files: int
    sha256: str


def load_corpus(folder: Path | None, limit: int) -> Corpus:
    """Reads text files in sorted order, up to `limit` bytes; 5 % are for validation."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    # Left out of the standard library: other people's packages, tests, and character tables.
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
    pieces: list[bytes] = []
    room = limit
    for parent, folders, names in os.walk(root):
        # In place, because that is what os.walk goes by: a fixed order, and no detours.
        folders[:] = sorted(name for name in folders if folder or name not in skip)
        for name in sorted(names):
            path = Path(parent, name)
            if not path.is_file() or (folder is None and path.suffix != ".py"):
                continue
            text = path.read_bytes()
            if room > 0 and b"\0" not in text:  # a zero byte means that it is no text
                pieces.append(text[:room])
                room -= len(pieces[-1])
        if room <= 0:
            break
    data = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    # From the middle, because what comes last is one long file of a kind of its own.
    start = len(data) // 2
    train, held_out, rest = np.split(data, [start, start + len(data) // 20])
    sha256 = hashlib.sha256(data.tobytes()).hexdigest()
    source = folder.resolve().name if folder else "standard library"
    return Corpus(np.concatenate([train, rest]), held_out, source, len(pieces), sha256)


def windows_at(data: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    """Rows of context + 1 bytes: all but the last are read, all but the first are predicted."""
    return data[starts[:, None] + np.arange(context + 1)]


def random_batch(rng: np.random.Generator, data: np.ndarray, config: Config) -> np.ndarray:
    starts = rng.integers(0, len(data) - config.context, size=config.batch)
    return windows_at(data, starts, config.context)


def validation_set(data: np.ndarray, config: Config) -> np.ndarray:
    """Evenly spaced windows, the same in every run: (batches, batch, context + 1)."""
    rows = config.validation_batches * config.batch
    starts = np.linspace(0, len(data) - config.context - 1, rows).astype(np.int64)
    shape = (config.validation_batches, config.batch, config.context + 1)
    return windows_at(data, starts, config.context).reshape(shape)


# ----------------------------------------------------------------------------------- the model


class Block(nnx.Module):
    """Pre-norm transformer block: causal self-attention, then a GELU MLP four times as wide."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, self.heads = config.d_model, config.heads
        linear, norm = layers_of(config, rngs)
        # The two layers that write into the residual stream start smaller the deeper the model
        # is, so that its variance at the output does not grow with depth (as in GPT-2).
        out_init = nnx.initializers.variance_scaling(0.5 / config.layers, "fan_in", "normal")
        self.norm1 = norm(width)
        self.qkv = linear(width, 3 * width)
        self.attention_out = linear(width, width, kernel_init=out_init)
        self.norm2 = norm(width)
        self.mlp_in = linear(width, 4 * width)
        self.mlp_out = linear(4 * width, width, kernel_init=out_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, context, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, context, 3, self.heads, width // self.heads)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        x = x + self.attention_out(attended.reshape(batch, context, width))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.norm2(x))))


class GPT(nnx.Module):
    """Byte-level GPT with learned positions; the embedding matrix is also the output head."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        linear, norm = layers_of(config, rngs)
        # Unit-length rows: as large as what the blocks add to them, and as the output head they
        # start with logits of variance 1.
        init = nnx.initializers.normal(config.d_model**-0.5)
        embed = partial(nnx.Embed, embedding_init=init, rngs=rngs, **dtypes(config))
        self.tokens = embed(256, config.d_model)
        self.positions = embed(config.context, config.d_model)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = norm(config.d_model)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.norm(x))


def dtypes(config: Config) -> dict[str, Any]:
    """--bf16 alone computes in bfloat16; --bf16 params also stores the matrices in it."""
    compute = jnp.float32 if config.bf16 == "no" else jnp.bfloat16
    return dict(dtype=compute, param_dtype=jnp.bfloat16 if config.bf16 == "params" else jnp.float32)


def layers_of(config: Config, rngs: nnx.Rngs) -> tuple[Callable[..., Any], Callable[..., Any]]:
    linear = partial(nnx.Linear, rngs=rngs, **dtypes(config))
    # Scales stay float32 even with --bf16 params: they sit near 1, where a bfloat16 step is
    # 1/128, so most updates would round to nothing; and they are few.
    norm = partial(nnx.LayerNorm, dtype=dtypes(config)["dtype"], rngs=rngs)
    return linear, norm


def loss_fn(params: Params, graphdef: nnx.GraphDef, windows: jax.Array) -> jax.Array:
    tokens = windows.astype(jnp.int32)
    logits = nnx.merge(graphdef, params)(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


gradient = jax.jit(jax.grad(loss_fn), static_argnums=1)


# -------------------------------------------------------------------------------- the training


def decay_mask(params: Params) -> Params:
    """Decay matrices only: pulling biases and norm scales towards zero helps nothing."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def make_optimizer(
    name: str, config: Config, params: Params, grads: list[Params]
) -> tuple[optax.GradientTransformationExtraArgs, gx.Plan | None]:
    """Any of the optimizers in the same chain; `gefen` takes the arguments of `adamw`."""
    warmup = max(1, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, warmup, max(config.steps, warmup + 1), end_value=0.1 * config.lr
    )
    arguments: dict[str, Any] = dict(
        b1=0.9, b2=config.b2, weight_decay=config.weight_decay, mask=decay_mask
    )
    if name == "adamw":
        plan, optimizer = None, optax.adamw(schedule, **arguments)
    elif name == "gefen":  # two moments in one byte: needs no plan, this one is for the report
        plan, optimizer = gx.plan_by_shape(params), gx.gefen(schedule, **arguments)
    else:  # one second moment per block: the gradients say which blocks
        plan = gx.calibrate(params, grads)
        optimizer = gx.gefen(schedule, plan=plan, **arguments)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer), plan


@dataclass
class Run:
    """What one training run leaves behind."""

    train_losses: list[float]
    validation: list[tuple[int, float]]  # (step, loss); the last one is the result
    seconds: dict[str, float]
    step_memory: dict[str, int]
    state_bytes: int
    tensor_bytes: dict[str, int]  # the part of it that belongs to each parameter
    tx: optax.GradientTransformationExtraArgs
    plan: gx.Plan | None


def train(name: str, seed: int, config: Config, corpus: Corpus, progress: Progress) -> Run:
    started = time.perf_counter()
    graphdef, params = nnx.split(GPT(config, nnx.Rngs(seed)), nnx.Param)
    rng = np.random.default_rng(seed)
    batches = [random_batch(rng, corpus.train, config) for _ in range(config.steps)]
    held_out = validation_set(corpus.validation, config)

    # The gradients of the first batches tell which parameters may share a second moment.
    count = config.calibration_batches if name == "gefen-shared" else 0
    grads = [gradient(params, graphdef, batch) for batch in batches[:count]]
    tx, plan = make_optimizer(name, config, params, grads)
    opt_state = tx.init(params)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
    tensor_bytes = bytes_by_tensor(name, opt_state)
    del grads

    # Donating params and opt_state lets XLA write the new ones over the old ones.
    @jax.jit(donate_argnums=(0, 1))
    def train_step(params: Params, opt_state: Any, windows: jax.Array) -> tuple[Any, ...]:
        loss, grads = jax.value_and_grad(loss_fn)(params, graphdef, windows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    @jax.jit
    def validate(params: Params, held_out: jax.Array) -> jax.Array:
        return jax.lax.map(lambda windows: loss_fn(params, graphdef, windows), held_out).mean()

    compiled = train_step.lower(params, opt_state, batches[0]).compile()
    validation = [(0, float(validate(params, held_out)))]
    seconds = {"setup": time.perf_counter() - started}

    task = progress.add_task(f"{name}, seed {seed}", total=config.steps, loss=float("nan"), rate=0)
    losses: list[jax.Array] = []
    training_seconds = 0.0
    report_every, validate_every = 5, max(1, config.steps // 8)
    for step, batch in enumerate(batches, start=1):
        tick = time.perf_counter()
        params, opt_state, loss = compiled(params, opt_state, batch)
        losses.append(loss)
        if step % report_every == 0 or step == config.steps:
            loss.block_until_ready()  # only now and then: steps in between may overlap
        training_seconds += time.perf_counter() - tick
        if step % report_every == 0 or step == config.steps:
            rate = round(step * config.batch * config.context / training_seconds)
            progress.update(task, completed=step, loss=float(loss), rate=rate)
        if step == config.steps or (step % validate_every == 0 and step + 1 < config.steps):
            validation.append((step, float(validate(params, held_out))))
    seconds |= {"training": training_seconds, "total": time.perf_counter() - started}
    curve = [float(loss) for loss in losses]
    memory = memory_of(compiled)
    return Run(curve, validation, seconds, memory, state_bytes, tensor_bytes, tx, plan)


# ---------------------------------------------------------------------------- the measurements


def path_of(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def bytes_by_tensor(name: str, opt_state: Any) -> dict[str, int]:
    if name != "adamw":
        return dict(gx.memory_report(opt_state).by_tensor)
    sizes: dict[str, int] = {}
    for moment in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(opt_state, moment)
        for path, leaf in jax.tree_util.tree_leaves_with_path(moments):
            sizes[path_of(path)] = sizes.get(path_of(path), 0) + leaf.nbytes
    return sizes


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What XLA planned: its temporaries, and the most that is alive at once (donation counted)."""
    stats = compiled.memory_analysis()
    if stats is None:  # some backends do not tell
        return {"temporaries": 0, "peak": 0}
    arguments_and_results = stats.argument_size_in_bytes + stats.output_size_in_bytes
    peak = arguments_and_results + stats.temp_size_in_bytes - stats.alias_size_in_bytes
    return {"temporaries": stats.temp_size_in_bytes, "peak": peak}


def time_optimizers(
    txs: dict[str, optax.GradientTransformationExtraArgs], config: Config, corpus: Corpus
) -> dict[str, dict[str, float]]:
    """Times `update` + `apply_updates` alone, without the model's forward and backward pass.

    The optimizers take turns, so that whatever else slows the machine slows all of them alike.
    """
    graphdef, params = nnx.split(GPT(config, nnx.Rngs(0)), nnx.Param)
    batch = random_batch(np.random.default_rng(0), corpus.train, config)
    grads = gradient(params, graphdef, batch)

    def build(tx: optax.GradientTransformationExtraArgs) -> Any:
        @jax.jit(donate_argnums=(0, 1))
        def update(params: Params, opt_state: Any, grads: Params) -> tuple[Params, Any]:
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return update.lower(params, tx.init(params), grads).compile()

    compiled = {name: build(tx) for name, tx in txs.items()}
    # Each optimizer owns a copy of the parameters, because it donates them.
    states = {n: (jax.tree.map(jnp.copy, params), tx.init(params)) for n, tx in txs.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in txs}
    warmup = 5
    for turn in range(warmup + config.timing_rounds):
        for name in txs:
            jax.block_until_ready(states[name])
            tick = time.perf_counter()
            states[name] = jax.block_until_ready(compiled[name](*states[name], grads))
            if turn >= warmup:
                milliseconds[name].append(1e3 * (time.perf_counter() - tick))
    return {
        name: {"ms_median": float(np.median(ms)), "ms_min": min(ms), **memory_of(compiled[name])}
        for name, ms in milliseconds.items()
    }


def summarize(
    runs: dict[str, list[Run]], config: Config, corpus: Corpus, parameters: int
) -> dict[str, Any]:
    """The result as plain numbers, texts, lists and dicts: what goes into the JSON file."""
    timing = time_optimizers({name: of[0].tx for name, of in runs.items()}, config, corpus)
    tokens = config.steps * config.batch * config.context
    optimizers: dict[str, Any] = {}
    for name, of in runs.items():
        first = of[0]
        final = [run.validation[-1][1] for run in of]
        optimizers[name] = {
            "validation_loss": float(np.mean(final)),
            "validation_loss_per_seed": dict(zip(map(str, config.seeds), final, strict=True)),
            "train_curve_per_seed": [binned(run.train_losses) for run in of],
            "validation_curve_per_seed": [run.validation for run in of],
            "state_bytes": first.state_bytes,
            "state_bytes_per_parameter": first.state_bytes / parameters,
            "state_bytes_per_tensor": first.tensor_bytes,
            "optimizer_alone": timing[name],
            "train_step": first.step_memory,
            "train_tokens_per_second": tokens / float(np.mean([r.seconds["training"] for r in of])),
            "seconds_per_seed": [run.seconds for run in of],
        }
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    versions = {package: importlib.metadata.version(package) for package in packages}
    plans = {name: of[0].plan for name, of in runs.items() if of[0].plan is not None}
    return {
        "config": asdict(config) | {"data": corpus.source, "out": config.out.name},
        "parameters": parameters,
        "corpus": {
            "source": corpus.source,
            "files": corpus.files,
            "train_bytes": len(corpus.train),
            "validation_bytes": len(corpus.validation),
            "sha256": corpus.sha256,
        },
        "versions": versions | {"gefen_jax": getattr(gx, "__version__", "unknown")},
        "python": platform.python_version(),
        "platform": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
        },
        "optimizers": optimizers,
        "plans": {name: plan_rows(plan) for name, plan in plans.items()},
    }


def binned(losses: Sequence[float], points: int = 100) -> list[tuple[int, float]]:
    """At most `points` (step, mean loss) pairs, each the mean of the steps since the last one."""
    ends = np.unique(np.linspace(0, len(losses), min(points, len(losses)) + 1).astype(int))
    pairs = zip(ends[:-1], ends[1:], strict=True)
    return [(int(end), float(np.mean(losses[start:end]))) for start, end in pairs]


def plan_rows(plan: gx.Plan) -> list[dict[str, Any]]:
    names = ("path", "shape", "kind", "block", "nbytes", "reason")
    plain = [{name: getattr(row, name) for name in names} for row in plan.table()]
    return [row | {"path": str(row["path"]), "shape": list(row["shape"])} for row in plain]


# ---------------------------------------------------------------------------------- the report


def print_report(result: dict[str, Any], console: Console) -> None:
    headings = ("optimizer", "validation\nloss", "state bytes\nper param", "optimizer\nms/step")
    headings += ("optimizer\ntemp. MB", "train step\ntemp. MB", "train step\npeak MB")
    headings += ("training\ntokens/s",)
    rows = []
    for name, of in result["optimizers"].items():
        alone, step = of["optimizer_alone"], of["train_step"]
        sizes = (alone["temporaries"], step["temporaries"], step["peak"])
        megabytes = [f"{size / 1e6:.2f}" for size in sizes]
        loss, per_param = f"{of['validation_loss']:.4f}", f"{of['state_bytes_per_parameter']:.3f}"
        speed = f"{of['train_tokens_per_second']:,.0f}"
        rows.append((name, loss, per_param, f"{alone['ms_median']:.2f}", *megabytes, speed))
    title = f"{result['parameters']:,} parameters, {result['config']['steps']} steps"
    console.print(table_of(title, headings, rows))
    seeds = [str(seed) for seed in result["config"]["seeds"]]
    if len(seeds) > 1:
        losses = {n: of["validation_loss_per_seed"] for n, of in result["optimizers"].items()}
        rows = [(name, *(f"{of[seed]:.4f}" for seed in seeds)) for name, of in losses.items()]
        console.print(table_of("Validation loss per seed", ("optimizer", *seeds), rows))
    for name, plan in result["plans"].items():
        console.print(plan_table(name, plan))


def plan_table(name: str, plan: list[dict[str, Any]]) -> Table:
    rows = []
    for (path, sides, kind, block, reason), same in fold(plan).items():
        size = f"{sum(row['nbytes'] for row in same):,}"
        shares = [int(share) for row in same for share in re.findall(r"(\d+)%", row["reason"])]
        if shares:
            reason = reason.replace("…", "-".join(map(str, sorted({min(shares), max(shares)}))))
        rows.append((path, sides, str(len(same)), kind, block, size, reason))
    headings = ("path", "shape", "count", "kind", "block", "bytes", "reason")
    title = f"{name}'s plan (layers and exact tensors folded, their bytes summed)"
    return table_of(title, headings, rows, left=("path", "shape", "kind", "reason"))


def table_of(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[str] = ("optimizer",),
) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def folded_path(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path).removesuffix("/value")


def fold(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Groups the plan's rows that say the same; those of exact tensors by their last name only."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        path, sides = folded_path(row["path"]), "×".join(map(str, row["shape"]))
        if row["kind"] == "exact":
            path, sides = "…/" + path.split("/")[-1], ""
        reason = re.sub(r"\d+%", "…%", row["reason"])  # how clear it was differs by layer
        groups.setdefault((path, sides, row["kind"], str(row["block"]), reason), []).append(row)
    return groups


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for name, of in result["optimizers"].items():
        curves = np.array(of["train_curve_per_seed"])  # (seeds, points, 2)
        for curve in curves:
            left.plot(*curve.T, color=COLOURS[name], linewidth=0.6, alpha=0.5)
        left.plot(*curves.mean(0).T, color=COLOURS[name], linewidth=1.6, label=f"{name}, training")
        held_out = np.array(of["validation_curve_per_seed"]).mean(0)
        label = f"{name}, validation: {of['validation_loss']:.4f}"
        left.plot(*held_out.T, "o--", color=COLOURS[name], linewidth=0.8, markersize=4, label=label)
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="Loss, mean over seeds")
    left.legend()

    height = 0.8 / len(result["optimizers"])
    for index, (name, of) in enumerate(result["optimizers"].items()):
        sums: dict[str, int] = {}
        for tensor, size in of["state_bytes_per_tensor"].items():
            sums[folded_path(tensor)] = sums.get(folded_path(tensor), 0) + size
        label = f"{name}: {of['state_bytes_per_parameter']:.2f} bytes per parameter"
        places = np.arange(len(sums)) + index * height
        right.barh(places, list(sums.values()), height, color=COLOURS[name], label=label)
        right.set_yticks(np.arange(len(sums)) + 0.4 - height / 2, list(sums))
    right.set(xscale="log", xlabel="bytes (log scale)", title="Optimizer state per tensor")
    right.invert_yaxis()
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ------------------------------------------------------------------------------------ the rest


def parse(argv: Sequence[str] | None) -> Config:
    def names(text: str) -> tuple[str, ...]:
        if unknown := set(text.split(",")) - set(COLOURS):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
        return tuple(text.split(","))

    def seeds(text: str) -> tuple[int, ...]:
        parts = text.split(",")
        return tuple(int(p) for p in parts if p) if len(parts) > 1 else tuple(range(int(text)))

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    special: dict[str, dict[str, Any]] = {
        "seeds": dict(type=seeds, help="how many (3: seeds 0, 1, 2) or which ones (4,7)"),
        "optimizers": dict(type=names, help="of adamw,gefen,gefen-shared"),
        "bf16": dict(nargs="?", const="compute", choices=["no", "compute", "params"]),
        "data": dict(type=Path, help="folder with text files, instead of the standard library"),
        "out": dict(type=Path, help="folder for the results"),
    }
    for field in fields(Config):
        options = special.get(field.name) or dict(type=type(field.default))
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, **options)
    parser.add_argument("--quick", action="store_true", help="a tiny run of a few seconds")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)  # flags given explicitly still win
    values = vars(parser.parse_args(argv))
    del values["quick"]
    config = Config(**values)
    if config.d_model % config.heads:
        parser.error("--d-model must be a multiple of --heads")
    if not config.seeds:
        parser.error("--seeds must name at least one seed")
    if not 1 <= config.calibration_batches <= config.steps:
        parser.error("--calibration-batches must be between 1 and --steps")
    return config


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse(argv)
    # Where the output is no terminal (a log, a pipe), rich would fold the tables at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    corpus = load_corpus(config.data, config.corpus_bytes)
    if len(corpus.validation) <= config.context + 1:
        raise SystemExit(f"too little text: {len(corpus.train)} bytes in {corpus.files} files")
    shapes = nnx.eval_shape(lambda: nnx.state(GPT(config, nnx.Rngs(0)), nnx.Param))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    megabytes = (len(corpus.train) + len(corpus.validation)) / 1e6
    console.print(
        f"{parameters:,} parameters; {megabytes:.1f} MB of text from {corpus.files} files "
        f"({corpus.source}), sha256 {corpus.sha256[:12]}; on {jax.devices()[0].device_kind}"
    )
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("loss {task.fields[loss]:.3f}"), TextColumn("{task.fields[rate]:,} tokens/s")),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        runs: dict[str, list[Run]] = {name: [] for name in config.optimizers}
        for seed in config.seeds:
            for name in config.optimizers:
                runs[name].append(train(name, seed, config, corpus, progress))
    result = summarize(runs, config, corpus, parameters)
    print_report(result, console)

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "char_lm.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, config.out / "char_lm.png")
    console.print(f"char_lm.json and char_lm.png are in the folder {config.out.name}")
    return result


if __name__ == "__main__":
    main()
