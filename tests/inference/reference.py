"""Generation by recomputing the whole prefix for every byte: slow, and exact by construction.

Cached decoding must equal this reference. The buffers have a static shape and the loop runs on the
device, so there is one compilation for any prompt that fits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bltjax import sharding
from bltjax.config import BLTConfig, EntropyModelConfig, PatchingConfig
from bltjax.inference.sampling import Sampling, distribution, draw, row_keys, sampling_arrays
from bltjax.model import functional
from bltjax.patching.boundaries import needs_entropies, patch_starts
from bltjax.patching.buffers import buffers_from_starts
from bltjax.vocabulary import EOS_ID, PAD_ID, VOCAB_SIZE, decode, encode


def row_patch_starts(
    patching: PatchingConfig, entropy_config: EntropyModelConfig, entropy_params, tokens
):
    """Returns patch starts bool [B, L+1] and entropies float32 [B, L] of tokens int32 [B, L].

    Rules that need no entropies run no entropy model, and the entropies are then None.
    """
    if not needs_entropies(patching):
        return patch_starts(patching, tokens), None
    entropies = functional.entropies(
        entropy_config, entropy_params, tokens, patching.reset_at_newlines
    )
    return patch_starts(patching, tokens, entropies), entropies


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    config, entropy_config, patching, params, entropy_params, tokens, length, stop, sampling, seed
):
    """Continues tokens int32 [L], filled to `length`, to EOS or `stop`; returns the length too."""

    def next_logits(tokens, length):
        rows = sharding.one_per_shard(tokens)
        starts, _ = row_patch_starts(patching, entropy_config, entropy_params, rows)
        patches = buffers_from_starts(starts, tokens.size + 1)
        logits = sharding.first_row(functional.apply(config, params, rows, patches))
        return jax.lax.dynamic_index_in_dim(logits, length - 1, keepdims=False)

    def unfinished(carry):
        tokens, length = carry
        return (length < stop) & (tokens[length - 1] != EOS_ID)

    def add_byte(carry):
        tokens, length = carry
        logits = next_logits(tokens, length)[None, :VOCAB_SIZE]
        seen = jnp.zeros_like(logits, bool)
        log_p = distribution(logits, sampling, seen, ~seen)
        keys = row_keys(seed, length[None], *(jnp.zeros(1, jnp.int32),) * 2)  # as plain decoding
        return tokens.at[length].set(draw(log_p, keys)[0]), length + 1

    return jax.lax.while_loop(unfinished, add_byte, (tokens, length))


def generate_by_recompute(
    config: BLTConfig,
    params,
    entropy_config: EntropyModelConfig | None,
    entropy_params,
    patching: PatchingConfig,
    prompt: bytes | str,
    *,
    max_new_bytes: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> bytes:
    """Returns the continuation of one prompt, ended by EOS or after `max_new_bytes`.

    temperature 0 is greedy. Patches are found afresh for every byte with `patching`; its threshold
    must be the one the model was trained with.
    """
    ids = encode(prompt, add_eos=False)
    stop = len(ids) + max_new_bytes
    # A few lengths of the buffer, so that few are compiled; what is not reached changes nothing.
    tokens = np.full(-(-stop // 64) * 64, PAD_ID, np.int32)
    tokens[: len(ids)] = ids
    tokens, length = _generate(
        config,
        entropy_config,
        patching,
        params,
        entropy_params,
        tokens,
        len(ids),
        stop,
        sampling_arrays([Sampling(temperature=temperature)]),
        jnp.full(1, seed, jnp.uint32),
    )
    return decode(np.asarray(tokens)[len(ids) : int(length)])
