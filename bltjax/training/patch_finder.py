"""Finds patches inside the training step, by a frozen entropy model, from rows of raw bytes.

A row holds several documents, and each is patched as if it stood alone: its first two positions
start patches whatever the rule, and neither entropies nor patches look at the document before it.
Whole documents get the same buffers as from stored entropies and `data/batches/packing.py`. But
rows are filled without regard to patches, so a row may have more of them than columns (`overflow`).
"""

import jax
import jax.numpy as jnp

from bltjax import sharding
from bltjax.config import EntropyModelConfig, PatchingConfig
from bltjax.model import functional
from bltjax.patching.boundaries import WITHOUT_ENTROPIES, needs_entropies
from bltjax.patching.buffers import PatchBuffers, buffers_from_starts
from bltjax.patching.packed_rows import Array, row_starts
from bltjax.vocabulary import PAD_ID


def make_patch_finder(
    patching: PatchingConfig, entropy_config: EntropyModelConfig | None, num_patches: int
):
    """Returns (entropy_params, tokens, document_ids) -> PatchBuffers of `num_patches` columns.

    tokens, document_ids: int32 [B, L]. Rules that need no entropies run no model, and take None for
    its config and parameters. No gradient reaches the parameters. Raises ValueError at once for an
    entropy rule without a model.
    """
    has_model = needs_entropies(patching)
    if has_model and entropy_config is None:
        raise ValueError(
            f"patching rule {patching.rule!r} needs an entropy model in the step: give its config, "
            f"or choose one of the rules {WITHOUT_ENTROPIES}"
        )

    def find_patches(entropy_params, tokens: Array, document_ids: Array) -> PatchBuffers:
        tokens, document_ids = sharding.shard_rows((tokens, document_ids))
        entropies = None
        if has_model:
            frozen = jax.lax.stop_gradient(entropy_params)
            entropies = functional.entropies(
                entropy_config, frozen, tokens, patching.reset_at_newlines, document_ids
            )
        starts = row_starts(patching, tokens, entropies, document_ids)
        return buffers_from_starts(starts, num_patches)

    return find_patches


def patch_counts(tokens: Array, patches: PatchBuffers) -> dict[str, Array]:
    """Sums over a batch, float32: patches, inputs (bytes), columns and patches that did not fit.

    The mean patch has inputs / patches bytes. tokens int32 [B, L]; the tail of a row is no patch.
    """
    overflow = jnp.sum(patches.overflow, dtype=jnp.float32)
    used = jnp.sum(patches.mask, dtype=jnp.float32)
    return dict(
        overflow=overflow,
        patches=used + overflow - len(tokens),
        patch_slots=jnp.float32(patches.mask.size),
        inputs=jnp.sum(tokens != PAD_ID, dtype=jnp.float32),
    )
