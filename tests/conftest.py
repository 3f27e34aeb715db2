"""Hostile surroundings for every test: 8 CPU devices, no rank promotion, warnings are errors."""

import os

# Before jax is imported: some tests spread arrays over a mesh.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Made the golden data once; needs the package that they come from.
collect_ignore = ["golden_flash/make_golden.py"]


@pytest.fixture
def strict_promotion():
    """Strict dtype promotion around our own functions (optax.adamw itself raises under it)."""
    with jax.numpy_dtype_promotion("strict"):
        yield
