"""What a run would take on so many chips: `python -m bltjax.plan --config=FILE --chips=1024`.

The training steps are traced on an abstract mesh, so every layout is checked in seconds and no
device is needed. What is printed is counted from types: bytes of parameters, gradients, optimizer
state and batch on each chip, and the largest array in between. A compiler keeps several of those at
a time and saves others, so a plan that does not fit is sure, and one that does is likely. Left out
are the entropy model of patching.in_step and the sum of gradients over accumulation_steps.
"""

import json
import time

from absl import app, flags

from bltjax import cli
from bltjax.costs.memory_plan import plan_stage, print_plan


def main(argv):
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}: give --config and --chips")
    config, _ = cli.read_config(needs_workdir=False)
    if flags.FLAGS.chips is None:
        cli.fail("give --chips=NUMBER")
    from bltjax import sharding
    from bltjax.recipe.checks import used_models
    from bltjax.sharding import check_batch_sizes, check_hash_updates

    result = dict(chips=flags.FLAGS.chips, stages={})
    try:
        mesh = sharding.abstract_mesh(config.mesh, flags.FLAGS.chips)
        check_batch_sizes(config, mesh)
        check_hash_updates(config, mesh)
        for name in used_models(config):
            sharding.check_model(getattr(config, name), name, mesh)
        print(f"mesh: {dict(mesh.shape)} on {flags.FLAGS.chips} chips")
        for stage in ("entropy_model", "token_model", "blt"):
            if stage not in config.stages:
                continue
            started = time.perf_counter()
            plan = plan_stage(config, stage, mesh)
            print_plan(stage, plan, time.perf_counter() - started)
            result["stages"][stage] = plan._asdict() | dict(
                largest=plan.largest._asdict(), total=plan.total
            )
    except ValueError as error:
        cli.fail(error)
    print(json.dumps(result))


def _define_flags():
    cli.define_run_flags()
    flags.adopt_module_key_flags(cli)  # shown by --help
    flags.DEFINE_integer("chips", None, "How many chips the mesh is to have.", 1)


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=cli.parse_run)
