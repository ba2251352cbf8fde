"""Rows of blocks: what they are told from, and that bytes are told from what they were before."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.checkpoints.lazy_arrays import read_all
from bltjax.checkpoints.pytorch.tensor_names import META, to_published
from bltjax.config import CrossAttentionConfig
from bltjax.model import functional
from bltjax.model.block_rows import Blocks
from bltjax.patching.buffers import buffers_from_starts
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, MASK_ID
from tests.model.test_invariants import CONFIGS, tiny
from tests.test_model_page import page

pytestmark = pytest.mark.long  # one interpreter will do

B, L, P = 2, 18, 14
S, M, K = 3, 2, 3  # tiles, blocks of each, bytes of a block
CHOSEN = {
    "released": CONFIGS["released"],
    "no cross-attention": CONFIGS["no cross-attention"],
    "random": CONFIGS["random 2"],
    "one cross layer, windows": tiny(
        sizes=(2, 3),
        kv_heads=1,
        cross=CrossAttentionConfig(k=3, all_layers_decoder=False, window_decoder=2),
        skip_projection=True,
    ),
}
each = pytest.mark.parametrize("name", CHOSEN)


class Model:
    """A config with random parameters, and its programs."""

    def __init__(self, config):
        self.config = dataclasses.replace(config, diffusion_block=K)
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(
            lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
            functional.abstract_params(self.config),
        )
        self.both = jax.jit(self._both)

    def _both(self, params, tokens, patches, blocks):
        found = functional.intermediates(self.config, params, tokens, patches, blocks=blocks)
        return found["logits"], found["block_logits"].reshape(B, S * M, K, -1)

    def plain(self, tokens, patches):
        """Logits of the same parameters without blocks."""
        config = dataclasses.replace(self.config, diffusion_block=0)
        decoder = dict(self.params["local_decoder"])
        del decoder["mask_embedding"]
        return jax.jit(functools.partial(functional.apply, config))(
            self.params | dict(local_decoder=decoder), tokens, patches
        )

    def logits_of_blocks(self, text):
        return np.asarray(self.both(self.params, *text.inputs)[1])


@functools.cache
def model(name):
    return Model(CHOSEN[name])


class Text:
    """Rows of two documents, their patches, and blocks at any positions of the tiles.

    known: the share of the bytes of blocks that are, or the number of the first ones of each.
    """

    def __init__(self, seed, known=0):
        rng = np.random.default_rng(seed)
        self.tokens = rng.integers(BYTE_OFFSET, 260, (B, L)).astype(np.int32)
        for row, end in zip(self.tokens, rng.integers(5, 9, B), strict=True):
            row[end : end + 2] = EOS_ID, BOS_ID
        self.opens = rng.random((B, L + 1)) < 0.4
        self.opens[:, :2] = True
        self.opens[:, 1:] |= self.tokens == EOS_ID
        self.opens &= np.cumsum(self.opens, axis=1) <= P
        size = L // S
        places = rng.integers(1, size + 1, (B, S, M)) + np.arange(S)[:, None] * size
        self.starts = np.sort(places, axis=-1).astype(np.int32)
        at = self.starts[..., None] + np.arange(K)
        ids = np.take_along_axis(self.tokens, at.clip(max=L - 1).reshape(B, -1), axis=1)
        drawn = np.arange(K) < known if isinstance(known, int) else rng.random(at.shape) < known
        self.ids = np.where(drawn & (at < L), ids.reshape(at.shape), MASK_ID).astype(np.int32)

    @functools.cached_property
    def patches(self):
        return jax.jit(buffers_from_starts, static_argnums=1)(jnp.asarray(self.opens), P)

    @property
    def inputs(self):
        decoder_ids = np.asarray(self.patches.decoder_ids)
        before = self.starts.reshape(B, -1) - 1
        read = np.take_along_axis(decoder_ids, before, axis=1).reshape(self.starts.shape)
        return self.tokens, self.patches, Blocks(self.starts, self.ids, read)

    def blocks_of(self, row):
        """The number of each block of a row, its start, and the position of its first masked byte.

        It is -1 where no byte is.
        """
        for n, start in enumerate(self.starts[row].reshape(-1)):
            masked = self.ids[row].reshape(-1, K)[n] == MASK_ID
            yield n, start, start + int(np.argmax(masked)) if masked.any() else -1

    def changed_from(self, row, start, seed):
        """The same text up to a position, other bytes, documents and patches after it."""
        other, rng = Text(seed), np.random.default_rng(seed)
        found = Text(0)
        found.starts, found.ids = self.starts, self.ids
        found.tokens, found.opens = self.tokens.copy(), self.opens.copy()
        found.tokens[row, start:] = rng.permutation(other.tokens[row])[: L - start]
        found.opens[row, start + 1 :] = rng.random(L - start) < 0.5
        found.opens[row] &= np.cumsum(found.opens[row]) <= P
        return found


@each
def test_logits_of_blocks_are_those_of_the_page(name):
    """An oracle in NumPy, which has all masks, positions and reads in the open."""
    text, own = Text(1, known=0.5), model(name)
    found = own.logits_of_blocks(text)
    decoder = dict(own.params["local_decoder"])
    unnamed = {x: decoder.pop(x) for x in ("mask_embedding", "skip_projection") if x in decoder}
    tensors = to_published(own.config, own.params | dict(local_decoder=decoder), META)
    w = {tensor: np.asarray(read_all(x), np.float64) for tensor, x in tensors.items()}
    w |= {f"local_decoder.{x}.weight": layer["weight"] for x, layer in unnamed.items()}
    for row in range(B):
        lengths = np.asarray(text.patches.lengths[row])
        for n, start in enumerate(text.starts[row].reshape(-1)):
            known = text.ids[row].reshape(-1, K)[n]
            expected = page()["fill_in"](
                w, own.config, text.tokens[row], lengths[lengths > 0], start, known
            )
            np.testing.assert_allclose(found[row, n], expected, rtol=0, atol=2e-4)


@each
@pytest.mark.parametrize("known", [0, 1, 2, 0.5])
def test_a_block_is_told_from_nothing_at_its_first_masked_byte_or_later(name, known):
    """But from the bytes of the block that are known after it, which stay."""
    text, own = Text(2, known), model(name)
    found = own.logits_of_blocks(text)
    for row in range(B):
        for n, start, first in text.blocks_of(row):
            if first < 0:
                continue
            for seed in (3, 4):
                later = own.logits_of_blocks(text.changed_from(row, first, seed))
                np.testing.assert_array_equal(later[row, n], found[row, n])
            for before in {first - 1, start - 1}:
                earlier = own.logits_of_blocks(text.changed_from(row, before, 3))
                assert (np.abs(earlier[row, n] - found[row, n]).max(axis=-1) > 1e-4).all()


@each
@pytest.mark.parametrize("known", [0, 2])
def test_no_gradient_reaches_a_block_from_its_first_masked_byte_or_later(name, known):
    """By the embeddings of all bytes: through encoder states, patches and latents."""
    text, own = Text(5, known), model(name)
    tokens, patches, blocks = text.inputs
    weights = np.random.default_rng(0).normal(size=(K, 260)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def gradient(row, n):
        def told(added):
            inputs = own.params, tokens, patches
            found = functional.intermediates(own.config, *inputs, blocks=blocks, ngrams=added)
            logits = found["block_logits"].reshape(B, S * M, K, -1)
            return jnp.sum(logits[row, n] * weights)

        nothing = jnp.zeros((B, L, own.config.local_encoder.dim))
        return jnp.abs(jax.grad(told)(nothing)).max(axis=-1)

    places = [x.reshape(-1) for x in np.mgrid[:B, : S * M]]
    for row, n, reached in zip(*places, np.asarray(gradient(*places)), strict=True):
        _, start, first = list(text.blocks_of(row))[n]
        assert (reached[row, first:] == 0).all() and (reached[1 - row] == 0).all()
        assert (reached[row, start - 1 : first] > 1e-4).all()


@each
def test_bytes_do_not_see_blocks(name):
    text, own = Text(6, known=0.5), model(name)
    tokens, patches, blocks = text.inputs
    logits, of_blocks = own.both(own.params, tokens, patches, blocks)
    others = blocks._replace(ids=np.full_like(text.ids, MASK_ID))
    again, of_others = own.both(own.params, tokens, patches, others)
    np.testing.assert_array_equal(again, logits)
    assert np.abs(of_others - of_blocks).max() > 1e-3
    # A program of its own: XLA may round otherwise where it has more to compute.
    alone = jax.jit(lambda *inputs: own._both(*inputs)[0])(own.params, tokens, patches, blocks)
    plain = own.plain(tokens, patches)
    np.testing.assert_array_equal(alone, plain)
    np.testing.assert_allclose(logits, plain, rtol=0, atol=2e-6)


def test_all_of_a_block_is_told_together():
    """A byte after a masked one changes what is said of those before it and after it."""

    def text():
        found = Text(7)
        found.ids[..., 1:] = BYTE_OFFSET + np.arange(M * (K - 1)).reshape(M, -1)
        return found

    own = model("released")
    found = own.logits_of_blocks(text())
    for k in range(1, K):
        other = text()
        other.ids[:, :, 0, k] += 1
        apart = np.abs(own.logits_of_blocks(other) - found).max(axis=-1).reshape(B, S, M, K)
        assert (apart[:, :, 0] > 1e-5).all() and (apart[:, :, 1] == 0).all()
