"""Embeddings of ids, and hash n-gram embeddings added to them (model.md#n-grams, #encoder)."""

import jax.numpy as jnp

from bltjax.ops.hashing import ngram_hash_ids


def embed_ids(tokens, embedding, hash_tables, config, ngrams=None, before=None):
    """Adds to each id's embedding the rows of all its n-grams, without normalisation.

    tokens int32 [B, L] -> [B, L, E] in the compute dtype. `hash_tables` is None without n-grams.
    ngrams: [B, L, E], the sum of the n-gram rows where it is known. before: int32 [B, n], the ids
    before the first one, 0 before the text; None: all rows start a text.
    """
    embedded = embedding(tokens, config.compute_dtype)
    if ngrams is not None:
        return embedded + ngrams
    if hash_tables is None:
        return embedded
    seen = tokens if before is None else jnp.concatenate([before, tokens], axis=1)
    own = config.hash
    ids = ngram_hash_ids(seen, own.sizes, own.num_functions, own.vocab, config.vocab_size)
    return embedded + hash_tables(ids[:, -tokens.shape[1] :], config.compute_dtype)
