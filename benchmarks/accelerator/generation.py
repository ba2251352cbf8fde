"""Generation with random weights beside what the memory's bandwidth allows, by number of rows."""

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from accelerator.notes import Notes
from accelerator.timing import device_bytes, seconds_of
from measuring import PATCH_BYTES, ROOT, SIZES

from bltjax.api import Model
from bltjax.checkpoints.weights import Lengths
from bltjax.config import (
    BLTConfig,
    EntropyModelConfig,
    PatchingConfig,
    TransformerConfig,
    read_config,
)
from bltjax.costs.chips import GIB, find_chip
from bltjax.model import functional
from bltjax.vocabulary import BYTE_OFFSET, encode

REPEATS = 3


class Sizes(NamedTuple):
    """Lengths of a prompt, and of a short and a long text that need caches of one size."""

    prompt: int
    short: int
    long: int


class Needed(NamedTuple):
    """Bytes that must be read from memory: for a byte, and for a call of the global stack."""

    weights: float
    row: float  # for each row besides
    global_weights: float
    global_row: float

    def bytes_a_step(self, rows: int, calls: float) -> float:
        """Returns those of a step of all rows with so many calls of the global stack."""
        shared = self.weights + calls * self.global_weights
        return shared + rows * (self.row + calls * self.global_row)


def models(tiny: bool) -> tuple[BLTConfig, EntropyModelConfig]:
    """Returns blt_1b and its entropy model."""
    if tiny:
        entropy = EntropyModelConfig(TransformerConfig(32, 1, 2, window=32))
        return dataclasses.replace(SIZES["tiny"], remat="none"), entropy
    config = read_config(str(ROOT / "configs/blt_1b.py"))
    return config.blt, config.entropy_model


class DrawnModel(Model):
    """A model whose random parameters are on the devices already."""

    def __init__(self, blt: BLTConfig, entropy_model: EntropyModelConfig):
        self.config, self.entropy_config, self.lengths = blt, entropy_model, Lengths()
        self.mesh, self.params = jax.sharding.get_mesh(), _draw(blt, entropy_model)
        self.patching = PatchingConfig(threshold=0.0)

    def calibrate(self, length: int):
        """Sets the threshold of patches of 4.5 bytes in random text; that it writes is another."""
        tokens = np.array([encode(text, add_eos=False) for text in random_texts(4, length)])
        threshold = float(np.quantile(self.entropies(tokens), 1 - 1 / PATCH_BYTES))
        self.patching = PatchingConfig(threshold=threshold)


def measure(notes: Notes, *rows: str):
    """Notes milliseconds a byte of so many rows, the bound, prefill, first call and memory."""
    sizes = Sizes(24, 240, 480) if notes.tiny else Sizes(512, 16, 256)
    model = DrawnModel(*models(notes.tiny))
    model.calibrate(4 * sizes.prompt)
    needed = needed_bytes(model.config, model.entropy_config, model.params, sizes)
    for count in map(int, rows):
        try:
            _measure_rows(notes, model, needed, sizes, count)
        except Exception as error:
            notes.failed(error, rows=count)


def _draw(blt, entropy_model) -> dict:
    """Returns random parameters in the compute dtype, as for `dtype="bfloat16"` of `load`."""

    def draw(config, seed):
        def cast(tree):
            return jax.tree.map(lambda x: x.astype(config.compute_dtype), tree)

        return jax.jit(cast, donate_argnums=0)(functional.init(config, jax.random.key(seed)))

    params = dict(blt=draw(blt, 0), entropy_model=draw(entropy_model, 1))
    output = params["blt"]["local_decoder"]["output"]
    output["weight"] = output["weight"].at[:BYTE_OFFSET].set(0)  # EOS would end a greedy text
    return params


def random_texts(count: int, length: int) -> list[bytes]:
    """Returns texts of `length` ids, BOS included."""
    rng = np.random.default_rng(0)
    return [rng.bytes(length - 1) for _ in range(count)]


def _measure_rows(notes: Notes, model: DrawnModel, needed: Needed, sizes: Sizes, rows: int):
    prompts = random_texts(rows, sizes.prompt)

    def call(new_bytes: int):
        started = time.perf_counter()
        _, counts = model.generate_and_count(prompts, new_bytes, batch_size=rows)
        return time.perf_counter() - started, counts

    first_s, _ = call(sizes.short)
    runs = {new: [call(new) for _ in range(REPEATS)] for new in (sizes.short, sizes.long)}
    # The least, since the difference of two times is wanted, and what disturbs them only adds.
    short_s, long_s = (min(seconds for seconds, _ in run) for run in runs.values())
    short, long = (run[0][1] for run in runs.values())
    steps, calls = long.steps - short.steps, long.global_calls - short.global_calls
    a_step = (long_s - short_s) / steps
    new_bytes, patches = long.new_bytes - short.new_bytes, long.patches - short.patches
    read = needed.bytes_a_step(rows, calls / steps)
    bandwidth, source = _bandwidth(notes.tiny)
    peak = device_bytes()
    notes.write(
        "generate",
        rows=rows,
        prompt=sizes.prompt,
        bytes_per_s=new_bytes / (long_s - short_s),
        ms_a_step=1e3 * a_step,
        bound_ms=1e3 * read / bandwidth,
        of_bound=read / bandwidth / a_step,
        bandwidth_gbs=bandwidth / 1e9,
        bandwidth_of=source,
        gb_a_step=read / 1e9,
        global_calls_a_step=calls / steps,
        bytes_a_patch=new_bytes / patches if patches else None,
        prefill_s=short_s - short.steps * a_step,
        first_s=first_s,
        seconds=[[seconds for seconds, _ in run] for run in runs.values()],
        peak_gib=peak and peak / GIB,
    )


def needed_bytes(blt, entropy_model, params: dict, sizes: Sizes) -> Needed:
    """Counts what a step reads at least: weights once, and keys and values of what is visible.

    params: as published. Rows of embeddings are few and left out.
    """
    encoder, decoder = params["blt"]["local_encoder"], params["blt"]["local_decoder"]
    cross = decoder["cross_attn_layers"]
    of_patches = [params["blt"]["global_transformer"], cross["wk"], cross["wv"]]
    of_patches += [decoder.get("patch_embedding_projection", {})]
    of_patches += [encoder.get("patch_embedding_projection", {})]
    of_patches += [encoder["cross_attn_layers"][name] for name in ("wq", "wo")]
    tables = encoder["tok_embeddings"], params["entropy_model"]["tok_embeddings"]
    local = _size(encoder, decoder, params["entropy_model"]) - _size(tables)
    text = sizes.prompt + sizes.long / 2
    stacks = blt.local_encoder, blt.local_decoder, entropy_model.transformer
    row = sum(_keys_and_values(stack, min(stack.window or text, text)) for stack in stacks)
    item = jnp.dtype(blt.compute_dtype).itemsize
    return Needed(
        weights=local - _size(of_patches[1:]),
        row=row * item,
        global_weights=_size(of_patches),
        global_row=_keys_and_values(blt.global_transformer, text / PATCH_BYTES) * item,
    )


def _keys_and_values(stack: TransformerConfig, positions: float) -> float:
    """Returns the entries of the keys and values of a stack."""
    return 2 * stack.num_layers * stack.kv_heads * stack.head_width * positions


def _size(*trees) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(trees))


def _bandwidth(tiny: bool) -> tuple[float, str]:
    """Returns bytes/s of the data sheet, or where there is none those of a sum, and which it is."""
    if chip := find_chip(jax.devices()[0].device_kind):
        return chip.hbm_bandwidth, "data sheet"
    x = jnp.ones(2**20 if tiny else 2**26)
    return x.nbytes / seconds_of(jax.jit(jnp.sum), x), "a sum, measured"
