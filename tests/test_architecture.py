"""The rules of the design that no other test would notice broken."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bltjax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Design section 3: a module imports from lower tiers and from its own package.
TIERS = [
    {"model_config"},
    {"data_config", "training_config"},
    {"ops", "vocabulary", "config", "files", "lazy", "progress", "stopping", "chips"},
    {"patching", "sharding", "tokenizer"},
    {"model", "data"},
    {"training", "inference", "conversion", "evaluation"},
    {"formats"},
    {"tokens"},
    {"api"},
]
# Entry points and what only they use; every other new module needs a tier.
TOP = len(TIERS)
# The corpus's entropies need a model: the one import within a tier. Never the other way round.
SIDEWAYS = {("data.entropies", "model")}
NEEDS_NO_JAX = [
    "config",
    "distributed",
    "stopping",
    "chips",
    "hlo",
    "compiled",
    "topology",
    "data_config",
    "training_config",
    "model_config",
    "tokenizer",
    "vocabulary",
    "files",
    "data/chunks",
    "data/finding",
    "data/packing",
    "data/published",
    "data/readers",
    "data/records",
    "data/rows",
    "data/shards",
    "data/sources",
    "data/tables",
    "patching/boundaries",
    "patching/calibrate",
]


def parts(path):
    return path.relative_to(PACKAGE).with_suffix("").parts


def imports(path, top_level_only=False):
    """Full names of the modules (and of the names in them) that a file imports."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(prefix):
    """Files that import `prefix`, relative to the package, without suffix."""
    return {
        "/".join(parts(path))
        for path in FILES
        if any(f"{name}.".startswith(f"{prefix}.") for name in imports(path))
    }


def tier(component):
    return next((i for i, names in enumerate(TIERS) if component in names), TOP)


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(parts(path)))
def test_dependencies_point_one_way(path):
    importer = parts(path)[0]
    for name in imports(path):
        package, _, rest = name.partition(".")
        imported = rest.split(".")[0]
        if package != "bltjax" or not rest or imported == importer:
            continue
        allowed = tier(imported) < tier(importer) or tier(importer) == TOP
        allowed |= (".".join(parts(path)), imported) in SIDEWAYS
        assert allowed, f"{importer} (tier {tier(importer)}) imports {name} (tier {tier(imported)})"


def test_operations_import_nothing_of_the_package_but_each_other():
    for path in (PACKAGE / "ops").glob("*.py"):
        for name in imports(path):
            assert not name.startswith("bltjax") or name.startswith("bltjax.ops."), (path, name)


def test_modules_are_known():
    """A module of the library has a tier; what has none is an entry point or serves them."""
    nobody = {
        name
        for path in FILES
        for name in imports(path)
        if tier(parts(path)[0]) < TOP
        and name.startswith("bltjax.")
        and tier(name.split(".")[1]) == TOP
    }
    assert not nobody


def test_one_home_for_each_library():
    assert all(name.startswith("model/") for name in importers("flax"))
    assert importers("flax")
    # The second writes leaves larger than memory, which takes a handler of its own.
    assert importers("orbax") <= {"training/checkpoint", "training/weights_on_disk"}
    assert importers("tensorstore") <= {"training/weights_on_disk"}
    assert importers("torch") | importers("transformers") == set()


def test_mesh_axes_are_named_in_one_file():
    for path in FILES:
        if "/".join(parts(path)) in ("sharding", "config"):
            continue
        named = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
        }
        assert not named, f"{path} names mesh axes {named}: use sharding.spec and logical axes"


def test_files_are_short_and_say_what_they_do():
    for path in FILES:
        assert path.name not in ("utils.py", "helpers.py", "common.py"), path
        text = path.read_text()
        assert len(text.splitlines()) < 400, path
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path}: no docstring"


@pytest.mark.parametrize("name", NEEDS_NO_JAX)
def test_host_code_loads_no_jax(name):
    """Data workers and --help must not wait for JAX; a function may import it when it is called."""
    found = [
        i
        for i in imports(PACKAGE / f"{name}.py", top_level_only=True)
        if i.split(".")[0] in ("jax", "jaxlib", "flax", "optax")
    ]
    assert not found


def test_host_modules_load_no_jax_through_others():
    names = ["bltjax", *("bltjax." + name.replace("/", ".") for name in NEEDS_NO_JAX)]
    code = (
        f"import sys, {', '.join(names)}; print([m for m in ('jax', 'flax') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_no_double_precision_in_compiled_code():
    """64-bit types are off in JAX; no file turns them on."""
    for path in FILES:
        assert "enable_x64" not in path.read_text(), path
        tree = ast.parse(path.read_text())
        wide = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr == "float64"
            and getattr(node.value, "id", "") == "jnp"
        ]
        assert not wide, path
