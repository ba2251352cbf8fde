"""What commands share: errors in one line, a model from a directory, text for a terminal."""

import sys
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from bltjax.config.model import DTYPES
from bltjax.runtime.progress import Progress

USER_ERROR = 2  # exit code: the command or what it names is at fault


def define_model_flags():
    """--checkpoint, --entropy_model and --dtype, what `open_model` takes.

    Called by a command that is run, so that two of them can be imported side by side.
    """
    flags.DEFINE_string("checkpoint", None, "A directory of weights, or of a training run.")
    flags.DEFINE_string(
        "entropy_model", None, "A directory with the entropy model, where the checkpoint has none."
    )
    flags.DEFINE_enum("dtype", None, DTYPES, "Of the parameters; default: as they are stored.")
    flags.DEFINE_bool("bf16_compat", False, "Find patches as the published demo does.")


def parse(argv):
    """absl's parser, with one line for a flag that is unknown or has a wrong value."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of devices that are not there
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(error)


def check_checkpoint_and_input(argv):
    """Ends the command unless --checkpoint and --input, and nothing else, say what it works on."""
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}: give --checkpoint and --input")
    if None in (flags.FLAGS.checkpoint, flags.FLAGS.input):
        fail("give --checkpoint=DIR and --input=FILE")


def define_run_flags():
    """--config and --workdir, what `read_config` takes."""
    config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where records, checkpoints, metrics and results go.")


def parse_run(argv):
    """absl's parser, with the tracebacks of mistyped settings turned into one line."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of devices that are not there
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(error)
    except OSError as error:
        fail(f"--config cannot be read: {error}")
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        reason = (
            str(error.args[0] if error.args else error)
            .strip("'\"")
            .replace("\\n", " ")
            .replace("\\", "")
        )
        wrong = [a for a in argv if a.startswith("--config.") and _last_name(a) in reason]
        fail(f"{wrong[0] if wrong else 'settings'} cannot be set: {reason}")


def _last_name(argument: str) -> str:
    return argument.split("=")[0].split(".")[-1]


def read_config(needs_workdir: bool = True):
    """(RunConfig, workdir) of the flags; ends the command with one line where they are wrong."""
    chosen, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if needs_workdir and (chosen is None or workdir is None):
        fail("give both --config=configs/NAME.py and --workdir=DIR")
    if chosen is None:
        fail("give --config=configs/NAME.py")
    from bltjax.config import RunConfig, from_config_dict

    try:
        return from_config_dict(RunConfig, chosen), workdir
    except OSError as error:  # a missing file shows only when the config is read
        fail(f"--config cannot be read: {error}")
    except ValueError as error:
        fail(error)


def open_model():
    """The model that the flags name."""
    from bltjax import api
    from bltjax.checkpoints import formats  # late: JAX takes seconds

    chosen = flags.FLAGS
    given = [d for d in (chosen.checkpoint, chosen.entropy_model) if d is not None]
    progress = Progress("loading", sum(formats.stored_bytes(Path(d)) for d in given))
    model = api.load(
        chosen.checkpoint,
        entropy_model=chosen.entropy_model,
        dtype=chosen.dtype,
        bf16_compat=chosen.bf16_compat,
        advance=progress,
    )
    progress.close()
    return model


def fail(error, code: int = USER_ERROR):
    """Ends the command with an error of one line on stderr, or a line for each of its problems."""
    print(f"error: {error}" if hasattr(error, "problems") else one_line(error), file=sys.stderr)
    sys.exit(code)


def one_line(error) -> str:
    """What a command says of an error."""
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error
    return "error: " + " ".join(str(reason).split())
