"""Names of settings: each has its meaning, and a mistyped one gets the one it should be."""

import random
import re

import pytest

from bltjax.config import RunConfig, default_config, from_config_dict, read_config
from bltjax.config.command_line import take_settings
from bltjax.config.names import MOST_NAMED, groups, letters, nearest, settings

LEVELS = {name.split(".")[-1]: name for name in settings()}


def mistyped(draw: random.Random) -> tuple[str, str]:
    """(a real name, what somebody typed for it)."""
    name = draw.choice(list(settings()))
    *levels, last = name.split(".")
    place = draw.randrange(len(name))
    swapped = name[:place] + name[place + 1 : place + 2] + name[place] + name[place + 2 :]
    ways = {
        "dropped": name[:place] + name[place + 1 :],
        "doubled": name[:place] + name[place] + name[place:],
        "replaced": name[:place] + draw.choice("qxz7") + name[place + 1 :],
        "swapped": swapped,
        "case": name.upper() if draw.random() < 0.5 else name.title(),
        "dashes": name.replace("_", "-"),
        "no levels": last,
        "level left out": ".".join([*levels[:-1], last]),
        "level too many": ".".join([*levels, draw.choice(["optimizer", "model"]), last]),
        "part of a level": ".".join([*(level.split("_")[-1] for level in levels), last]),
    }
    return name, ways[draw.choice(list(ways))]


def test_mistyped_settings_get_the_nearest_real_one():
    """Whatever is proposed is real, and the one that was meant is there, but for a few."""
    draw, seen, meant = random.Random(0), 0, 0
    while seen < 200:
        name, typed = mistyped(draw)
        if typed in settings() or typed in groups() or not all(typed.split(".")):
            continue
        seen += 1
        right, wrong = "--config.blt_training.steps=5", f"--config.{typed}=5"
        with pytest.raises(ValueError) as error:
            take_settings(draw.sample([right, wrong], 2))
        said, proposed = str(error.value).split(": did you mean ")
        assert said == f"--config.{typed} is not a setting" and "\n" not in proposed
        found = re.findall(r"--config\.([\w.]+)", proposed)
        assert found and {*found} <= {*settings(), *groups()}
        near = nearest(typed)
        assert found == near[:MOST_NAMED]
        meant += name in near
        if name not in near:  # another one is as near
            assert letters(typed, near[0]) <= letters(typed, name) or len(near) > MOST_NAMED
    assert meant >= 0.98 * seen


@pytest.mark.parametrize(
    "typed, wanted",
    [
        ("blt_training.learning_rate", ["blt_training.optimizer.learning_rate"]),
        (
            "traning.steps",
            ["entropy_training.steps", "blt_training.steps", "token_training.steps"],
        ),
        (
            "learning-rat",
            [f"{t}_training.optimizer.learning_rate" for t in ("entropy", "blt", "token")],
        ),
        ("blt.vocab", ["blt.hash.vocab", "blt.vocab_size"]),
        ("BLT.Hash.Vocab", ["blt.hash.vocab"]),
        ("config.blt.hash.vocab", ["blt.hash.vocab"]),
        ("blt.cross_attention.j", ["blt.cross_attention.k"]),
        ("blt_training.optimizer", None),
    ],
)
def test_levels_and_parts_of_names(typed, wanted):
    assert nearest(typed) == (wanted or [typed])


def test_names_of_config_files_and_of_python_are_found_too():
    config = default_config()
    config.blt_training.learning_rate = 1.0
    said = "config.blt_training.learning_rate is not a setting: did you mean config.blt_training."
    with pytest.raises(ValueError, match=re.escape(f"{said}optimizer.learning_rate?")):
        from_config_dict(RunConfig, config)
    with pytest.raises(ValueError, match=re.escape(f"{said}optimizer.learning_rate?")):
        read_config("quickstart", {"blt_training.learning_rate": 1.0})


@pytest.mark.parametrize(
    "argument, said",
    [
        ("blt_training.steps=abc", "--config.blt_training.steps=abc must be a whole number"),
        ("blt_training.steps=1e3", "must be a whole number"),
        ("blt_training.steps=5.5", "must be a whole number"),
        ("blt_training.steps=", "--config.blt_training.steps= must be a whole number"),
        ("blt_training.steps", "--config.blt_training.steps has no value: give --config."),
        ("patching.threshold=high", "must be a number"),
        ("patching.target_patch_bytes=many", "must be a number or None"),
        ("patching.in_step=maybe", "--config.patching.in_step=maybe must be true or false"),
        ("patching.in_step=None", "must be true or false"),
        ("stages=('blt'", "must be a tuple"),
        ("blt=3", "config.blt is a group of settings, set one in it, such as --config.blt."),
        ("blt.hash={}", "(others: sizes, vocab, num_functions, initial_rows)"),
        ("blt.init.base_std=" + "7x" * 500, "7x7x... must be a number or None"),
        ("=5", "--config. is not a setting: did you mean"),
    ],
)
def test_wrong_values_and_forms(argument, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        take_settings(["--config=quickstart", f"--config.{argument}"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_forms_of_settings():
    assert take_settings(
        ["--config=a", "--config.patching.in_step", "--config.mesh.data", "-1", "--workdir", "w"]
    ) == (["--config=a", "--workdir", "w"], {"patching.in_step": True, "mesh.data": -1})
    twice = ["--config.blt_training.steps=5", "--config.blt_training.steps=6"]
    assert take_settings(twice) == ([], {"blt_training.steps": 6})
    assert take_settings(["--", *twice]) == (["--", *twice], {})


FILES = {
    "def get_config(:": "line 1: SyntaxError",
    "x = 1\nraise RuntimeError('no\\nway')": "line 2: RuntimeError: no",
    "import no_such_module": "line 1: ModuleNotFoundError",
    "def get_config():\n    return 1 / 0": "line 2: ZeroDivisionError",
    "open('/no/such/file')": "line 1: FileNotFoundError",
    "x = 1": "has no function get_config",
    "def get_config():\n    pass": "returns NoneType: begin it with",
    "def get_config():\n    return {}": "returns dict",
    "def get_config(size):\n    pass": "TypeError",
    "\0": "null",
}


@pytest.mark.parametrize("text", FILES)
def test_config_files_that_are_wrong(text, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=FILES[text]) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_config_files_that_are_not_there(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    for path, meant in (
        ("configs/quickstrat.py", "quickstart"),
        ("quickstrat", "quickstart"),
        (f"{tmp_path}/mien.py", f"{tmp_path}/mine.py"),
        ("studies/bltt", "studies/blt"),
    ):
        with pytest.raises(OSError, match=f"did you mean .*{meant}") as error:
            read_config(path)
        assert repr(path) in str(error.value)
    for path in ("x" * 5000, str(tmp_path), "~nobody/x"):
        with pytest.raises(OSError, match="is neither a file nor the name of a config"):
            read_config(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"mine\.py has no function get_config"):
        read_config("~/mine.py")


@pytest.mark.parametrize(
    "name", ["data.sources[0].split", "data.sources.0.path", "data.sources[N]"]
)
def test_a_setting_of_one_source_is_said_to_be_part_of_a_list(name):
    with pytest.raises(ValueError, match=r"is part of a list: give the whole of --config\.data\.s"):
        take_settings([f"--config.{name}=x"])


@pytest.mark.parametrize("name", ["a" * 20_000, "blt." * 5_000 + "x"])
def test_a_name_of_many_letters_is_cut(name):
    with pytest.raises(ValueError, match="is not a setting: did you mean") as raised:
        take_settings([f"--config.{name}=1"])
    assert len(str(raised.value)) < 1000
