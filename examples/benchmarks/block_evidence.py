"""What blocks explain of a first gradient: of the variance of |g|, and of that of log g^2.

    python examples/benchmarks/block_evidence.py

For every matrix of some tasks of the quality bench, of seed 0. `calibrate` looked at the logarithm
at first, as the authors' package does. Written to `block_evidence.json`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from _common import write
from quality import TASKS  # which knows where the tasks' models are
from shared_nu import BLOCKS, shared

TRIED = "gpt", "finetune", "llama", "vit"


def explained(y: jax.Array, block: tuple[int, ...]) -> float:
    """The share of y's variance that is between blocks, less what chance gives."""
    y = y - y.mean()
    chance = 1 / np.prod(block)
    share = jnp.mean(jnp.square(shared(y, block))) / jnp.mean(jnp.square(y))
    return round(float((share - chance) / (1 - chance)), 3)


def of_leaf(g: jax.Array) -> dict[str, dict[str, float]]:
    """By what is looked at and by blocks, those that divide the leaf."""
    size = jnp.abs(g)
    log = jnp.log(jnp.square(g) / jnp.mean(jnp.square(g)) + 1e-12)
    blocks = {name: of(g.shape) for name, of in BLOCKS.items()}
    fitting = {
        name: block
        for name, block in blocks.items()
        if all(n % b == 0 for n, b in zip(g.shape, block, strict=True))
    }
    return {
        what: {name: explained(y, block) for name, block in fitting.items()}
        for what, y in (("|g|", size), ("log g^2", log))
    }


def main() -> None:
    results = {}
    for name in TRIED:
        problem = TASKS[name].prepare(False)
        batch = problem.data.batch(np.random.default_rng(0))
        grads = jax.jit(jax.grad(problem.loss))(problem.init(0), problem.frozen, batch)
        results[name] = {
            jax.tree_util.keystr(path, simple=True, separator="/"): of_leaf(g)
            for path, g in jax.tree_util.tree_leaves_with_path(grads)
            if g.ndim > 1 and g.size > 4096
        }
    write("block_evidence.json", "python examples/benchmarks/block_evidence.py", results)


if __name__ == "__main__":
    main()
