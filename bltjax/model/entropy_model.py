"""The small byte language model whose entropies place the patches (model.md#entropy-model)."""

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from bltjax.config import EntropyModelConfig
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

    def __call__(self, tokens, segments=None):
        """Returns a dict of `logits` float32 [B, L, V], of tokens int32 [B, L].

        segments: int32 [B, L]; bytes see only their own. None: a document ends with its EOS.
        """
        if segments is None:
            segments = document_segments(tokens)
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([tokens, segments])
        x = self.tok_embeddings(tokens, self.config.compute_dtype)
        x = run_blocks(self.layers, self.config.transformer, x, segments, self.config)
        return dict(logits=self.output(self.norm(x)).astype(jnp.float32))
