"""The pages must be true: links, commands, Python, settings, the tree."""

import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
import typing
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import jax
import pytest

from bltjax import config as config_module
from bltjax import sharding
from bltjax.config import (
    FREE_FIELDS,
    RunConfig,
    config_path,
    default_config,
    from_config_dict,
    read_config,
)
from bltjax.config.command_line import take_settings
from bltjax.config.names import meanings
from bltjax.patching.boundaries import RULES
from bltjax.recipe.start import with_shapes
from tests import directories, processes

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in ("*.md", "docs/*.md", "launch/*.md", "benchmarks/**/*.md", "bltjax/demo/*.md")
    for path in sorted(ROOT.glob(pattern))
}
COMMANDS = {path.stem for path in (ROOT / "bltjax" / "commands").glob("[!_]*.py")}
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text, language=""):
    return [code for name, code in CODE.findall(text) if name == language]


def prose(text):
    return CODE.sub("", text)


def spans(text):
    """What stands in `backquotes` outside of code blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def rows(table):
    """Cells of the lines of a Markdown table below its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def section(page, title):
    """What stands below a heading, up to the next of its rank or a higher one."""
    (found,) = re.findall(rf"^(#+) {re.escape(title)}\n", PAGES[page], re.MULTILINE)
    after = PAGES[page].split(f"\n{found} {title}\n")[1]
    return re.split(rf"^#{{1,{len(found)}}} ", after, flags=re.MULTILINE)[0]


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_every_page_is_in_the_index():
    links = re.findall(r"\]\(([\w/.]+\.md)\)", section("README.md", "Documentation"))
    wanted = {p for p in PAGES if p.startswith("docs/")} | {"CONTRIBUTING.md", "CHANGELOG.md"}
    assert wanted <= set(links)


# Links


def anchors(text):
    """The fragments that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page]))
    for link in links:
        path, _, fragment = link.partition("#")
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        target = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        assert target.exists(), link
        if fragment:
            assert fragment in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    folders = "configs|tests|benchmarks|bltjax|launch"
    for path in re.findall(rf"`((?:{folders})/[\w/]+\.\w+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


# Python


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return directories.meta_with_entropy_model(tmp_path_factory.mktemp("docs") / "model")


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(PAGES[page], "python")])
def test_python_runs(page, checkpoint, monkeypatch):
    """The blocks of a page run one after the other, as a reader would type them.

    Pages that generate ask for as many bytes of as many prompts: one compilation serves all.
    """
    monkeypatch.chdir(ROOT)
    names = {"config": default_config()}
    for code in blocks(PAGES[page], "python"):
        exec(code.replace("path/to/blt-1b", str(checkpoint)), names)
    if page == "README.md":
        assert names["model"].config.pooling == "max" and names["score"].num_bytes == 19
    if page == "docs/python.md":
        assert names["logits"].shape == (*names["tokens"].shape, 260)
    if page == "docs/data.md":
        assert len(from_config_dict(RunConfig, names["config"]).data.sources) == 3
    if page == "docs/configs.md":
        assert names["config"].blt.remat == "full"
        changed = from_config_dict(RunConfig, names["get_config"]())
        assert changed.patching.target_patch_bytes is None


# Commands


def shell_lines(text):
    """Lines that may be commands: of code blocks without a language, indented ones, `spans`."""
    for block in blocks(text) + blocks(text, "sh"):
        yield from block.replace("\\\n", " ").splitlines()
    indented = prose(text).replace("\\\n", " ")
    yield from re.findall(r"^    ((?:python|bltjax|launch/).*)$", indented, re.MULTILINE)
    yield from spans(text)


def words(line):
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # no command: an apostrophe, say
        return []


def our_commands(text):
    """(command, arguments) of each call of one of our commands, in whatever form."""
    for line in shell_lines(text):
        found = words(line)
        if "python" in found and "-m" in found:
            found = found[found.index("-m") + 1 :]
            name, ours = found[0].removeprefix("bltjax."), found[0].startswith("bltjax.")
        elif found and found[0].endswith(".sh") and "--" in found:
            found, name, ours = found[found.index("--") :], "train", True
        elif found and found[0] == "sbatch":
            starts = [i for i, word in enumerate(found) if word.endswith(".sbatch")]
            found, name, ours = found[starts[0] :] if starts else [], "train", bool(starts)
        else:
            ours = len(found) > 1 and found[0] in ("bltjax", ".venv/bin/bltjax")
            found = found[1:]
            name = found[0] if ours else ""
        if ours and found[1:] and "..." not in found:
            yield name, found[1:]


@cache
def flags_of(command):
    """Name -> (type, allowed values) of a command's flags, as `--helpxml` tells them."""
    run = [sys.executable, "-m", f"bltjax.{command}", "--helpxml"]
    options = dict(cwd=ROOT, env=processes.environment(1), capture_output=True, text=True)
    shown = subprocess.run(run, **options)
    found = {}
    for flag in ET.fromstring(shown.stdout).iter("flag"):
        allowed = [value.text for value in flag.iter("enum_value")]
        found[flag.findtext("name")] = flag.findtext("type"), allowed
    return found


def is_placeholder(value):
    """DIR, HOST:PORT, X, ...: what the reader puts in."""
    return value == "..." or bool(re.fullmatch(r"\$?[A-Z][A-Z_:/]*", value))


def check(command, arguments):
    """AssertionError or ValueError where the command would not take the arguments."""
    settings, path = {}, config_path("quickstart")
    for argument in arguments:
        assert argument.startswith("--"), f"{command}: {argument} is no flag"
        name, given, value = argument[2:].partition("=")
        if name.startswith("config."):
            assert given, argument
            if not is_placeholder(value) or name.startswith("config.data."):
                settings |= take_settings([argument])[1]
            continue
        known = flags_of(command)
        assert name in known, f"{command} has no flag --{name}"
        kind, allowed = known[name]
        if name == "config" and "NAME" not in value and not is_placeholder(value):
            path = config_path(value)
        elif kind in ("int", "float") and not is_placeholder(value):
            float(value)
        elif allowed and not is_placeholder(value):
            assert value in allowed, argument
        else:
            assert given or kind == "bool", f"{argument} of {command} takes a value"
    config = read_config(path, settings)
    if config.start_from == "demo":  # its shapes are not contradicted
        with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
            with_shapes(config)


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    for command, arguments in our_commands(PAGES[page]):
        assert command in COMMANDS, command
        check(command, arguments)


def test_the_readme_shows_every_command():
    shown = {command for command, _ in our_commands(PAGES["README.md"])}
    assert shown == COMMANDS


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        ("train", "--workdirr=x"),
        ("train", "--config.blt.hash.vocabb=3"),
        ("train", "--config.blt.remat=most"),
        ("train", "--config=quickstartt"),
        ("convert", "--format=onnx"),
        ("plan", "--chips=many"),
        ("score", "text.txt"),
    ],
)
def test_wrong_commands_would_be_noticed(command, argument):
    with pytest.raises((AssertionError, ValueError, KeyError, AttributeError, OSError)):
        check(command, [argument])


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_exist(page):
    """`--flag=value` without its command: some command has it, or a script of ours."""
    known = {name for command in COMMANDS for name in flags_of(command)}
    scripts = [p for folder in ("benchmarks", "launch") for p in (ROOT / folder).rglob("*.*")]
    scripts = [path for path in scripts if path.suffix in (".py", ".sh", ".sbatch")]
    texts = "\n".join(path.read_text() for path in scripts)
    for span in spans(PAGES[page]):
        if not span.startswith("--"):
            continue
        for argument in words(span):
            name = argument.removeprefix("--").partition("=")[0]
            if name.startswith("config."):
                check("train", [argument] if "=" in argument else [])
            elif argument.startswith("--"):
                assert name in known or f'"{name}"' in texts or f"--{name}" in texts, argument


@pytest.mark.parametrize("page", PAGES)
def test_scripts_of_benchmarks_exist(page):
    """`python benchmarks/x.py --flag` and `python -m benchmarks.studies.x --flag`."""
    shared = "\n".join(
        (ROOT / "benchmarks" / name).read_text()
        for name in ("comparing.py", "measuring.py", "studies/study.py")
    )
    for line in shell_lines(PAGES[page]):
        found = [word for word in words(line) if not word.startswith("#")]
        if not found or found[0] != "python" or "benchmarks" not in " ".join(found[1:3]):
            continue
        script = found[2].replace(".", "/") + ".py" if found[1] == "-m" else found[1]
        text = (ROOT / script).read_text()
        for flag in re.findall(r"--(\w+)", " ".join(found)):
            assert f'"{flag}"' in text + shared, f"{script} has no flag --{flag}"


# Settings


def type_text(hint):
    if dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    if typing.get_origin(hint) is tuple:
        return f"tuple of {type_text(typing.get_args(hint)[0])}"
    if optional := typing.get_args(hint):
        return " or ".join("None" if h is type(None) else type_text(h) for h in optional)
    return hint.__name__


def default_text(value):
    """The value, or of a group of settings those that differ from the group's own defaults."""
    if not dataclasses.is_dataclass(value):
        return f"`{value!r}`"
    fields = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
    changed = [f"`{name}={given!r}`" for name, given, default in fields if given != default]
    return ", ".join(changed) or "its own defaults"


def groups(cls=RunConfig):
    """A config class and those of the settings in it."""
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found |= groups(inner)
    return found


@pytest.mark.parametrize("cls", sorted(groups(), key=lambda c: c.__name__))
def test_every_setting_is_on_its_page(cls):
    assert getattr(config_module, cls.__name__) is cls
    hints = typing.get_type_hints(cls)
    wanted = [
        [f"`{f.name}`", type_text(hints[f.name]), default_text(f.default)]
        for f in dataclasses.fields(cls)
    ]
    listed = rows(section("docs/configs.md", cls.__name__))
    assert [row[:3] for row in listed] == wanted
    said = {row[0].strip("`"): re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", row[3]) for row in listed}
    assert said == meanings(cls) and all(said.values())


def test_config_files_are_on_their_page():
    table = {row[0].strip("`") for row in rows(section("docs/configs.md", "Config files"))}
    assert table == {path.name for path in (ROOT / "configs").glob("*.py")}


def test_free_settings_are_on_their_page():
    (listed,) = re.findall(r"Free to\s+change are: (.*?)\.\s", PAGES["docs/configs.md"], re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == set(FREE_FIELDS)


def test_patching_rules_are_on_their_page():
    """A rule takes one line of docs."""
    listed = [row[0].strip("`") for row in rows(section("docs/data.md", "Patching rules"))]
    assert sorted(listed) == sorted(RULES)


def test_options_of_generation_are_on_their_page():
    from bltjax.api import Model

    parameters = inspect.signature(Model.generate).parameters
    listed = {row[1].strip("`") for row in rows(section("docs/generation.md", "Generate"))} - {""}
    assert listed == set(parameters) - {"self"}


# The tree


def listed_files(tree):
    """Paths of a tree of indented names, each followed by a few words."""
    folders, found = [], set()
    for line in tree.strip("\n").splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 2]
        found.add("".join([*folders, name]))
        if name.endswith("/"):
            folders.append(name)
    return found


def test_the_tree_is_what_is_there():
    listed = listed_files(blocks(section("docs/architecture.md", "The tree"))[0])
    package = ROOT / "bltjax"
    files = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    there = files | {f"{Path(path).parent}/" for path in files} | {"bltjax/demo/"}
    assert listed == there


def test_files_to_open_exist():
    for task, places in rows(section("docs/architecture.md", "I want to change X: open Y")):
        folder = None
        for place in re.findall(r"`([^`]+)`", places):
            path = ROOT / "bltjax" / place
            if folder is not None and not path.exists():
                path = folder / place  # beside the one before it
            assert path.exists(), (task, place)
            folder = path.parent


def test_every_line_of_the_tree_says_what_it_is():
    for line in blocks(section("docs/architecture.md", "The tree"))[0].splitlines()[1:]:
        assert len(line) <= 110 and (line.endswith("__init__.py") or len(line.split()) > 1), line
