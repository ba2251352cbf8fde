"""Everything that the commands share: flags, configs, opening a model, errors of one line.

`bltjax COMMAND ...` is `python -m bltjax.COMMAND ...`; a command is a file of `bltjax/commands/`.
"""

import ast
import contextlib
import os
import re
import runpy
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from absl import app, flags, logging

from bltjax.checkpoints.demo import directory_of, existing
from bltjax.config import DTYPES, RunConfig
from bltjax.config import read_config as read_config_file
from bltjax.config.command_line import take_settings
from bltjax.config.data import FILE_KINDS
from bltjax.config.names import letters, settings, unknown
from bltjax.patching.boundaries import check_rule
from bltjax.runtime import endings, signals
from bltjax.runtime.platforms import skip_absent_tpu
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.system_errors import first_line, in_words, is_of_network, without_numbers
from bltjax.runtime.terminal import printable

flags.disclaim_key_flags()  # --help of a command shows the flags that are defined here for it
# What Python says of flags that are no numbers, and what that means.
NO_INTEGER = r"invalid literal for int\(\).*", "must be a whole number"
NO_FLOAT = r"could not convert string to float.*", "must be a number"
USER_ERROR = 2  # exit code: the command or what it names is at fault
COMMANDS = Path(__file__).parent / "commands"

_settings: dict = {}  # those of the command line, from `parse` to `read_config`


def main():
    """Runs the console script `bltjax`."""
    with ending():
        _run_named(sys.argv[1] if len(sys.argv) > 1 else "--help")


def _run_named(name: str):
    commands = {path.stem: path for path in sorted(COMMANDS.glob("[!_]*.py"))}
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
    with ending():
        define_flags()
        if hasattr(sys.stdout, "reconfigure"):  # what an encoding such as ASCII lacks is escaped
            sys.stdout.reconfigure(errors="backslashreplace")
        warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"
        skip_absent_tpu(os.environ)
        app.run(command, flags_parser=parse)


@contextlib.contextmanager
def ending():
    """Ends a command that is interrupted, or that a file or its output fails, with one line."""
    endings.install()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except signals.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(signals.STOPPED)
    except KeyboardInterrupt:
        signals.end_command(signal.SIGINT)
    except OSError as error:
        fail(error)
    except Exception as error:
        if not is_of_network(error):
            raise
        fail(f"a bucket cannot be reached ({first_line(error)}): check the network, run it again")


def define_path(name: str, meaning: str):
    """Defines a flag for a path, in which ~ is the home directory."""
    flags.DEFINE(_PathParser(), name, None, meaning, serializer=flags.ArgumentSerializer())


class _PathParser(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def define_model_flags():
    """Defines --checkpoint, --entropy_model, --adapter, --dtype and --bf16_compat."""
    define_path(
        "checkpoint",
        "A directory of weights or of a training run, or demo, a model in the package.",
    )
    define_path("entropy_model", "A directory with the entropy model, if the checkpoint has none.")
    define_path("adapter", "A directory with a low-rank adapter, added to the matrices.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Of the parameters; default: as they are stored.")
    flags.DEFINE_bool("bf16_compat", False, "Find patches as the published demo does.")


def define_sampling_flags():
    """Defines --temperature, --top_k, --top_p, --min_p, --repetition_penalty and --seed."""
    flags.DEFINE_float("temperature", 0.0, "0: always the most probable byte.", 0)
    flags.DEFINE_integer("top_k", None, "Draw from the k most probable bytes.", 1)
    flags.DEFINE_float(
        "top_p", None, "Draw from the most probable bytes of this probability.", 0, 1
    )
    flags.DEFINE_float(
        "min_p", None, "Draw from bytes of this share of the best's probability.", 0, 1
    )
    flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: bytes that occurred become rarer.")
    flags.DEFINE_integer("seed", 0, "Of what is drawn.")


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
    flags.DEFINE_string(
        "config",
        None,
        "The name of a config, such as quickstart, or a file. --config.NAME=VALUE changes a "
        "setting of it; `bltjax settings` lists them.",
    )
    define_path("workdir", "Where records, checkpoints, metrics and results go.")


def parse(argv: list[str]) -> list[str]:
    """Parses flags; ends the command with one line for a flag or setting that is wrong."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of devices that are not there
    try:
        if "config" in flags.FLAGS:
            argv, found = take_settings(argv)
            _settings.update(found)
        return flags.FLAGS(argv)
    except SystemExit:  # after --help, which ends with 1 in absl
        sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        others = "" if "Did you mean" in str(error) else ": --help lists the flags"
        fail(f"{error}{_meant_setting(error.flagname) or others}")
    except (flags.Error, ValueError) as error:
        fail(re.sub(*NO_FLOAT, re.sub(*NO_INTEGER, str(error))))


def _meant_setting(flag: str) -> str:
    """Returns a question after the setting that an unknown flag might be, or nothing."""
    if "config" not in flags.FLAGS:
        return ""
    leaves = {name.rpartition(".")[2] for name in settings()}
    if not ("." in flag or flag in leaves):
        return ""
    first, _, rest = flag.partition(".")
    typed = rest if letters(first.lower(), "config") <= 2 else flag
    if typed in settings():
        return f": did you mean --config.{typed}?"
    return f": {unknown(typed, '--config.')}"


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
        config = read_config_file(chosen, _settings)
        check_rule(config.patching)
        return config, workdir
    except OSError as error:
        fail(f"--config cannot be read: {in_words(error)}")
    except ValueError as error:
        fail(error)


def given_settings() -> dict:
    """Returns the settings --config.NAME=VALUE of the command line, by name."""
    return dict(_settings)


def model_directories() -> list[Path]:
    """Returns the directories of --checkpoint and --entropy_model. Raises OSError for none."""
    given = flags.FLAGS.checkpoint, flags.FLAGS.entropy_model
    return [existing(directory_of(path)) for path in given if path is not None]


def open_model():
    """Loads the model that the flags name, with a progress bar."""
    given = model_directories()
    from bltjax import api
    from bltjax.checkpoints import formats  # late: JAX takes seconds

    chosen = flags.FLAGS
    bar = progress_bar("loading", sum(map(formats.stored_bytes, given)))
    with warnings.catch_warnings():
        warnings.showwarning = _print_note
        model = api.load(
            chosen.checkpoint,
            entropy_model=chosen.entropy_model,
            adapter=chosen.adapter,
            dtype=chosen.dtype,
            bf16_compat=chosen.bf16_compat,
            on_progress=bar.update,
        )
    bar.close()
    if sys.stderr.isatty():  # else nobody waits
        print("the first text takes longest: the model is compiled for it", file=sys.stderr)
    return model


def _print_note(message, *_, **__):
    print(f"note: {printable(str(message))}", file=sys.stderr)


def fail(error, code: int = USER_ERROR):
    """Ends the command with an error of one line on stderr, or a line for each of its problems."""
    many = f"error: {without_numbers(str(error))}" if hasattr(error, "problems") else None
    print(printable(many or one_line(error)), file=sys.stderr)
    sys.exit(code)


def one_line(error) -> str:
    """Returns an error as one line of text."""
    reason = in_words(error) if isinstance(error, BaseException) else without_numbers(str(error))
    if isinstance(error, KeyError) and error.args:
        reason = str(error.args[0])  # without the quotes of a key
    return "error: " + " ".join(reason.split())


if __name__ == "__main__":
    main()
