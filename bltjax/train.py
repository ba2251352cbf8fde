"""Train from a config: `python -m bltjax.train --config=configs/quickstart.py --workdir=DIR`.

Settings change on the command line, for example `--config.blt_training.steps=100`. Run the same
command again and it goes on where it stopped.
"""

import contextlib
import json
import os
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

from bltjax.command import USER_ERROR, fail, one_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and results go.")

DIVERGED = 3  # exit code: the loss became NaN or infinite


def main(argv):
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}: settings are given as --config.name=value")
    chosen, workdir = _CONFIG.value, _WORKDIR.value
    if workdir is None:
        fail("give both --config=configs/NAME.py and --workdir=DIR")
    # Imported late: --help and wrong settings answer at once, without loading JAX.
    from bltjax.config import RunConfig, from_config_dict

    try:
        config = from_config_dict(RunConfig, chosen)
    except OSError as error:  # a missing file shows only when the config is read
        fail(f"--config cannot be read: {error}")
    except ValueError as error:
        fail(error)

    from bltjax.prepare import prepare
    from bltjax.recipe import run
    from bltjax.training.checkpoint import CheckpointError
    from bltjax.training.loop import NonFiniteLoss

    try:
        prepared = prepare(config, workdir)
    except (ValueError, OSError) as error:
        fail(error)
    try:
        result = run(prepared)
    except CheckpointError as error:
        _leave(error)
    except NonFiniteLoss as error:
        fail(error, DIVERGED)
    except (ValueError, OSError) as error:
        log = prepared.workdir / "error.log"
        with contextlib.suppress(OSError):  # the disk may be what is full
            log.write_text(traceback.format_exc())
        fail(f"{error} (traceback in {log})")
    print(json.dumps(result))


def _parse(argv):
    """absl's parser, with the tracebacks of mistyped settings turned into one line."""
    try:
        remaining = flags.FLAGS(argv)
        if _CONFIG.value is None:
            fail("give both --config=configs/NAME.py and --workdir=DIR")
        return remaining
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


def _leave(error):
    """Fail at once and in silence: reads of a damaged checkpoint that go on print tracebacks."""
    sys.stdout.flush()
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(stderr, f"{one_line(error)}\n".encode())
    os._exit(USER_ERROR)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
