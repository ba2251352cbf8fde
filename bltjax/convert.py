"""Weights from any format to any: `python -m bltjax.convert --source=DIR --target=DIR --format=hf`.

The source's format is detected. The target appears when it is whole: a conversion that fails, or
is killed, leaves none.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

from absl import app, flags

from bltjax import command
from bltjax.model_config import DTYPES

FORMATS = ("bltjax", "hf", "meta")


def convert(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    entropy_model: str | Path | None = None,
    dtype: str | None = None,
    progress: bool = False,
    dry_run: bool = False,
) -> dict:
    """Write the weights in `source` as a new directory `target`, "bltjax", "hf" or "meta".

    The source is checked as a whole first, every value included. Then tensors go through block by
    block, so memory does not grow with the model. Raises WeightsError, which lists all problems
    of the source or all that the format cannot say, or OSError; the target is then not there.
    Returns what was written, and notes on it.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    # Imported late: --help and wrong flags answer at once.
    import jax

    from bltjax import formats, sharding
    from bltjax.conversion import to_torch

    started = time.perf_counter()
    writers = dict(bltjax=formats.write_bltjax, hf=to_torch.write_hf, meta=to_torch.write_meta)
    source, target = Path(source), Path(target).absolute()
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices("cpu")[:1])):
        weights = read_and_check(source, target, entropy_model, progress)
        weights = formats.cast(weights, dtype)
        report = describe(weights, format)
        if dry_run:
            list_tensors(weights, format)
        else:
            write_new(weights, target, writers[format], progress)
    seconds = round(time.perf_counter() - started, 1)
    return dict(source=str(source), target=str(target), **report, seconds=seconds)


def read_and_check(source: Path, target: Path, entropy_model, progress: bool):
    """The source's Weights; one error for everything that is wrong with it and with the target."""
    from bltjax import formats
    from bltjax.conversion.weights import WeightsError

    problems = []
    if target.exists() or target.is_symlink():
        problems.append(f"the target {target} exists: choose another, or delete it")
    paths = [Path(path) for path in (source, entropy_model) if path is not None]
    try:
        total = sum(map(formats.stored_bytes, paths))
        with watch("checking", total, progress) as advance:
            weights = formats.read(source, entropy_model, advance)
    except WeightsError as error:
        if not problems:
            raise
        problems += error.problems
    if len(problems) == 1:
        raise FileExistsError(problems[0])
    if problems:
        raise WeightsError(source, problems)
    return weights


def write_new(weights, target: Path, write, progress: bool):
    """Write into a directory that becomes `target` in the end."""
    from bltjax.files import new_directory

    with new_directory(target) as partial, watch("writing", weights.num_bytes(), progress) as seen:
        free = shutil.disk_usage(partial).free
        if free < weights.num_bytes():
            raise OSError(
                f"{target} needs {weights.num_bytes() / 1e9:.2f} GB and the disk has "
                f"{free / 1e9:.2f} GB free: make room, or choose another target"
            )
        write(weights, partial, seen)


@contextlib.contextmanager
def watch(label: str, total: int, progress: bool):
    """What to tell of bytes that are done."""
    from bltjax.progress import Progress

    if not progress:
        yield lambda num_bytes: None
        return
    bar = Progress(label, total)
    try:
        yield bar
    finally:
        bar.close()


def describe(weights, format: str) -> dict:
    from bltjax.conversion import hf_config
    from bltjax.conversion.weights import flat

    leaves = flat(weights.params).values()
    notes = list(weights.notes)
    if format == "hf" and weights.blt is not None:
        notes += hf_config.notes(weights.blt)
    return dict(
        format=format,
        models=[name for name in ("blt", "entropy_model") if name in weights.params],
        parameters=sum(math.prod(leaf.shape) for leaf in leaves),
        bytes=weights.num_bytes(),
        dtypes=sorted({leaf.dtype.name for leaf in leaves}),
        notes=list(dict.fromkeys(notes)),
    )


def list_tensors(weights, format: str):
    """What would be written, one tensor a line."""
    from bltjax.conversion.names import to_published
    from bltjax.conversion.weights import flat

    for name, params in weights.params.items():
        config = weights.blt if name == "blt" else weights.entropy_model
        tensors = to_published(config, params, format) if format != "bltjax" else flat(params)
        for path, leaf in tensors.items():
            print(f"{name:13} {path:64} {leaf.dtype.name:9} {list(leaf.shape)}")


def main(argv):
    chosen = flags.FLAGS
    if len(argv) > 1:
        command.fail(f"unexpected argument {argv[1]!r}: give --source, --target and --format")
    if None in (chosen.source, chosen.target, chosen.format):
        command.fail("give --source=DIR, --target=DIR and --format=bltjax, hf or meta")
    try:
        result = convert(
            chosen.source,
            chosen.target,
            chosen.format,
            entropy_model=chosen.entropy_model,
            dtype=chosen.dtype,
            progress=True,
            dry_run=chosen.dry_run,
        )
    except (ValueError, OSError) as error:
        command.fail(error)
    for note in result["notes"]:
        print(f"note: {note}", file=sys.stderr)
    done = "would write" if chosen.dry_run else "wrote"
    print(
        f"{done} {result['target']} in {result['format']} format: "
        f"{' and '.join(result['models'])}, {result['parameters']:,} parameters, "
        f"{result['bytes'] / 1e9:.2f} GB ({', '.join(result['dtypes'])}), {result['seconds']} s"
    )
    print(json.dumps(result))


def _define_flags():
    flags.DEFINE_string("source", None, "Weights: bltjax's, a run's, Hugging Face's or Meta's.")
    flags.DEFINE_string("target", None, "A directory that is not there yet.")
    flags.DEFINE_enum("format", None, FORMATS, "Of the target.")
    flags.DEFINE_string(
        "entropy_model", None, "A directory with the entropy model, where the source has none."
    )
    flags.DEFINE_enum("dtype", None, DTYPES, "Cast the parameters; default: as in the source.")
    flags.DEFINE_bool("dry_run", False, "Only check, and list what would be written.")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=command.parse)
