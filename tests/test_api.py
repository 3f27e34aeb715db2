"""The package from outside: its names, its documentation, and its manners."""

import ast
import inspect
import pathlib
import subprocess
import sys
import textwrap

import pytest

import gefen_jax as gx

_PACKAGE = pathlib.Path(gx.__file__).parent
_MODULES = sorted(_PACKAGE.rglob("*.py"))

PUBLIC = [
    "DualCode",
    "Exact",
    "FlatPeriods",
    "FusedGefen",
    "LeafPlan",
    "MemoryReport",
    "Plan",
    "ScaleByFlashAdamState",
    "ScaleByFlashMomentumState",
    "ScaleByGefenMuonState",
    "ScaleByGefenState",
    "ScaleByMicroAdamState",
    "SharedBlocks",
    "SplitWeightsState",
    "Untrained",
    "WideDualCode",
    "calibrate",
    "check_fingerprint",
    "fingerprint",
    "flash_adam",
    "flash_adamw",
    "flash_lion",
    "flash_sgd",
    "from_adam",
    "fused_gefen",
    "gefen",
    "gefen_muon",
    "memory_report",
    "merge_weights",
    "microadam",
    "plan_by_shape",
    "release",
    "replan",
    "scale_by_flash_adam",
    "scale_by_flash_lion",
    "scale_by_flash_momentum",
    "scale_by_gefen",
    "scale_by_gefen_muon",
    "scale_by_microadam",
    "split_weights",
    "state_sharding",
    "to_adam",
    "with_split_weights",
]

# Containers of results: what makes them shows them in its own examples.
_NO_EXAMPLES = {
    "FusedGefen",
    "LeafPlan",
    "MemoryReport",
    "ScaleByFlashAdamState",
    "ScaleByFlashMomentumState",
    "ScaleByGefenMuonState",
    "ScaleByGefenState",
    "ScaleByMicroAdamState",
    "SplitWeightsState",
}


def _public_names() -> list[str]:
    modules = {name for name, value in vars(gx).items() if inspect.ismodule(value)}
    return sorted(n for n in vars(gx) if not n.startswith("_") and n not in modules)


def test_public_names():
    assert _public_names() == PUBLIC
    # Only what is exported on purpose: `X as X`, the form that type checkers read as public.
    tree = ast.parse((_PACKAGE / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    exported = {a.asname for node in imports for a in node.names if a.name == a.asname}
    assert exported == set(PUBLIC)


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert gx.__version__ == version("gefen_jax")


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    item = getattr(gx, name)
    doc = inspect.getdoc(item)
    assert doc and doc.splitlines()[0].endswith((".", "?")), "one line first"
    assert len(doc.splitlines()) == 1 or not doc.splitlines()[1], "then a blank one"
    assert item.__module__.startswith("gefen_jax.")
    # A NamedTuple or dataclass without a docstring would get its signature as one.
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", [n for n in PUBLIC if n not in _NO_EXAMPLES])
def test_examples(name):
    doc = inspect.getdoc(getattr(gx, name))
    assert "Examples:" in doc and ">>> " in doc


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isfunction(getattr(gx, n))])
def test_every_argument_is_documented(name):
    function = inspect.unwrap(getattr(gx, name))
    doc = inspect.getdoc(function)
    arguments = doc[doc.index("Args:") : doc.index("Returns:")]
    for parameter in inspect.signature(function).parameters.values():
        assert f"  {parameter.name}: " in arguments
        assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isclass(getattr(gx, n))])
def test_every_public_method_is_documented(name):
    methods = inspect.getmembers(getattr(gx, name), inspect.isroutine)
    own = {n: m for n, m in methods if n in vars(getattr(gx, name)) and not n.startswith("_")}
    assert all(inspect.getdoc(method) for method in own.values())


def _run(program: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_is_quiet_and_touches_no_device():
    # Every backend is made to fail: an import that asks for a device would say so.
    program = """
        import jax
        before = {name: jax.config.values[name] for name in jax.config.values}
        jax.config.update("jax_platforms", "a_platform_that_does_not_exist")
        import gefen_jax
        gefen_jax.scale_by_gefen
        try:
            jax.devices()
        except RuntimeError:
            pass
        else:
            raise SystemExit("the platform should not exist")
        before["jax_platforms"] = "a_platform_that_does_not_exist"
        changed = {n for n, v in jax.config.values.items() if n in before and before[n] != v}
        raise SystemExit(f"changed {changed}" if changed else 0)
    """
    result = _run(program, "-W", "error::DeprecationWarning:gefen_jax")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def _imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", _MODULES, ids=lambda p: str(p.relative_to(_PACKAGE)))
def test_quiet_guest(module):
    text = module.read_text()
    tree = ast.parse(text)
    outside = {n for n in _imports(tree) if not n.startswith("gefen_jax.")}
    for name in outside:
        parts = name.split(".")
        assert not any(p.startswith("_") and p != "__future__" for p in parts), name
    # No attribute of theirs that is private either: jax._src, optax._src.
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr != "_src", ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"
    assert ast.get_docstring(tree), "every module says what it is"
    # No environment variables, no global switches.
    assert "os.environ" not in text and "config.update" not in text


def test_type_information_is_shipped():
    assert (_PACKAGE / "py.typed").is_file()
