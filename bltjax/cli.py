"""Everything that the commands share: flags, configs, opening a model, errors of one line.

`bltjax COMMAND ...` is `python -m bltjax.COMMAND ...`; a command is a file of `bltjax/commands/`.
"""

import ast
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from bltjax.config import DTYPES, RunConfig, config_path, from_config_dict
from bltjax.config.data import FILE_KINDS
from bltjax.patching.boundaries import check_rule
from bltjax.runtime.platforms import skip_absent_tpu
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import printable

flags.disclaim_key_flags()  # --help of a command shows the flags that are defined here for it
USER_ERROR = 2  # exit code: the command or what it names is at fault
COMMANDS = Path(__file__).parent / "commands"


def main():
    """Runs the console script `bltjax`."""
    commands = {path.stem: path for path in sorted(COMMANDS.glob("[!_]*.py"))}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"bltjax {version('bltjax')}")
    elif name in ("--help", "-h", "help"):
        print("usage: bltjax COMMAND [--flag=value ...]; bltjax COMMAND --help lists the flags\n")
        for command, path in commands.items():
            summary = ast.get_docstring(ast.parse(path.read_text())) or ""
            print(f"  {command:12} {summary.splitlines()[0]}")
    elif name not in commands:
        fail(f"bltjax has no command {name!r}: choose one of {', '.join(commands)}")
    else:
        del sys.argv[1]
        runpy.run_module(f"bltjax.{name}", run_name="__main__", alter_sys=True)


def run(command: Callable, define_flags: Callable[[], None]):
    """Runs a command's main(argv) with the flags that it defines, shown by --help."""
    define_flags()
    if hasattr(sys.stdout, "reconfigure"):  # what an encoding such as ASCII lacks is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"
    skip_absent_tpu(os.environ)
    app.run(command, flags_parser=parse)


def define_model_flags():
    """Defines --checkpoint, --entropy_model, --dtype and --bf16_compat, for `open_model`."""
    flags.DEFINE_string("checkpoint", None, "A directory of weights, or of a training run.")
    flags.DEFINE_string(
        "entropy_model", None, "A directory with the entropy model, where the checkpoint has none."
    )
    flags.DEFINE_enum("dtype", None, DTYPES, "Of the parameters; default: as they are stored.")
    flags.DEFINE_bool("bf16_compat", False, "Find patches as the published demo does.")


def define_text_flags(files: str):
    """Defines --kind, --field and --max_bytes, for `evaluation.texts`; files: a flag."""
    flags.DEFINE_enum(
        "kind",
        "auto",
        FILE_KINDS,
        f"Of the files at --{files}; bytes: as they are, whatever they hold.",
    )
    flags.DEFINE_string("field", "", "Field that holds a record's text; default: text or content.")
    flags.DEFINE_integer(
        "max_bytes",
        None,
        "Bytes of text that are read at most; each source gives an even share, its first bytes.",
        1,
    )


def define_run_flags():
    """Defines --config and --workdir, for `read_config`."""
    config_flags.DEFINE_config_file(
        "config", None, "The name of a config, such as quickstart, or a file.", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Where records, checkpoints, metrics and results go.")


def parse(argv: list[str]) -> list[str]:
    """Parses flags; ends the command with one line for a flag or setting that is wrong."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of devices that are not there
    try:
        return flags.FLAGS(_with_config_path(argv))
    except flags.Error as error:
        fail(error)
    except OSError as error:
        fail(f"--config cannot be read: {error}")
    except (AttributeError, KeyError, ValueError, TypeError) as error:  # of a mistyped setting
        reason = str(error.args[0] if error.args else error).strip("'\"")
        reason = reason.replace("\\n", " ").replace("\\", "")
        names = {a: a.split("=")[0].split(".")[-1] for a in argv if a.startswith("--config.")}
        wrong = [argument for argument, name in names.items() if name in reason]
        fail(f"{wrong[0] if wrong else 'settings'} cannot be set: {reason}")


def _with_config_path(argv: list[str]) -> list[str]:
    """Puts the path of a config in the place of its name."""
    found = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, name = argument.partition("=")
        if flag in ("--config", "-config") and equals:
            found[i] = f"{flag}={config_path(name)}"
        elif flag in ("--config", "-config") and i + 1 < len(argv):
            found[i + 1] = config_path(argv[i + 1])
    return found


def no_arguments(argv: list[str], usage: str):
    """Ends the command where something that is no flag was given."""
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}: {usage}")


def check_checkpoint_and_input(argv: list[str]):
    """Ends the command unless --checkpoint and --input, and nothing else, are given."""
    no_arguments(argv, "give --checkpoint and --input")
    if None in (flags.FLAGS.checkpoint, flags.FLAGS.input):
        fail("give --checkpoint=DIR and --input=FILE")


def read_config(needs_workdir: bool = True) -> tuple[RunConfig, str | None]:
    """Returns the config and --workdir of the flags; ends the command where they are wrong."""
    chosen, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if needs_workdir and (chosen is None or workdir is None):
        fail("give both --config=NAME and --workdir=DIR, for example --config=quickstart")
    if chosen is None:
        fail("give --config=NAME, for example --config=quickstart")
    try:
        config = from_config_dict(RunConfig, chosen)
        check_rule(config.patching)
        return config, workdir
    except OSError as error:  # a missing file shows only when the config is read
        fail(f"--config cannot be read: {error}")
    except ValueError as error:
        fail(error)


def open_model():
    """Loads the model that the flags name, with a progress bar."""
    from bltjax import api
    from bltjax.checkpoints import formats  # late: JAX takes seconds

    chosen = flags.FLAGS
    given = [d for d in (chosen.checkpoint, chosen.entropy_model) if d is not None]
    bar = progress_bar("loading", sum(formats.stored_bytes(Path(d)) for d in given))
    with warnings.catch_warnings():
        warnings.showwarning = _print_note
        model = api.load(
            chosen.checkpoint,
            entropy_model=chosen.entropy_model,
            dtype=chosen.dtype,
            bf16_compat=chosen.bf16_compat,
            on_progress=bar.update,
        )
    bar.close()
    return model


def _print_note(message, *_, **__):
    print(f"note: {printable(str(message))}", file=sys.stderr)


def fail(error, code: int = USER_ERROR):
    """Ends the command with an error of one line on stderr, or a line for each of its problems."""
    told = f"error: {error}" if hasattr(error, "problems") else one_line(error)
    print(printable(told), file=sys.stderr)
    sys.exit(code)


def one_line(error) -> str:
    """Returns an error as one line of text."""
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error
    return "error: " + " ".join(str(reason).split())
