"""Byte embeddings and the hash n-gram embeddings added to them (spec 4, 5.6)."""

import jax.numpy as jnp

from bltjax.ops.hashing import ngram_hash_ids


def embed_bytes(tokens, byte_embedding, hash_tables, config, ngrams=None, before=None):
    """Byte row plus the plain sum of all n-gram rows, no normalisation (spec 4.2).

    tokens int32 [B, L] -> [B, L, E] in the compute dtype. `hash_tables` is None without n-grams.
    ngrams: [B, L, E], the sum of their rows where it is known. before: int32 [B, n], the ids before
    the first; None, and 0 for those that are not there: a text starts.
    """
    embedded = byte_embedding(tokens, config.compute_dtype)
    if ngrams is not None:
        return embedded + ngrams
    if hash_tables is None:
        return embedded
    seen = tokens if before is None else jnp.concatenate([before, tokens], axis=1)
    ids = ngram_hash_ids(seen, config.hash.sizes, config.hash.num_functions, config.hash.vocab)
    return embedded + hash_tables(ids[:, -tokens.shape[1] :], config.compute_dtype)
