"""Plans memory on a number of chips: `bltjax plan --config=NAME --chips=1024`.

Traces the training steps on an abstract mesh, so every layout is checked in seconds and without
devices. Everything is counted from types: bytes of parameters, gradients, optimizer state and batch
on each chip, and the largest array in between. A compiler keeps several of those at a time and
saves others: a plan that does not fit cannot run, one that fits probably does. The entropy model of
patching.in_step and the sum of gradients over accumulation_steps are not counted.
"""

import json
import time

from absl import flags

from bltjax import cli


def main(argv):
    cli.no_arguments(argv, "give --config and --chips")
    config, _ = cli.read_config(needs_workdir=False)
    if flags.FLAGS.chips is None:
        cli.fail("give --chips=NUMBER")
    # Imported late: --help and wrong settings answer at once, without loading JAX.
    from bltjax import sharding
    from bltjax.config import TRAINING
    from bltjax.costs.memory_plan import plan_stage, print_plan
    from bltjax.recipe.checks import used_models

    result = dict(chips=flags.FLAGS.chips, stages={})
    try:
        mesh = sharding.abstract_mesh(config.mesh, flags.FLAGS.chips)
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
    print(json.dumps(result))


def define_flags():
    cli.define_run_flags()
    flags.DEFINE_integer("chips", None, "How many chips the mesh is to have.", 1)


if __name__ == "__main__":
    cli.run(main, define_flags)
