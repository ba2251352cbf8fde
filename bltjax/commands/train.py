"""Trains a model: `bltjax train --config=quickstart --workdir=DIR`.

Settings change on the command line, for example `--config.blt_training.steps=100`. The same command
resumes a run that was stopped or killed. Several processes that are started with it, by launch/ or
by a platform, work on one run.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from absl import flags

from bltjax import cli
from bltjax.cli import fail
from bltjax.runtime import peers, preemption, processes, signals
from bltjax.runtime.files import replacing
from bltjax.runtime.system_errors import UnwritableError, in_words

DIVERGED = 3  # exit code: the loss became NaN or infinite


def main(argv):
    cli.no_arguments(argv, "settings are given as --config.name=value")
    config, workdir = cli.read_config()
    chosen = flags.FLAGS
    with signals.leaving(peers.stop):
        preemption.watch(os.environ)
        try:
            processes.join(
                processes.find_cluster(
                    os.environ, chosen.coordinator, chosen.num_processes, chosen.process_id
                )
            )
        except ValueError as error:
            fail(error)
        with peers.ending_together():
            train(config, workdir)


def train(config, workdir):
    """Runs a config; errors that a user can mend end the command with one line."""
    # Imported late: --help and wrong settings answer at once, without loading JAX.
    import jax

    from bltjax.checkpoints.training_state import CheckpointError
    from bltjax.checkpoints.weights import WeightsError
    from bltjax.recipe.checks import check_run
    from bltjax.recipe.facts import facts
    from bltjax.recipe.next_steps import next_steps
    from bltjax.recipe.stages import run
    from bltjax.training.loop import NonFiniteLoss

    peers.agree(facts(config, workdir))
    try:
        checked = check_run(config, workdir)
        peers.check_shared(checked.directory.path)
    except ValueError as error:
        fail(error)
    try:
        result = run(checked)
    except NonFiniteLoss as error:
        fail(error, DIVERGED)
    except (CheckpointError, WeightsError, BlockingIOError) as error:
        fail(error)
    except (ValueError, OSError) as error:
        if jax.process_count() > 1:  # perhaps in this one alone: its traceback ends every log
            raise
        fail(f"{in_words(error)}{kept_traceback(checked.directory.error_log)}")
    print(next_steps(checked.directory, config.evaluation.prompt))
    print(json.dumps(result))


def kept_traceback(log: Path) -> str:
    """Writes the traceback of the error being handled; returns where it is, if that worked."""
    if isinstance(sys.exception(), UnwritableError):  # says it all
        return ""
    try:
        with replacing(log) as file:
            file.write(traceback.format_exc().encode())
    except OSError:
        return ""
    return f" (traceback in {log})"


def define_flags():
    cli.define_run_flags()
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, of several; default: what the platform says."
    )
    flags.DEFINE_integer("num_processes", None, "How many processes are this run.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")


if __name__ == "__main__":
    cli.run(main, define_flags)
