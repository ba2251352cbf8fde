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

from bltjax import command
from bltjax.command import USER_ERROR, fail, one_line

DIVERGED = 3  # exit code: the loss became NaN or infinite


def main(argv):
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}: settings are given as --config.name=value")
    config, workdir = command.read_config()
    # Imported late: --help and wrong settings answer at once, without loading JAX.
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


def _leave(error):
    """Fail at once and in silence: reads of a damaged checkpoint that go on print tracebacks."""
    sys.stdout.flush()
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(stderr, f"{one_line(error)}\n".encode())
    os._exit(USER_ERROR)


if __name__ == "__main__":
    command.define_run_flags()
    flags.adopt_module_key_flags(command)  # shown by --help
    app.run(main, flags_parser=command.parse_run)
