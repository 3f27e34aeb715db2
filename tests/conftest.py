"""Hostile surroundings for every test: 8 CPU devices, no rank promotion, warnings are errors."""

import os

# Before jax is imported: some tests spread arrays over a mesh.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# With `--unoptimised`: files of many small programs, most of whose time is compilation. None counts
# memory, or compares programs that only the same optimizations make the same.
_UNOPTIMISED = {
    f"test_{name}"
    for name in (
        "backends dual dual_runs flash from_adam microadam muon muon_mesh release replan"
        " state_sharding step surfaces surfaces_beside_adamw x64"
    ).split()
}

# Made the golden data once; needs the package that they come from.
collect_ignore = ["golden_flash/make_golden.py"]


def pytest_addoption(parser):
    parser.addoption(
        "--unoptimised",
        action="store_true",
        help="compile the programs of some files without optimizations: less time",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--unoptimised"):
        for item in items:
            if item.path.stem in _UNOPTIMISED:
                item.add_marker(pytest.mark.usefixtures("unoptimised"))


@pytest.fixture
def unoptimised():
    """XLA compiles faster, and worse."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def strict_promotion():
    """Strict dtype promotion around our own functions (optax.adamw itself raises under it)."""
    with jax.numpy_dtype_promotion("strict"):
        yield
