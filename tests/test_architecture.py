"""The rules of the design that no other test would notice broken."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bltjax"
FILES = sorted(PACKAGE.rglob("*.py"))

# From below to above: a file imports from its own part and from those of lower tiers.
TIERS = [
    {"vocabulary"},
    {"config", "ops", "runtime"},
    {"sharding"},
    {"patching"},
    {"model"},
    {"checkpoints", "data"},
    {"training", "inference"},
    {"evaluation"},
    {"api", "costs"},
    {"recipe", "cli", "serving"},
    {"commands"},
]
MODULES_WITHOUT_JAX = [
    "checkpoints/run_directory",
    "cli",
    "config",
    "costs/chips",
    "costs/hlo_cost",
    "costs/hlo_text",
    "costs/topology",
    "data/batches/packing",
    "data/batches/rows",
    "data/records/shards",
    "data/records/store",
    "data/records/writing",
    "data/sources/files",
    "data/sources/readers",
    "data/sources/tables",
    "data/sources/units",
    "data/tokenizer",
    "patching/boundaries",
    "patching/calibrate",
    "runtime/endings",
    "runtime/files",
    "runtime/peers",
    "runtime/platforms",
    "runtime/processes",
    "runtime/progress",
    "runtime/roll_call",
    "runtime/signals",
    "runtime/system_errors",
    "runtime/terminal",
    "vocabulary",
]


def parts(path):
    return path.relative_to(PACKAGE).with_suffix("").parts


def imports(text, path="a file"):
    """Full names that Python code imports, wherever: at the top, in functions, under conditions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tier(part):
    found = [i for i, tier_parts in enumerate(TIERS) if part in tier_parts]
    assert found, f"bltjax/{part} has no tier: give it one in tests/test_architecture.py"
    return found[0]


def wrong_imports(part, text):
    """The imports of a file of bltjax/PART that point upwards, sideways, or at a command."""
    commands = {path.stem for path in (PACKAGE / "commands").glob("*.py")}
    found = []
    for name in imports(text):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "bltjax" or not rest:
            continue
        is_command = other in commands | {"commands"}  # bltjax.train is bltjax.commands.train
        if is_command or (other != part and tier(other) >= tier(part)):
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(parts(path)))
def test_imports_point_one_way_and_nobody_imports_a_command(path):
    if path == PACKAGE / "__init__.py":
        return  # it hands on names of the API when they are asked for
    assert wrong_imports(parts(path)[0], path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("model", "from bltjax.training import step"),
        ("model", "import bltjax.api"),
        ("data", "from bltjax.checkpoints import weights"),
        ("patching", "def late():\n    from bltjax.model import functional"),
        ("evaluation", "from bltjax.commands import evaluate"),
        ("recipe", "from bltjax.train import main"),
        ("recipe", "def late():\n    import bltjax.plan"),
        ("commands", "from bltjax import patches"),
        ("commands", "if True:\n    import bltjax.commands.plan"),
    ],
)
def test_a_planted_import_is_noticed(part, text):
    assert len(wrong_imports(part, text)) == 1


def test_operations_import_each_other_alone():
    for path in (PACKAGE / "ops").rglob("*.py"):
        for name in imports(path.read_text()):
            assert not name.startswith("bltjax") or name.startswith("bltjax.ops."), (path, name)


def test_runtime_imports_nothing_of_the_package():
    for path in (PACKAGE / "runtime").glob("*.py"):
        for name in imports(path.read_text()):
            assert not name.startswith("bltjax") or name.startswith("bltjax.runtime"), (path, name)


def importers(library):
    """Files that import a library, relative to the package, without suffix."""
    return {
        "/".join(parts(path))
        for path in FILES
        if any(f"{name}.".startswith(f"{library}.") for name in imports(path.read_text()))
    }


def test_one_home_for_each_library():
    assert all(name.startswith("model/") for name in importers("flax"))
    assert importers("flax")
    # The last writes leaves larger than memory, which takes a handler of its own.
    homes = ("training_state", "managers", "orbax_weights")
    assert importers("orbax") <= {f"checkpoints/{name}" for name in homes}
    assert importers("tensorstore") <= {"checkpoints/orbax_weights"}
    assert importers("torch") | importers("transformers") == set()


def test_mesh_axes_are_named_in_one_file():
    for path in FILES:
        if "/".join(parts(path)) in ("sharding", "config/run"):
            continue
        named = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
        }
        assert not named, f"{path} names mesh axes {named}: use sharding.spec and logical axes"


def test_the_package_has_few_entries():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) + 1 <= 26  # as `find bltjax -maxdepth 1` counts them


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(parts(path)))
def test_files_are_short_and_say_what_they_do(path):
    assert path.name not in ("utils.py", "helpers.py", "common.py")
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "no docstring"


def test_modules_for_the_host_load_no_jax():
    """Data workers and --help must not wait for JAX; a function may import it when it is called."""
    modules = ["bltjax", *("bltjax." + name.replace("/", ".") for name in MODULES_WITHOUT_JAX)]
    code = f"import sys, {', '.join(modules)}; "
    code += "print([m for m in ('jax', 'flax', 'optax') if m in sys.modules])"
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
