"""Computes the entropies of a corpus: `bltjax preprocess --config=NAME --workdir=DIR`.

Reads the sources of the config into records in DIR/records, computes the entropy of every byte with
the entropy model that was trained in DIR (or the one of --entropy_model), and reports the threshold
for the wanted mean patch, by source and by language. An interrupted run goes on with the next
shard; several processes share the work, and with --ray a cluster does it. `bltjax train` with the
same --config and --workdir goes on from here; other runs read the records with
--config.data.records=DIR/records. The last line is the report as JSON.
"""

import json

from absl import flags

from bltjax import cli
from bltjax.cli import fail
from bltjax.runtime.files import alone, write_json


def main(argv):
    cli.no_arguments(argv, "settings are given as --config.name=value")
    config, workdir = cli.read_config()
    # Imported late: --help and wrong settings answer at once, without loading JAX.
    import contextlib
    import dataclasses

    import jax

    from bltjax.checkpoints.demo import directory_of
    from bltjax.data import on_ray
    from bltjax.recipe import corpus
    from bltjax.recipe.checks import check_run
    from bltjax.recipe.corpus_report import corpus_report, print_report
    from bltjax.recipe.entropies import find_patches, import_entropy_model
    from bltjax.recipe.start import import_first_entropy_model

    address = flags.FLAGS.ray
    if address is not None:
        jax.config.update("jax_platforms", "cpu")  # devices are for the processes of the cluster
    try:
        trains = "entropy_model" in config.stages
        config = dataclasses.replace(config, stages=("entropies",))
        config, directory, mesh, start = check_run(config, workdir, needs_models=False)
        connected = contextlib.nullcontext() if address is None else on_ray.connect(address)
        with connected as cluster, jax.set_mesh(mesh):
            if start and not trains:
                import_first_entropy_model(config, directory, start)
            if flags.FLAGS.entropy_model is not None:
                import_entropy_model(config, directory, directory_of(flags.FLAGS.entropy_model))
            store = corpus.open_corpus(config, directory, cluster)
            patched = find_patches(config, directory, store, True, cluster)
            report = corpus_report(config, store, patched, cluster)
        with alone(store.directory):  # several processes may end at once
            write_json(store.directory / "report.json", report)
    except (ValueError, OSError) as error:
        fail(error)
    print_report(report)
    print(json.dumps(report))


def define_flags():
    cli.define_run_flags()
    cli.define_path("entropy_model", "A directory with the entropy model, in any format.")
    flags.DEFINE_string(
        "ray",
        None,
        "The Ray cluster that does the work: HOST:PORT, auto (the one on this machine) or local "
        "(one is started on this machine's cores).",
    )


if __name__ == "__main__":
    cli.run(main, define_flags)
