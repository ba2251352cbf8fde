"""Byte embeddings and the hash n-gram embeddings added to them (spec 4, 5.6)."""

from bltjax.ops.hashing import ngram_hash_ids


def embed_bytes(tokens, byte_embedding, hash_tables, config, ngrams=None):
    """Byte row plus the plain sum of all n-gram rows, no normalisation (spec 4.2).

    tokens int32 [B, L] -> [B, L, E] in the compute dtype. `hash_tables` is None without n-grams.
    ngrams: [B, L, E], the sum of their rows where it is known.
    """
    embedded = byte_embedding(tokens, config.compute_dtype)
    if ngrams is not None:
        return embedded + ngrams
    if hash_tables is None:
        return embedded
    ids = ngram_hash_ids(tokens, config.hash.sizes, config.hash.num_functions, config.hash.vocab)
    return embedded + hash_tables(ids, config.compute_dtype)
