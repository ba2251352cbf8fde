"""Compiles for chips that are not there: `bltjax aot --config=NAME --topology=v5e:16x16`.

Compiles the real train step (--program=train), or of generation the loop that reads prompts
(prefill) or the one that writes bytes (decode), on the config's mesh over the topology's devices,
by libtpu or the CUDA plugin, without a TPU or GPU. Reports of each device: bytes of HBM, FLOPs that
the model needs and that the program does, bytes that collectives move, and the least time that
published peaks leave: a roofline, no measurement. Loops whose rounds the program itself decides,
such as the bytes that are generated, count once and are listed; the exchange of hash rows counts
three times, as text needs. For TPUs it adds the cycles that the compiler expects, by source file,
and which of both bounds of utilisation is the lower. The exit status is 1 where the program does
not fit.
"""

import json
import os
import sys

from absl import flags

from bltjax import cli
from bltjax.config import config_path
from bltjax.costs import compiler_errors
from bltjax.costs.compile_report import (
    REMATERIALISED,
    captured_log,
    compile_program,
    print_report,
    show_tail,
)

PROGRAMS = ("train", "prefill", "decode")
DOES_NOT_FIT = 1  # exit code
# libtpu looks for TPUs and waits for them unless told otherwise; several may compile at once.
ENVIRONMENT = dict(
    JAX_PLATFORMS="cpu",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_MIN_LOG_LEVEL="0",  # what is logged is read, and not shown
    TF_CPP_MIN_LOG_LEVEL="0",
)


def main(argv):
    cli.no_arguments(argv, "give --config and --topology")
    config, _ = cli.read_config(needs_workdir=False)
    values = flags.FLAGS
    if values.topology is None:
        cli.fail("give --topology, for example --topology=v5e:16x16")
    if values.program != "train" and values.stage != "blt":
        cli.fail(f"--program={values.program} is of the byte latent transformer: --stage=blt")
    if values.blocks and values.program != "decode":
        cli.fail(f"--blocks={values.blocks} is of generation: --program=decode")
    os.environ.update(ENVIRONMENT)  # before JAX is imported
    with captured_log() as log:
        try:
            config = shapes_of(config)
            what = (values.slices, values.stage, values.program, values.text)
            found = compile_program(
                config, values.topology, *what, rows=values.rows, blocks=values.blocks
            )
        except ValueError as error:
            cli.fail(error)
        except Exception as error:
            show_tail(log)
            from jax.errors import JaxRuntimeError

            if isinstance(error, JaxRuntimeError):
                cli.fail(compiler_errors.failure(str(error)))
            raise
        log.seek(0)
        found["rematerialization_warnings"] = log.read().count(REMATERIALISED)
    print_report(found)
    if found["rematerialization_warnings"]:
        print(f"  XLA warned of {found['rematerialization_warnings']} x {REMATERIALISED}")
    print(json.dumps(dict(config=config_path(values.config)) | found))
    sys.exit(0 if found["fits"] else DOES_NOT_FIT)


def shapes_of(config):
    """Returns the config with the shapes of the weights that it starts from."""
    import jax  # late: the environment is set before

    from bltjax import sharding
    from bltjax.recipe.start import with_shapes

    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        return with_shapes(config)


def define_flags():
    cli.define_run_flags()
    flags.DEFINE_string("topology", None, "Chips and their arrangement, such as v5e:16x16.")
    flags.DEFINE_integer("slices", 1, "How many such slices, joined by a slower network.", 1)
    flags.DEFINE_enum("stage", "blt", ["blt", "entropy_model", "token_model"], "Which model.")
    flags.DEFINE_enum("program", "train", PROGRAMS, "What is compiled.")
    flags.DEFINE_integer("rows", 1, "Texts that a device generates at once.", 1)
    flags.DEFINE_integer("blocks", 0, "Bytes of a text that are filled in together; 0: none.", 0)
    cli.define_path("text", "A file for the optimized program (HLO text).")


if __name__ == "__main__":
    cli.run(main, define_flags)
