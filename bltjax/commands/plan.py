"""Plans memory, time and cost on a number of chips: `bltjax plan --config=NAME --chips=1024`.

Traces the training steps on an abstract mesh, so every layout is checked in seconds and without
devices. Everything is counted from types: bytes of parameters, gradients, optimizer state and batch
on each chip, and the largest array in between. A compiler keeps several of those at a time and
saves others: a plan that does not fit cannot run, one that fits probably does. The entropy model of
patching.in_step and the sum of gradients over accumulation_steps are not counted.

With --chip it also says how long the stages take and what that costs, which is arithmetic:

    bltjax plan --config=blt_1b --chips=64 --chip=h100 --bytes=1e10 --mfu=0.35 --price=2.5
"""

import json
import time

from absl import flags

from bltjax import cli
from bltjax.costs.chips import CHIPS


def main(argv):
    cli.no_arguments(argv, "give --config and --chips")
    config, _ = cli.read_config(needs_workdir=False)
    _check_flags()
    # Imported late: --help and wrong settings answer at once, without loading JAX.
    import jax

    from bltjax import sharding
    from bltjax.config import TRAINING
    from bltjax.costs.memory_plan import plan_stage, print_plan
    from bltjax.recipe.checks import used_models
    from bltjax.recipe.start import with_shapes

    result = dict(chips=flags.FLAGS.chips, stages={})
    try:
        mesh = sharding.abstract_mesh(config.mesh, flags.FLAGS.chips)
        if config.start_from:
            with jax.sharding.use_abstract_mesh(mesh):
                config = with_shapes(config)
        sharding.check_layout(config, used_models(config), mesh)
        print(f"mesh: {dict(mesh.shape)} on {flags.FLAGS.chips} chips")
        for stage in (stage for stage in TRAINING if stage in config.stages):
            started = time.perf_counter()
            plan = plan_stage(config, stage, mesh)
            print_plan(stage, plan, time.perf_counter() - started)
            result["stages"][stage] = plan._asdict() | dict(
                largest=plan.largest._asdict(), total=plan.total
            )
    except ValueError as error:
        cli.fail(error)
    if flags.FLAGS.chip is not None:
        result["time"] = _plan_time(config)
    print(json.dumps(result))


def _check_flags():
    """Ends the command where flags are missing."""
    chosen = flags.FLAGS
    if chosen.chips is None:
        cli.fail("give --chips=NUMBER")
    for name in ("bytes", "mfu", "price"):
        if chosen.chip is None and getattr(chosen, name) is not None:
            cli.fail(f"--{name}={getattr(chosen, name):g} needs --chip, for example --chip=h100")


def _plan_time(config) -> dict:
    """Prints and returns how long the stages of a config take."""
    from bltjax.costs.training_time import ASSUMED_MFU, print_summary, summary, work_of_stages

    chosen = flags.FLAGS
    work = work_of_stages(config, chosen.bytes)
    mfu = ASSUMED_MFU if chosen.mfu is None else chosen.mfu
    found = summary(work, chosen.chips, chosen.chip, mfu, chosen.price)
    print_summary(work, found, chosen.chips, assumed=chosen.mfu is None)
    return found | dict(work={name: w._asdict() for name, w in work.items()})


def define_flags():
    cli.define_run_flags()
    flags.DEFINE_integer("chips", None, "How many chips the mesh is to have.", 1)
    flags.DEFINE_enum("chip", None, sorted(CHIPS), "Which: also plans time.")
    flags.DEFINE_float(
        "bytes", None, "Of text to train on; default: what the steps of the config read.", 1
    )
    flags.DEFINE_float(
        "mfu", None, "Share of the chip's peak that a step makes use of; default: 0.3.", 0.001, 1
    )
    flags.DEFINE_float("price", None, "Of a chip-hour, in any currency.", 0)


if __name__ == "__main__":
    cli.run(main, define_flags)
