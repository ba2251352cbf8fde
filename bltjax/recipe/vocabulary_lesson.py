"""Teaches a fresh encoder the source's words: the patch of a word becomes its token's embedding.

What the source's layers have always read are embeddings of tokens. Nearly all of its vocabulary are
words with a space before them, and a byte model's patches are words with a space after them. So the
vocabulary is the text to learn them from: rows of drawn words, frequent ones more often, in which
the encoder, its n-gram tables and the matrix into the global transformer learn to make of each word
what the source has for it. No layer of the source takes part, so a step costs next to nothing.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bltjax.config import BLTConfig
from bltjax.model import functional
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.runtime.progress import progress_bar
from bltjax.training.teacher import alignment
from bltjax.vocabulary import BOS_ID, BYTE_OFFSET, PAD_ID

ROWS, ROW_BYTES, ROW_WORDS = 64, 256, 64
LONGEST = 64  # bytes of a word that is drawn
RATE, WARMUP = 2e-3, 0.05  # of Adam; share of the steps
COMMON = 1000  # words that are about equally frequent; of others the frequency falls with the id
LAST_STEPS = 20  # whose mean distance is told


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """The words of a vocabulary."""

    ids: np.ndarray  # int64 [W], of the source, in rising order
    texts: list[bytes]  # without the space before them
    space_first: bool = False  # their patches begin with it too; else they end with a space

    def patch(self, word: int) -> bytes:
        """Returns the bytes of the patch of a word."""
        return b" " + self.texts[word] if self.space_first else self.texts[word] + b" "

    @functools.cached_property
    def shares(self) -> np.ndarray:
        """Shares of the words up to each one among those that are drawn, float64 [W]."""
        total = np.cumsum(1 / (self.ids + COMMON))
        return total / total[-1]


class Rows(NamedTuple):
    """Rows of drawn words; a patch is a word and its space."""

    tokens: np.ndarray  # int32 [B, L]
    lengths: np.ndarray  # int32 [B, P], of patches, the first of which is BOS
    words: np.ndarray  # int32 [B, P], place of the word in `Words`, -1: none


def words_of(pieces: dict[int, bytes], space_first: bool = False) -> Words:
    """Returns the words among tokens, given the bytes of each id: those with a space before them.

    space_first: see `Words`.

    Raises ValueError where there are none.
    """
    found = {
        number: piece[1:]
        for number, piece in sorted(pieces.items())
        if piece.startswith(b" ") and piece.count(b" ") == 1 < len(piece) <= LONGEST
    }
    if not found:
        raise ValueError(
            "no token of the source is a word with a space before it: give vocabulary_steps=0"
        )
    return Words(np.array(list(found)), list(found.values()), space_first)


def learn_words(
    config: BLTConfig,
    params: dict,
    words: Words,
    embeddings: np.ndarray,
    steps: int,
    seed: int,
    progress: bool = False,
) -> tuple[dict, float]:
    """Trains the encoder on words -> parameters, and the mean distance of the last steps.

    embeddings: float32 [W, G], of the words. The distance of a patch is its mean square distance to
    the embedding, over the mean square of all embeddings: nothing but zeros would have 1.
    """
    optimizer = optax.adam(rate_schedule(steps))
    embeddings = jnp.asarray(embeddings, jnp.float32)
    state, params = optimizer.init(params), jax.tree.map(jnp.asarray, params)
    rng, distances = np.random.default_rng(seed), []
    step = _step(config, optimizer)
    with progress_bar("learning words", steps, progress, unit=" steps") as bar:
        for _ in range(steps):
            rows = drawn_rows(words, rng)
            params, state, distance = step(params, state, embeddings, *rows)
            distances.append(distance)
            bar.update(1)
    return jax.tree.map(np.asarray, params), float(np.mean(distances[-LAST_STEPS:]))


def rate_schedule(steps: int) -> optax.Schedule:
    """Returns the rate of each of so many steps, at least 1."""
    warmup = min(max(1, int(WARMUP * steps)), steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, RATE, warmup, steps)


def drawn_rows(words: Words, rng: np.random.Generator) -> Rows:
    """Draws rows of words."""
    drawn = np.searchsorted(words.shares, rng.random((ROWS, ROW_WORDS - 1)), side="right")
    tokens = np.full((ROWS, ROW_BYTES), PAD_ID, np.int32)
    lengths = np.zeros((ROWS, ROW_WORDS), np.int32)
    places = np.full((ROWS, ROW_WORDS), -1, np.int32)
    tokens[:, 0], lengths[:, 0] = BOS_ID, 1
    for row, chosen in enumerate(drawn):
        end = 1
        for column, word in enumerate(chosen, 1):
            text = words.patch(word)
            if end + len(text) > ROW_BYTES:
                break
            tokens[row, end : end + len(text)] = np.frombuffer(text, np.uint8) + BYTE_OFFSET
            lengths[row, column], places[row, column] = len(text), word
            end += len(text)
    return Rows(tokens, lengths, places)


def _step(config: BLTConfig, optimizer: optax.GradientTransformation):
    """Returns the jitted (params, state, embeddings, rows) -> (params, state, distance)."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, embeddings, tokens, lengths, words):
        distance, gradients = jax.value_and_grad(_distance, argnums=1)(
            config, params, embeddings, tokens, lengths, words
        )
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, distance

    return step


def _distance(config: BLTConfig, params: dict, embeddings, tokens, lengths, words):
    patches = buffers_from_lengths(lengths, tokens.shape[1])
    _, inputs = functional.encode(config, params, tokens, patches, jnp.zeros_like(tokens))
    wanted = embeddings[jnp.maximum(words, 0)]
    distances = alignment(inputs, wanted, jnp.mean(jnp.square(embeddings)))
    there = words >= 0
    return jnp.sum(jnp.where(there, distances, 0)) / jnp.maximum(jnp.sum(there), 1)
