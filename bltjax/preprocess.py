"""Entropies of a corpus: `python -m bltjax.preprocess --config=configs/NAME.py --workdir=DIR`.

Reads the sources of the config into records in DIR/records, computes the entropy of every byte with
the entropy model that was trained in DIR (or is brought with --entropy_model), and reports the
threshold for the wanted mean patch, by source and by language. Interrupt it and run it again: it
goes on with the next shard. Run it several times at once: the processes share the work.
`bltjax.train` with the same --config and --workdir goes on from here; other runs read the records
with --config.data.records=DIR/records. The last line is the report as JSON.
"""

import json
from pathlib import Path

from absl import app, flags

from bltjax import command
from bltjax.command import fail


def main(argv):
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}: settings are given as --config.name=value")
    config, workdir = command.read_config()
    # Imported late: --help and wrong settings answer at once, without loading JAX.
    import dataclasses

    import jax

    from bltjax import corpus, recipe
    from bltjax.corpus_report import corpus_report, print_report
    from bltjax.prepare import prepare, write_json

    try:
        config = dataclasses.replace(config, stages=("entropies",))
        prepared = prepare(config, workdir, needs_models=False)
        with jax.set_mesh(prepared.mesh):
            if flags.FLAGS.entropy_model is not None:
                bring_entropy_model(config, prepared.workdir, Path(flags.FLAGS.entropy_model))
            store = corpus.open_corpus(config, prepared.workdir)
            result = dict(compilations={})
            patched = recipe.find_patches(config, prepared.workdir, store, result, everything=True)
        report = corpus_report(config, store, patched)
        write_json(store.directory / "report.json", report)
    except (ValueError, OSError) as error:
        fail(error)
    print_report(report)
    print(json.dumps(report))


def bring_entropy_model(config, workdir: Path, source: Path):
    """Puts the entropy model of a directory of any format in the place of a trained one.

    Raises ValueError where its settings are not those of the config, and where another model is
    there already.
    """
    from bltjax import formats, sharding
    from bltjax.config import differences, to_dict
    from bltjax.files import alone
    from bltjax.model import functional
    from bltjax.training.fingerprint import digest
    from bltjax.training.trained import WEIGHTS, entropy_params, is_trained
    from bltjax.training.weights_on_disk import save_weights

    weights = formats.read(source)
    if weights.entropy_model is None:
        raise ValueError(f"{source} has no entropy model: give a directory that has one")
    changed = differences(to_dict(weights.entropy_model), to_dict(config.entropy_model))
    if changed:
        raise ValueError(
            f"the entropy model in {source} is not that of the config "
            f"({changed[0].replace('config.', 'entropy_model.', 1)}): change the config"
        )
    params, stage = weights.params["entropy_model"], workdir / "entropy_model"
    with alone(workdir):  # other processes may bring it at once
        if not is_trained(stage):
            save_weights(stage / WEIGHTS, params)
    given = sharding.put_lazy(params, functional.abstract_params(config.entropy_model))
    if digest(given) != digest(entropy_params(config, workdir)):
        raise ValueError(
            f"{stage} holds another entropy model than {source}: leave --entropy_model out, or "
            "choose another --workdir"
        )


def _define_flags():
    command.define_run_flags()
    flags.adopt_module_key_flags(command)  # shown by --help
    flags.DEFINE_string(
        "entropy_model", None, "A directory with the entropy model, in any format that is read."
    )


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=command.parse_run)
