"""Peak memory of converting a released-size checkpoint: `python benchmarks/convert_memory.py`.

Writes a synthetic bf16 checkpoint (`--source`: Meta's layout) with the shapes of blt_1b (9.3 GB) or
blt_7b (21.3 GB; `--size=blt_7b`), converts it in a process of its own to `--format`, and compares
random pieces of the result. Needs twice that on disk below `--scratch`, and removes it.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import app, flags

from bltjax import cli, sharding
from bltjax.checkpoints import formats
from bltjax.checkpoints.weights import Weights, flat
from bltjax.config import PatchingConfig, read_config
from bltjax.model import functional

CONFIGS = Path(__file__).parents[1] / "configs"
_NOISE = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(ml_dtypes.bfloat16)


class Synthetic:
    """bf16 noise of any shape, a function of the position and the seed."""

    def __init__(self, shape, seed: int):
        self.shape, self.dtype, self.seed = tuple(shape), np.dtype(ml_dtypes.bfloat16), seed

    def __getitem__(self, index):
        starts = [s.indices(n)[0] for s, n in zip(index, self.shape, strict=True)]
        at = [np.arange(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        row = np.int64(7919 * self.seed)
        for axis in at[:-1]:
            row = row[..., None] * 31 + axis * 104729
        row = np.asarray(row) % (len(_NOISE) - self.shape[-1])
        result = np.empty([len(a) for a in at], self.dtype)
        for i in np.ndindex(row.shape):
            first = row[i] + starts[-1]
            result[i] = _NOISE[first : first + len(at[-1])]
        return result


def synthetic(name: str) -> Weights:
    run = read_config(CONFIGS / f"{name}.py")
    abstract = dict(
        blt=functional.abstract_params(run.blt),
        entropy_model=functional.abstract_params(run.entropy_model),
    )
    seeds = iter(range(10**6))
    params = jax.tree.map(lambda leaf: Synthetic(leaf.shape, next(seeds)), abstract)
    return Weights(run.blt, run.entropy_model, PatchingConfig(target_patch_bytes=None), params)


def pieces_differ(expected: dict, found: dict, count: int = 3) -> list[str]:
    """Leaves whose random pieces are not bitwise equal."""
    rng, wrong = np.random.default_rng(1), []
    for path, leaf in flat(expected).items():
        for _ in range(count):
            corner = [int(rng.integers(0, n)) for n in leaf.shape]
            index = tuple(slice(c, min(c + 40, n)) for c, n in zip(corner, leaf.shape, strict=True))
            same = np.array_equal(
                leaf[index].view(np.uint16), np.asarray(flat(found)[path][index]).view(np.uint16)
            )
            wrong += [] if same else [path]
    return wrong


def main(_):
    chosen = flags.FLAGS
    scratch = Path(tempfile.mkdtemp(dir=chosen.scratch))
    try:
        with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
            weights = synthetic(chosen.size)
            needed = 2 * weights.num_bytes()
            free = shutil.disk_usage(scratch).free
            if free < needed:
                raise SystemExit(
                    f"needs {needed / 1e9:.1f} GB below {scratch}, {free / 1e9:.1f} free"
                )
            print(f"writing {weights.num_bytes() / 1e9:.2f} GB of synthetic weights", flush=True)
            formats.plan(weights, chosen.source).write(scratch / "source")
            started = time.perf_counter()
            command = [sys.executable, "-m", "bltjax.convert", f"--source={scratch / 'source'}"]
            command += [f"--target={scratch / 'target'}", f"--format={chosen.format}"]
            subprocess.run(cli, check=True, cwd=CONFIGS.parent)
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            wrong = pieces_differ(weights.params, formats.read(scratch / "target").params)
        result = dict(
            size=chosen.size,
            source=chosen.source,
            format=chosen.format,
            gigabytes=round(weights.num_bytes() / 1e9, 2),
            peak_memory_gib=round(peak / 2**30, 3),
            seconds=round(seconds, 1),
            megabytes_per_second=round(weights.num_bytes() / 1e6 / seconds),
            leaves_that_differ=wrong,
        )
        print(json.dumps(result))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _define_flags():
    sizes = ["quickstart", "blt_1b", "blt_7b"]
    flags.DEFINE_enum("size", "blt_1b", sizes, "A file of configs/.")
    layouts = ["bltjax", "meta", "hf"]
    flags.DEFINE_enum("source", "meta", layouts, "Format of the checkpoint.")
    flags.DEFINE_enum("format", "bltjax", layouts, "Format to convert to.")
    flags.DEFINE_string("scratch", None, "Where to write; default: the system's temporary.")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=cli.parse)
