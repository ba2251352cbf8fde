"""Converts weights from any known format to any other."""

import math
import os
import shutil
import time
from pathlib import Path

from bltjax.runtime.files import new_directory
from bltjax.runtime.progress import progress_bar

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
    """Writes the weights in `source` to a new directory `target` in `format`, one of FORMATS.

    The whole source is checked first, every value included. Then tensors are copied block by block,
    so memory does not grow with the model. Raises WeightsError, which lists all problems of the
    source or all that the format cannot express, or OSError; the target then does not exist.
    dry_run: only checks, and returns the tensors that would be written. Returns a summary for JSON.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    # Imported late: --help and wrong flags answer at once.
    import jax

    from bltjax import sharding
    from bltjax.checkpoints import formats
    from bltjax.checkpoints.weights import flat

    started = time.perf_counter()
    source = Path(os.path.expanduser(source))
    target = Path(os.path.expanduser(target)).absolute()
    entropy_model = entropy_model and os.path.expanduser(entropy_model)
    formats.check_dtype(dtype)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        weights = read_and_check(source, target, entropy_model, progress)
        weights = formats.cast(weights, dtype)
        plan = formats.plan(weights, format)
        if not dry_run:
            write_new(plan, target, weights.num_bytes(), progress)
    leaves = flat(weights.params).values()
    return dict(
        source=str(source),
        target=str(target),
        format=format,
        models=[name for name in ("blt", "entropy_model") if name in weights.params],
        parameters=sum(math.prod(leaf.shape) for leaf in leaves),
        bytes=weights.num_bytes(),
        dtypes=sorted({leaf.dtype.name for leaf in leaves}),
        notes=list(dict.fromkeys([*weights.notes, *plan.notes])),
        seconds=round(time.perf_counter() - started, 1),
        **(dict(tensors=tensors_of(plan)) if dry_run else {}),
    )


def read_and_check(source: Path, target: Path, entropy_model, progress: bool):
    """Reads the source. Raises one error for all problems with it and with the target."""
    from bltjax.checkpoints import formats
    from bltjax.checkpoints.weights import WeightsError

    problems = []
    if target.exists() or target.is_symlink():
        problems.append(f"the target {target} exists: choose another, or delete it")
    paths = [Path(path) for path in (source, entropy_model) if path is not None]
    try:
        total = sum(map(formats.stored_bytes, paths))
        with progress_bar("checking", total, shown=progress) as bar:
            weights = formats.read(source, entropy_model, bar.update)
    except WeightsError as error:
        if not problems:
            raise
        raise WeightsError(source, [*problems, *error.problems]) from error
    if problems:
        raise FileExistsError(problems[0])
    return weights


def write_new(plan, target: Path, num_bytes: int, progress: bool):
    """Writes a directory that appears as `target` once it is complete."""
    bar = progress_bar("writing", num_bytes, shown=progress)
    with new_directory(target) as partial, bar:
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise OSError(
                f"{target} needs {num_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB "
                "free: make room, or choose another target"
            )
        plan.write(partial, bar.update)


def tensors_of(plan, directory: str = "") -> dict[str, str]:
    """Returns dtype and shape of each tensor that a plan writes, by directory and name."""
    found = {
        directory + name: f"{tensor.dtype.name} {list(tensor.shape)}"
        for name, tensor in plan.tensors.items()
    }
    for name, inside in plan.inside.items():
        found |= tensors_of(inside, f"{directory}{name}/")
    return found
