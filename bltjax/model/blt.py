"""The byte latent transformer: embed, encode, global stack, decode (model.md#forward-pass)."""

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from bltjax.config import BLTConfig
from bltjax.model.block_rows import in_rows
from bltjax.model.embeddings import embed_ids
from bltjax.model.global_transformer import GlobalTransformer
from bltjax.model.hash_tables import HashTables
from bltjax.model.local_decoder import LocalDecoder
from bltjax.model.local_encoder import LocalEncoder
from bltjax.model.lora import add_adapters
from bltjax.patching.boundaries import document_segments
from bltjax.vocabulary import EOS_ID


class BLT(nnx.Module):
    def __init__(self, config: BLTConfig, key):
        self.config = config
        key_encoder, key_hash, key_global, key_decoder = jax.random.split(key, 4)
        self.local_encoder = LocalEncoder(config, key_encoder)
        if config.hash.sizes:
            self.encoder_hash_tok_embedding = HashTables(
                config.hash, config.hash_width, key=key_hash
            )
        self.global_transformer = GlobalTransformer(config, key_global)
        self.local_decoder = LocalDecoder(config, key_decoder)
        if config.lora.rank:
            add_adapters(self, config.lora, jax.random.fold_in(key, 1))

    def __call__(self, tokens, patches, document_ids=None, ngrams=None, blocks=None):
        """Returns logits and every intermediate, by name.

        Args:
          tokens: int32 [B, L] byte ids.
          patches: PatchBuffers over L bytes and P patches.
          document_ids: int32 [B, L]; bytes see only their own document. None: a document ends
            with its EOS (model.md#masks).
          ngrams: [B, L, E], the sum of each byte's hash n-gram rows. None: a lookup finds it.
          blocks: Blocks that the decoder reads beside the bytes, which do not see them.
        Returns:
          dict of `embedded` [B, L, E], `byte_states` [B, L, E], `patch_states` [B, P, patch_width],
          `global_states` [B, P, G], `decoder_states` [layers, B, L, E], `logits` float32 [B, L, V].
          With blocks also `block_logits` float32 [B, N, V] of their N bytes, one after the other:
          at each place, of the byte there.
        """
        if document_ids is None:
            document_ids = document_segments(tokens)
        embedded, byte_states, patch_states = self.encode(tokens, patches, document_ids, ngrams)
        global_states = self.global_transformer(
            patch_states, patch_documents(tokens, document_ids, patches.starts)
        )
        reads, of_blocks = [byte_states, global_states, patches, document_ids], {}
        if blocks is not None:
            reads += [blocks, self.embed_blocks(blocks.ids)]
        logits, decoder_states = self.local_decoder(*reads)
        if blocks is not None:
            logits, of_blocks["block_logits"] = logits
            decoder_states, _ = decoder_states
        return of_blocks | dict(
            embedded=embedded,
            byte_states=byte_states,
            patch_states=patch_states,
            global_states=global_states,
            decoder_states=decoder_states,
            logits=logits,
        )

    def embed_blocks(self, ids):
        """Embeds the bytes of blocks [B, S, M, K] -> [B, S M K, E], as bytes without n-grams.

        Masked ones are anything. N-grams of those after them would need the masked bytes.
        """
        embedding = self.local_encoder.tok_embeddings
        return embedding(jnp.maximum(in_rows(ids), 0), self.config.compute_dtype)

    def encode(self, tokens, patches, document_ids, ngrams=None):
        """Returns `embedded`, `byte_states` and `patch_states` of `__call__`."""
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([tokens, document_ids, patches.encoder_ids, patches.decoder_ids])
        chex.assert_equal_shape([patches.starts, patches.lengths, patches.mask])
        tables = self.encoder_hash_tok_embedding if self.config.hash.sizes else None
        byte_embedding = self.local_encoder.tok_embeddings
        embedded = embed_ids(tokens, byte_embedding, tables, self.config, ngrams)
        return embedded, *self.local_encoder(embedded, patches, document_ids)


def patch_documents(tokens, document_ids, starts):
    """Returns the document of each patch [B, P], which is that of its first byte (model.md#masks).

    Patches past the last byte belong to the last document, or to a new one after its EOS.
    """
    after = document_ids[:, -1:] + (tokens[:, -1:] == EOS_ID).astype(document_ids.dtype)
    padded = jnp.concatenate([document_ids, after], axis=1)
    return jax.vmap(lambda row, i: row.at[i].get(mode="clip"))(padded, starts)
