"""Converts weights from any known format to any other."""

import math
import os
import shutil
import time
from pathlib import Path

from bltjax.checkpoints.checksums import write_checksums
from bltjax.checkpoints.demo import directory_of, existing
from bltjax.runtime import buckets
from bltjax.runtime.files import new_directory, refuse_existing
from bltjax.runtime.paths import absolute, is_remote
from bltjax.runtime.plain_files import reason
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.system_errors import is_of_disk, unwritable

FORMATS = ("bltjax", "hf", "meta", "peft")  # the last: adapters alone


def convert(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    entropy_model: str | Path | None = None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    progress: bool = False,
    dry_run: bool = False,
) -> dict:
    """Writes the weights in `source` to a new directory `target` in `format`, one of FORMATS.

    adapter: a directory with one, which is added to the matrices.

    The whole source is checked first, every value included. Then tensors are copied block by block,
    so memory does not grow with the model, and checksums.json is written. Raises WeightsError,
    which lists all problems of the source or all that the format cannot express, ValueError, or
    OSError; the target then does not exist. dry_run: only checks, and returns the tensors that
    would be written. Returns a summary for JSON, with a note on all that had to be assumed.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    started = time.perf_counter()
    sources = [existing(directory_of(p)) for p in (source, entropy_model) if p is not None]
    target = absolute(target)
    # Imported late: --help, wrong flags and paths answer at once.
    import jax

    from bltjax import sharding
    from bltjax.checkpoints import formats
    from bltjax.checkpoints.lazy_arrays import num_bytes
    from bltjax.checkpoints.weights import flat

    formats.check_dtype(dtype)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        weights = read_and_check(sources, target, progress, adapter and directory_of(adapter))
        weights = formats.cast(weights, dtype)
        plan = formats.plan(weights, format)
        notes = [*weights.notes, *plan.notes, *formats.left_behind(sources[0])]
        if not dry_run:
            write_new(plan, target, weights.num_bytes(), progress)
    models, leaves = list(weights.params), list(flat(weights.params).values())
    if format == "peft":  # adapters of a BLT alone
        models, leaves = ["blt"], list(plan.tensors.values())
    return dict(
        source=str(source),
        target=str(target),
        format=format,
        models=[name for name in ("blt", "entropy_model") if name in models],
        parameters=sum(math.prod(leaf.shape) for leaf in leaves),
        bytes=sum(map(num_bytes, leaves)),
        dtypes=sorted({leaf.dtype.name for leaf in leaves}),
        notes=list(dict.fromkeys(notes)),
        seconds=round(time.perf_counter() - started, 1),
        **(dict(tensors=tensors_of(plan)) if dry_run else {}),
    )


def read_and_check(sources: list[Path], target: Path, progress: bool, adapter: Path | None):
    """Reads the source, and the directory of its entropy model if there is a second one.

    Raises one error for all problems with them and with the target. Where something is wrong with
    the target, which is known at once, no value of the source is read.
    """
    from bltjax.checkpoints import formats
    from bltjax.checkpoints.weights import WeightsError

    wrong = target_error(target, sources)
    try:
        total = sum(map(formats.stored_bytes, sources))
        with progress_bar("checking", total, shown=progress) as bar:
            weights = formats.read(
                *sources, on_progress=bar.update, adapter=adapter, values=wrong is None
            )
    except WeightsError as error:
        if wrong is None:
            raise
        raise WeightsError(sources[0], [str(wrong), *error.problems]) from error
    if wrong is not None:
        raise wrong
    return weights


def target_error(target: Path, sources: list[Path]) -> Exception | None:
    """Returns what is wrong with a place for a new directory, None where nothing is seen yet."""
    try:
        place = _resolved(target)
        for source in map(_resolved, sources):
            if place == source:
                return FileExistsError(f"the target {target} is the source: choose another")
            if source in place.parents:
                return ValueError(f"the target {target} is inside of {source}: choose another")
        refuse_existing(target)
        if is_remote(target):
            return None
        parent = next(parent for parent in target.parents if parent.exists())
        if not parent.is_dir():
            return NotADirectoryError(f"{parent} is a file, so {target} cannot be: choose another")
        if not os.access(parent, os.W_OK | os.X_OK):
            return PermissionError(f"{parent} is not writable: choose another target")
    except (FileExistsError, buckets.Unreachable) as error:
        return error
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
        return OSError(f"the target {target} cannot be ({reason(error)}): choose another")
    return None


def _resolved(path: Path) -> Path:
    return path if is_remote(path) else path.resolve()


def write_new(plan, target: Path, num_bytes: int, progress: bool):
    """Writes a directory that appears as `target` once it is complete."""
    bar = progress_bar("writing", 2 * num_bytes, shown=progress)  # then read for the checksums
    try:
        with new_directory(target) as partial, bar:
            free = shutil.disk_usage(partial).free
            if free < num_bytes:
                raise OSError(
                    f"{target} needs {num_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB "
                    "free: make room, or choose another target"
                )
            plan.write(partial, bar.update)
            for name in plan.inside:
                write_checksums(partial / name)
            write_checksums(partial, bar.update)
    except (OSError, ValueError, RuntimeError) as error:  # Orbax may wrap those of the disk
        cause = error.__cause__ or error
        said = isinstance(cause, OSError) and cause.errno is None  # in our words already
        if said or not is_of_disk(cause):
            raise
        raise unwritable(target, cause) from error


def tensors_of(plan, directory: str = "") -> dict[str, str]:
    """Returns dtype and shape of each tensor that a plan writes, by directory and name."""
    found = {
        directory + name: f"{tensor.dtype.name} {list(tensor.shape)}"
        for name, tensor in plan.tensors.items()
    }
    for name, inside in plan.inside.items():
        found |= tensors_of(inside, f"{directory}{name}/")
    return found
