"""A transformer of ids: the small byte model whose entropies place the patches, and token models.

See model.md#entropy-model. Hash n-gram tables are an option of token models.
"""

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from bltjax.config import EntropyModelConfig
from bltjax.model.embeddings import embed_ids
from bltjax.model.hash_tables import HashTables
from bltjax.model.parameters import Embedding, Linear, RMSNorm
from bltjax.model.transformer import make_blocks, run_blocks
from bltjax.patching.boundaries import document_segments


class EntropyModel(nnx.Module):
    def __init__(self, config: EntropyModelConfig, key):
        self.config = config
        stack = config.transformer
        key_embed, key_blocks, key_out = jax.random.split(key, 3)
        std = stack.dim**-0.5
        self.tok_embeddings = Embedding(config.vocab_size, stack.dim, std=std, key=key_embed)
        self.layers = make_blocks(stack, config.init, key_blocks)
        self.norm = RMSNorm(stack.dim, stack.norm_eps)
        self.output = Linear(
            config.vocab_size, stack.dim, std=std, axes=(None, "embed"), key=key_out
        )
        if not config.hash.sizes:
            return
        key_hash, key_project = jax.random.split(jax.random.fold_in(key, 1))
        width = config.hash_width
        self.encoder_hash_tok_embedding = HashTables(config.hash, width, key=key_hash)
        if width != stack.dim:  # the sum then has the spread of rows of the stack's own width
            self.hash_projection = Linear(
                stack.dim, width, std=std, axes=(None, "embed"), key=key_project
            )

    def __call__(self, tokens, segments=None, ngrams=None):
        """Returns `embedded` [B, L, E] and `logits` float32 [B, L, V] of tokens int32 [B, L].

        segments: int32 [B, L]; ids see only their own. None: a document ends with its EOS.
        ngrams: [B, L, hash_width], the sum of each id's hash n-gram rows. None: a lookup finds it.
        """
        if segments is None:
            segments = document_segments(tokens)
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([tokens, segments])
        tables = self._look_up if self.config.hash.sizes else None
        ngrams = ngrams if ngrams is None else self._project(ngrams)
        embedded = embed_ids(tokens, self.tok_embeddings, tables, self.config, ngrams)
        x = run_blocks(self.layers, self.config.transformer, embedded, segments, self.config)
        return dict(embedded=embedded, logits=self.output(self.norm(x)).astype(jnp.float32))

    def _look_up(self, ids, dtype):
        """Sums the rows `ids` int32 [B, L, T] of all tables -> [B, L, E]."""
        return self._project(self.encoder_hash_tok_embedding(ids, dtype))

    def _project(self, ngrams):
        if self.config.hash_width == self.config.transformer.dim:
            return ngrams
        return self.hash_projection(ngrams)
