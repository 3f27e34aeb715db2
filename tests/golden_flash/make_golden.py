"""Writes flashoptim.npz: steps of the PyPI package `flashoptim`, as it is. Not run in tests.

Its kernels are for CUDA devices; here Triton's interpreter runs them on a CPU:

    TRITON_INTERPRET=1 python make_golden.py     # needs torch, triton, flashoptim

Two things stand in for the device: the number of programs in a grid, which is a question of speed,
and CUDA's `pow`, which the interpreter does not have.
"""

import json
from pathlib import Path

import flashoptim
import numpy as np
import torch
import triton
from flashoptim import optimizers

STEPS = 6
# Decay rates that float32 holds exactly: so is 1 - b, in which implementations differ otherwise.
B1, B2, LION_B2 = 1 - 2.0**-3, 1 - 2.0**-10, 1 - 2.0**-6
LEARNING_RATE, WEIGHT_DECAY, EPS = 1e-2, 0.1, 1e-8
SHAPES = {"odd": (33,), "long": (4097,), "rows": (8, 64), "ragged": (3, 45)}
ADAM = {"b1": B1, "b2": B2, "eps": EPS}
CASES = {
    "adamw": ADAM | {"decoupled": True},
    "adam": ADAM | {"decoupled": False},
    "lion": {"b1": B1, "b2": LION_B2},
    "sgd": {"momentum": B1, "nesterov": False},
    "nesterov": {"momentum": B1, "nesterov": True},
}

optimizers._make_grid = lambda n, meta: (-(-n // meta["BLOCK_SIZE_N"]),)
optimizers.libdevice.pow = lambda base, t: base ** int(t.handle.data[0])


def step(case, t, p, g, mu, mu_scale, nu, nu_scale):
    """One step in place, with the arguments that the package's optimizers call its kernels with."""
    number = CASES[case]
    if "adam" in case:
        optimizers._fused_adam_step(
            mom=mu,
            mom_scales_f16=mu_scale,
            var=nu,
            var_scales_f16=nu_scale,
            param=p,
            grad=g,
            errors=None,
            lr=LEARNING_RATE,
            beta1=number["b1"],
            beta2=number["b2"],
            eps=number["eps"],
            weight_decay=WEIGHT_DECAY * (LEARNING_RATE if number["decoupled"] else 1),
            decoupled=number["decoupled"],
            step=t,
        )
        return
    lion = case == "lion"
    optimizers._fused_momentum_step(
        momentum=mu,
        scales_f16=mu_scale,
        param=p,
        grad=g,
        errors=None,
        lr=LEARNING_RATE,
        mom_coef=number["b2"] if lion else number["momentum"],
        update_coef=number["b1"] if lion else 1.0,
        weight_decay=WEIGHT_DECAY * (LEARNING_RATE if lion else 1),
        do_lion=lion,
        nesterov=number.get("nesterov", False),
    )


def gradients(rng, shape):
    """bfloat16 gradients of different size by element, one of them always 0, a step all 0."""
    size = np.exp(rng.normal(0, 1, shape))
    g = (rng.normal(0.2, 1, (STEPS, *shape)) * size).astype(np.float32)
    g.reshape(STEPS, -1)[:, 5] = 0
    g[3] = 0
    return torch.from_numpy(g).to(torch.bfloat16)


def main():
    rng = np.random.default_rng(0)
    out = {}
    start = {k: rng.normal(0, 1, s).astype(np.float32) for k, s in SHAPES.items()}
    grads = {k: gradients(rng, s) for k, s in SHAPES.items()}
    for k in SHAPES:
        out[f"param__{k}"] = start[k]
        out[f"grad__{k}"] = grads[k].view(torch.int16).numpy().view(np.uint16)
    for case in CASES:
        for k, shape in SHAPES.items():
            n = int(np.prod(shape))
            p = torch.from_numpy(start[k].copy())
            mu, nu = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape, dtype=torch.uint8)
            mu_scale, nu_scale = (torch.zeros(-(-n // 32), dtype=torch.float16) for _ in range(2))
            kept = {"p": p, "mu": mu, "mu_scale": mu_scale}
            kept |= {"nu": nu, "nu_scale": nu_scale} if "adam" in case else {}
            history = {name: [] for name in kept}
            for t in range(1, STEPS + 1):
                step(case, t, p, grads[k][t - 1], mu, mu_scale, nu, nu_scale)
                for name, x in kept.items():
                    history[name].append(x.numpy().copy())
            for name, rows in history.items():
                out[f"{case}__{name}__{k}"] = np.stack(rows)
    out["hyper_json"] = json.dumps(
        {
            "versions": {
                "flashoptim": flashoptim.__version__,
                "torch": torch.__version__,
                "triton": triton.__version__,
            },
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "cases": CASES,
        }
    )
    np.savez_compressed(Path(__file__).with_name("flashoptim.npz"), **out)


if __name__ == "__main__":
    main()
