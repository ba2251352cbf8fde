"""Block sizes of attention's kernels on this TPU: `python benchmarks/splash_blocks.py`.

Times forward and backward of `ops/kernels/splash_attention.py` for each stack of a config's BLT, on
one chip, with rows of the config's length and random documents of 2,048 positions on average; the
fastest size goes into the setting `attention_block`, or into `block_size` for all. --tiny runs
short rows in Pallas's interpreter, on any machine: that tells of the script, not of speed.

A line has the medians of --repeats calls in ms, the first call left out. Prints, last,
a JSON line.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from bltjax import sharding
from bltjax.config import MeshConfig, config_path, read_config
from bltjax.ops.kernels.splash_attention import LANES, scaled, splash_attention

SIZES = (128, 256, 512, 1024, 2048)
DOCUMENT = 2048  # positions


def median_ms(function, *arguments):
    """Returns the median time of a compiled function, after a first call."""
    times = []
    for _ in range(flags.FLAGS.repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(1e3 * (time.perf_counter() - started))
    return float(np.median(times[1:]))


def measure(stack, length, dtype, block) -> dict:
    """Times attention of one row of a stack, forward alone and with the gradients."""
    rng = np.random.default_rng(0)
    heads = stack.num_heads, stack.kv_heads, stack.kv_heads
    shapes = [(1, length, number, stack.head_width) for number in heads]
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    segments = jnp.asarray(np.cumsum(rng.random((1, length)) < 1 / DOCUMENT, axis=1), jnp.int32)

    def attend(q, k, v):
        return splash_attention(scaled(q), k, v, segments, stack.window, flags.FLAGS.tiny, block)

    def total(*inputs):
        return jnp.sum(attend(*inputs).astype(jnp.float32) ** 2)

    step = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    both = median_ms(step, q, k, v)
    return dict(block=block, forward_ms=median_ms(jax.jit(attend), q, k, v), both_ms=both)


def main(_):
    config = read_config(config_path(flags.FLAGS.config))
    blt, length = config.blt, config.blt_training.row_bytes
    patches = int(length / (config.patching.target_patch_bytes or 1))
    stacks = dict(local=(blt.local_decoder, length), patches=(blt.global_transformer, patches))
    sizes = [int(size) for size in flags.FLAGS.sizes]
    if flags.FLAGS.tiny:
        stacks = {name: (stack, 2 * LANES) for name, (stack, _) in stacks.items()}
        sizes = sizes[:2]
    found = []
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        for name, (stack, length) in stacks.items():
            for block in (size for size in sizes if size <= length):
                line = dict(stack=name, length=length)
                line |= measure(stack, length, blt.compute_dtype, block)
                found.append(line)
                print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    device = jax.devices()[0].device_kind
    machine = dict(device=device, jax=jax.__version__, threads=flags.FLAGS.threads)
    print(json.dumps(dict(benchmark="splash_blocks", machine=machine, found=found)))


if __name__ == "__main__":
    flags.DEFINE_string("config", "blt_1b", "A config.")
    flags.DEFINE_list("sizes", [str(size) for size in SIZES], "Block sizes, multiples of 128.")
    flags.DEFINE_integer("repeats", 10, "Calls that are timed.", 1)
    flags.DEFINE_integer("threads", 1, "Of the host; on a TPU they change nothing.", 1)
    flags.DEFINE_bool("tiny", False, "Short rows, in Pallas's interpreter.")
    app.run(main)
