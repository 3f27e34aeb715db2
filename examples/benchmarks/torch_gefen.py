"""Runs the PyTorch implementations of Gefen on the tasks of the quality bench.

    pip install torch gefen                       # the authors' own
    pip install torch gefen-x                     # or its fork, in an environment of its own
    python examples/benchmarks/torch_gefen.py --task gpt --seeds 0 1 2 --lr-factors 1
    python examples/benchmarks/quality_report.py

It takes the options of `quality.py` and appends to the same file, so that a line here and a line
there differ by the optimizer alone: JAX computes and clips the gradient of the same model on the
same batch, and torch takes the step, on the CPU, at the learning rate of the same schedule. Each
optimizer gets the bench's b2 and weight decay, and besides these its own defaults. `torch adamw` is
the control: its losses are those of `optax.adamw`, but for the order of sums.

Gefen's blocks are runs of a tensor in memory. Flax keeps a dense kernel as [in, out], torch as
[out, in]: the variants that say so hand it over in torch's order.

Gefen-X advises 0.6 times AdamW's learning rate: `--lr-factors 0.6`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import quality
from quality_train import Params, Trainer

PACKAGES = "gefen", "gefen-x"  # both are imported as `gefen`
INSTALL = (
    "pip install torch gefen, for the authors' Gefen, or pip install torch gefen-x, for its fork:"
    " both are imported as `gefen`, so each needs an environment of its own"
)
OUT_IN = ", kernels (out, in)"


class Variant(NamedTuple):
    """A torch optimizer, and whether it gets dense kernels as [out, in]."""

    make: Callable[..., Any]
    out_in: bool


class Run(NamedTuple):
    """A torch optimizer at work; torch keeps the parameters inside of it as well."""

    optimizer: Any
    tensors: list[Any]  # in the order of the leaves
    rates: Iterator[float]


def require(module: str) -> Any:
    """An optional module; typed Any, because type checkers need not have it either."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"torch_gefen.py needs {error.name}: {INSTALL}") from error


def installed() -> dict[str, str]:
    """Versions of those of `PACKAGES` that are there."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def variants() -> Mapping[str, Variant]:
    """AdamW, and Gefen as installed; names carry versions, because rows of a name are compared."""
    torch, packages = require("torch"), installed()
    if len(packages) != 1:
        raise SystemExit(
            f"torch_gefen.py needs one of {PACKAGES}, found {list(packages)}: {INSTALL}"
        )
    (package, version), *_ = packages.items()
    # Not fused, because the fused kernels are CUDA's; without CUDA both fall back to this anyway.
    gefen = functools.partial(require("gefen").Gefen, fused=False)
    name = f"torch {package} {version}"
    return {
        "torch adamw": Variant(torch.optim.AdamW, out_in=False),
        name: Variant(gefen, out_in=False),
        name + OUT_IN: Variant(gefen, out_in=True),
    }


class TorchTrainer(Trainer):
    """The bench's trainer, but torch takes the steps."""

    def _prepare(self) -> None:
        if self._recipe.grad_dtype != "float32":
            raise SystemExit("--grad-dtype: torch wants gradients in the parameters' dtype")
        if self._recipe.spike != 1.0:
            raise SystemExit("--task: none with a spike, which is not written for torch")
        self._torch = require("torch")
        self.versions = {"torch": self._torch.__version__}
        self._variant = variants()[self._recipe.variant]
        paths, self._structure = jax.tree_util.tree_flatten_with_path(self._params)
        self._names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
        self._decays: list[bool] = jax.tree.leaves(self._problem.decay(self._params))
        self._gradient = jax.jit(self._clipped_gradient)
        self._factors = np.asarray(jax.vmap(self._schedule)(jnp.arange(self._recipe.steps)))

    def _clipped_gradient(self, params: Params, frozen: Any, batch: Any) -> Params:
        # Clipped by Optax, because torch divides by the norm plus 1e-6.
        grads = jax.grad(self._problem.loss)(params, frozen, batch)
        return optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]

    def _turn(self, leaves: Sequence[Any]) -> list[Any]:
        """Exchanges the axes of dense kernels, from Flax's order to torch's or back."""

        def is_kernel(name: str, decays: bool) -> bool:
            # Norm scales do not decay even where layers are stacked; tables are alike in both.
            return decays and "embed" not in name and "positions" not in name

        return [
            leaf.swapaxes(-1, -2) if self._variant.out_in and is_kernel(name, decays) else leaf
            for leaf, name, decays in zip(leaves, self._names, self._decays, strict=True)
        ]

    def _tensors(self, tree: Params) -> list[Any]:
        # Copies, because torch writes in place, which an array of JAX does not allow.
        leaves = self._turn([np.asarray(leaf) for leaf in jax.tree.leaves(tree)])
        return [self._torch.from_numpy(np.array(leaf, order="C")) for leaf in leaves]

    def _params_of(self, tensors: Sequence[Any]) -> Params:
        leaves = self._turn([tensor.detach().numpy() for tensor in tensors])
        return jax.tree.unflatten(self._structure, [jnp.array(leaf) for leaf in leaves])

    def _begin(self, peak: float) -> tuple[Params, Any]:
        tensors = [self._torch.nn.Parameter(tensor) for tensor in self._tensors(self._params)]
        optimizer = self._variant.make(
            self._groups(tensors), lr=peak, betas=(0.9, self._recipe.b2), eps=1e-8
        )
        rates = (peak * float(factor) for factor in self._factors)
        return self._params_of(tensors), Run(optimizer, tensors, rates)

    def _groups(self, tensors: Sequence[Any]) -> list[dict[str, Any]]:
        """Named parameters, those with weight decay and those without."""
        named = list(zip(self._names, tensors, strict=True))
        groups = [
            {
                "params": [
                    pair for pair, d in zip(named, self._decays, strict=True) if d == decays
                ],
                "weight_decay": self._recipe.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        return [group for group in groups if group["params"]]

    def _advance(
        self, params: Params, opt_state: Any, batch: Any, peak: float
    ) -> tuple[Params, Any]:
        grads = self._gradient(params, self._problem.frozen, batch)
        for tensor, grad in zip(opt_state.tensors, self._tensors(grads), strict=True):
            tensor.grad = grad
        rate = next(opt_state.rates)
        for group in opt_state.optimizer.param_groups:
            group["lr"] = rate
        opt_state.optimizer.step()
        return self._params_of(opt_state.tensors), opt_state

    def _state_bytes(self, opt_state: Any) -> int:
        """Of what is kept per parameter tensor; Gefen's codebook, 1 KiB, stands elsewhere."""
        kept = [value for of in opt_state.optimizer.state.values() for value in of.values()]
        return sum(value.nbytes for value in kept if self._torch.is_tensor(value))


def main(argv: Sequence[str] | None = None) -> None:
    quality.main(argv, variants(), TorchTrainer)


if __name__ == "__main__":
    main()
