"""The quality bench runs on every task, and its statistics are right on numbers made up for it."""

import json
import math
import sys

import jax
import numpy as np
import optax
import pytest
import quality
import quality_pretrained
import quality_report
import torch_gefen
from quality_statistics import best_lr, by_setup, compare, losses, paired, t_quantile
from quality_tasks import TASKS
from quality_train import Recipe, Trainer, clipped

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("pretrained")


@pytest.fixture
def models(unoptimised):
    """Most of the time here is compilation, so that is kept low."""
    with jax.numpy_rank_promotion("allow"):  # the models add biases to batches, as Flax does
        yield


@pytest.fixture
def bench(tmp_path, cache, monkeypatch, models):
    """Runs the bench and returns its rows."""
    monkeypatch.setattr(quality_pretrained, "CACHE", cache)
    out = tmp_path / "rows.jsonl"
    fixed = ["--quick", "--steps", "2", "--seeds", "0", "--out", str(out)]

    def run(*arguments):
        quality.main([*fixed, *arguments])
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


# A spike, of which there is a test below, is in the same program.
@pytest.mark.parametrize("task", [task for task in TASKS if task != "gpt_spike"])
def test_every_task_runs(task, bench):
    arguments = "--task", task, "--variant", "gefen", "--lr-factors"
    rows = bench(*arguments, "1", "4")
    assert [row["lr"] / TASKS[task].best_lr for row in rows] == [1, 4]
    assert [step for step, _ in rows[0]["curve"]] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    # Although they share a compiled step.
    assert rows[0]["loss"] != rows[1]["loss"]
    assert bench(*arguments, "1") == rows, "what is there is not run again"


def test_a_run_is_the_plain_loop(models):
    problem, seed, steps, lr = TASKS["gpt"].prepare(True), 3, 4, 2e-3
    run = Trainer(problem, Recipe("adamw", steps, b2=0.99, weight_decay=0.1), seed).run
    assert run(2 * lr).loss != run(lr).loss
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, 1, steps, 0.1 * lr)
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=0.1, mask=problem.decay)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    params, rng = problem.init(seed), np.random.default_rng(seed)
    opt_state, gradient = tx.init(params), jax.jit(jax.grad(problem.loss))
    for _ in range(steps):
        grads = gradient(params, (), problem.data.batch(rng))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    # Adam divides by the size of a gradient, so where that is near zero rounding is magnified, but
    # never beyond the steps taken: a tenth of their sum for all, 1e-4 for 99 %.
    distances = jax.tree.map(lambda a, b: abs(a - b).ravel(), run(lr).params, params)
    distances = np.concatenate(jax.tree.leaves(distances)) / (lr * steps)
    assert distances.max() < 0.1 and np.quantile(distances, 0.99) < 1e-4


def test_a_spike_is_one_gradient_after_the_clipping():
    recipe = Recipe("adamw", steps=4, b2=0.99, weight_decay=0.1, spike=100.0)
    tx, grads = clipped(recipe), {"w": np.full(4, 3.0, np.float32)}  # of norm 6
    state, seen = tx.init(grads), []
    for _ in range(4):
        clean, state = tx.update(grads, state)
        seen.append(float(clean["w"][0]))
    # A division and a product in float32: two roundings of 6e-8 each.
    assert seen == pytest.approx([0.5, 0.5, 50.0, 0.5], rel=1e-6)


def test_lora_starts_from_the_pretrained_model(bench):
    full, lora = (TASKS[name].prepare(True) for name in ("finetune", "lora"))
    batch = full.data.validation[0]
    loss = float(full.loss(full.init(0), (), batch))
    assert float(lora.loss(lora.init(0), lora.frozen, batch)) == pytest.approx(loss, rel=1e-6)


def test_shards_are_a_partition():
    options = quality.parse(["--seeds", "0", "1"])
    jobs = quality.jobs_of(options)
    parts = [quality.shard_of(jobs, (i, 3)) for i in range(3)]
    assert sorted(map(hash, jobs)) == sorted(hash(job) for part in parts for job in part)
    groups = [{job.group for job in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups))


def made_up(variant, lr, seed, loss, **setup):
    fixed = {"task": "t", "steps": 2, "b2": 0.9, "grad_dtype": "float32", "data_sha256": "0"}
    return dict(
        **(fixed | setup),
        variant=variant,
        lr=lr,
        seed=seed,
        loss=loss,
        state_bytes_per_parameter={"adamw": 8.0}.get(variant, 1.0),
    )


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (30, 2.042)]
)
def test_t_quantile(degrees, expected):
    # The table of any textbook; the expansion's next term is below 1e-3 from 11 degrees on.
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-3)


def test_paired():
    # Differences 1, 2, 3: standard deviation 1, so the half-width is 4.303 / sqrt(3).
    assert paired([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3), 3))
    assert math.isnan(paired([1.0]).half_width)


def test_comparison_on_made_up_rows():
    rows = [
        *(made_up("adamw", 1.0, seed, 2.0 + seed) for seed in range(3)),
        # Worse on the seeds that both have run, though better on the one that it has run alone.
        made_up("adamw", 2.0, 0, 2.5),
        *(made_up("gefen", 1.0, seed, loss) for seed, loss in enumerate((2.1, 3.2, 4.3))),
        *(made_up("gefen", 0.5, seed, loss) for seed, loss in enumerate((1.9, 2.9, 3.9))),
        *(made_up("gefen", 2.0, seed, None) for seed in range(3)),
        made_up("other", 2.0, 0, 7.0),
        made_up("adamw", 9.0, 0, 0.0, b2=0.5),  # another setup
        made_up("gefen", 1.0, 0, 9.9),
        made_up("gefen", 1.0, 0, 2.1),  # the same job once more: the later counts
    ]
    setups = list(by_setup(rows).values())
    assert [len(of) for of in setups] == [14, 1]
    adamw, gefen, other = compare(setups[0])
    assert (adamw.variant, adamw.lr, adamw.loss) == ("adamw", 1.0, 3.0)
    assert gefen.loss == pytest.approx(3.2)
    # Differences 0.1, 0.2, 0.3.
    assert gefen.difference == pytest.approx((0.2, 0.1 * 4.303 / math.sqrt(3), 3))
    assert (gefen.own_lr, gefen.bytes_per_parameter) == (0.5, 1.0)
    assert gefen.own_loss == pytest.approx(2.9)
    assert gefen.own_difference == pytest.approx((-0.1, 0.0, 3), abs=1e-9)
    assert (other.loss, other.difference, other.own_lr) == (None, None, 2.0)
    assert (adamw.rates, gefen.rates, other.rates) == (2, 3, 1)


def test_divergence_is_never_best():
    rows = [made_up("adamw", 1.0, 0, None), made_up("adamw", 2.0, 0, 3.0)]
    assert best_lr(losses(rows, "adamw")) == 2.0


def test_report(tmp_path):
    extra = {"curve": [[1, 3.0], [2, None]], "parameters": 10**6, "seconds": 1.0}
    extra |= {"python": "3", "jax": "0", "cpu": "a"}
    losses_of = {"adamw": (1.0, 2.0), "gefen": (1.25, 2.25), "worse": (None, 3.0)}
    rows = [made_up(v, 0.1, s, x) | extra for v, of in losses_of.items() for s, x in enumerate(of)]
    rows += [made_up(v, 0.2, 0, 1.5) | extra for v in ("adamw", "gefen")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quality_report.main(["--results", str(path)])
    text = (tmp_path / "quality.md").read_text()
    assert "| gefen | 1.7500 | +0.2500 ± 0.0000 | 0.1 | 1.7500 | +0.2500 ± 0.0000 | 2 |" in text
    assert "| worse | diverged |  |  |  |  | 2 |" in text, "of one rate nobody knows the best"
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_lines_of_the_figure_are_of_equal_seeds():
    rows = [made_up("adamw", lr, 0, 2.0 + lr) for lr in (1.0, 2.0)]
    rows += [made_up("adamw", 1.0, 1, 100.0), made_up("adamw", 4.0, 0, None)]
    rates, losses = quality_report._losses_by_lr(rows)
    # Not the mean of 3 and 100: at the other rates there is no seed 1.
    assert (rates, losses[:2]) == ([1.0, 2.0, 4.0], [3.0, 4.0]) and math.isnan(losses[2])
    curves = {"adamw": [[1, 3.0], [2, 2.0]], "gefen": [[1, 3.5], [2, None]]}
    one, other = (made_up(v, 1.0, 0, 0.0) | {"curve": curve} for v, curve in curves.items())
    alone = other | {"seed": 1}
    steps, differences = quality_report._curve_less([other, alone], [one])
    assert (steps, differences[0]) == ([1, 2], 0.5) and math.isnan(differences[1])


def test_torch_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="needs torch: pip install torch gefen"):
        torch_gefen.main([])


@pytest.mark.parametrize("there", [(), torch_gefen.PACKAGES])
def test_one_package_is_imported_as_gefen(there, monkeypatch):
    monkeypatch.setattr(torch_gefen, "require", lambda _: None)
    monkeypatch.setattr(torch_gefen, "installed", lambda: dict.fromkeys(there, "1"))
    torch_gefen.variants.cache_clear()
    with pytest.raises(SystemExit, match="needs one of .* an environment of its own"):
        torch_gefen.main([])
