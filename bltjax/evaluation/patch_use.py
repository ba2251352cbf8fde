"""Measures how much a model uses its patches (docs/evaluation.md#patch-use).

The bits per byte more that it needs where the latents, the states [B, P, G] of patches that enter
the local decoder, are others than its own. Whatever the encoder's byte states tell stays the same.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bltjax import sharding
from bltjax.config import BLTConfig
from bltjax.data.batches.loader import whole_batches
from bltjax.data.batches.packing import pack_patches
from bltjax.data.batches.rows import Row
from bltjax.evaluation.bits_per_byte import sum_up
from bltjax.evaluation.score import BLTScoring, check_row, fitting_length, rows_at_once
from bltjax.model import functional
from bltjax.ops.pooling import take_patches
from bltjax.patching.buffers import PatchBuffers, buffers_from_lengths
from bltjax.training.loss import loss_sums
from bltjax.vocabulary import as_list

DISTURBED = dict(  # in the order of `disturbed_latents`
    zeroed="zeroed",
    another_row="of another row",
    one_late="one patch late",
    no_global_blocks="without the global blocks",
)


def make_patch_use_step(config: BLTConfig, find_patches=None):
    """Returns the jitted (params, batch) -> dict of `byte_nats` and `bytes`, float32 [5].

    First those of the model as it is, then those of each kind of DISTURBED. With `find_patches`,
    from `make_patch_finder`, it is (params, batch, entropy_params).
    """

    def step(params, batch, entropy_params=None):
        tokens, document_ids = sharding.shard_rows((batch["tokens"], batch["document_ids"]))
        if find_patches:
            patches = find_patches(entropy_params, tokens, document_ids)
        else:
            patches = buffers_from_lengths(batch["patch_lengths"], tokens.shape[1])
        # The logits of this pass are not used, and so its decoder is not compiled.
        found = functional.intermediates(config, params, tokens, patches, document_ids)
        unmixed = functional.without_global_blocks(config, params, found["patch_states"])

        def sums(latents):
            rows = found["byte_states"], latents, patches, document_ids
            logits = functional.decode(config, params, *rows)
            counted = loss_sums(logits, batch["targets"], batch["loss_mask"])
            return {name: counted[name] for name in ("byte_nats", "bytes")}

        latents = found["global_states"]
        variants = [latents, *disturbed_latents(latents, unmixed, patches)]
        return jax.lax.map(sums, jnp.stack(variants))  # one after the other: compiled once

    return jax.jit(step)


def disturbed_latents(latents, unmixed, patches: PatchBuffers) -> list[jax.Array]:
    """Returns latents [B, P, G] disturbed in each of the ways of DISTURBED.

    unmixed: [B, P, G], what the first block of the global transformer reads.
    """
    nothing = jnp.zeros_like(latents[:, :1])
    return [
        jnp.zeros_like(latents),
        latents_of_row_before(latents, patches),
        jnp.concatenate([nothing, latents[:, :-1]], axis=1),
        unmixed.astype(latents.dtype),
    ]


def latents_of_row_before(latents, patches: PatchBuffers) -> jax.Array:
    """Returns the latents [B, P, G] that patches of the same number have in the row before.

    Where that row has fewer, its first patches follow its last. The tail counts as none: no byte
    reads it.
    """
    used = jnp.maximum(jnp.sum(patches.mask, axis=1) - 1, 1)
    columns = jnp.arange(latents.shape[1])[None] % sharding.rows_before(used)[:, None]
    return take_patches(sharding.rows_before(latents), columns)


def patch_use(step, params, rows: Sequence[Row], batch_size: int, *frozen) -> dict:
    """Returns the bits per byte more of each kind of DISTURBED, over a sample of rows.

    `another_row` is None of a single row. Beside them `bits_per_byte` of the model as it is, and
    `bytes` of the sample. step: of `make_patch_use_step`.
    """
    batch_size = max(batch_size, 2)
    # A row alone in its batch would be its own row before.
    rows = rows[:-1] if len(rows) > 1 and len(rows) % batch_size == 1 else rows
    sums = sum_up(step, params, whole_batches(iter(rows), batch_size), *frozen)
    bits = sums["byte_nats"] / np.maximum(sums["bytes"], 1) / math.log(2)
    result: dict = dict(zip(DISTURBED, (bits[1:] - bits[0]).tolist(), strict=True))
    if len(rows) < 2:
        result["another_row"] = None
    return result | dict(bits_per_byte=float(bits[0]), bytes=int(sums["bytes"][0]))


def patch_use_of_documents(
    model: BLTScoring, documents: Iterable[bytes | str], num_rows: int, row_bytes: int
) -> dict:
    """Returns `patch_use` over the first rows of documents, which they fill one after the other.

    Raises ValueError where there is no document or no row.
    """
    check_row(row_bytes)
    ids = [model.encode(document) for document in as_list("documents", documents)]
    if not ids or num_rows < 1:
        raise ValueError(f"{num_rows} rows of {len(ids)} documents: give at least one of both")
    length = fitting_length(sum(map(len, ids)) + 1, row_bytes)  # + 1: patches cover one more
    pairs = zip(ids, model.find_starts(ids), strict=True)
    rows = list(itertools.islice(pack_patches(pairs, length, length), num_rows))
    columns = max(np.count_nonzero(row.patch_lengths) for row in rows)
    rows = [row._replace(patch_lengths=row.patch_lengths[:columns]) for row in rows]
    return patch_use(_step(model.config), model.params, rows, rows_at_once(length))


_step = functools.lru_cache(make_patch_use_step)  # one per model, so that it is compiled once


def told(use: dict) -> str:
    """Returns a line on the result of `patch_use`."""
    more = ", ".join(
        f"{use[name]:.4f} {words}" for name, words in DISTURBED.items() if use[name] is not None
    )
    return f"patch use: bits per byte more with latents {more}; over {use['bytes']} bytes"
