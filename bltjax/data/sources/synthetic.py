"""Draws text where there is no corpus: sentences of a made-up language, whose words follow Zipf.

Frequent words are short, so the next byte is hard where a word begins and easy inside it, as in
real text. A document depends on its language and its number alone: any process draws the same one,
in any order.
"""

import functools
import hashlib
from typing import NamedTuple

import numpy as np

DEFAULT_BYTES = 16_000_000  # of a source without `data.max_bytes`
MEAN_BYTES = 2048  # of a document, which has between a quarter and seven quarters of it
VOCABULARY = 2000  # words
UNEVEN = 8  # letters by which a frequent word may be longer than a rarer one
# Parts of a syllable, between single spaces; where two stand together it may have none.
SYLLABLE = (
    " b d f g h k l m n p r s t v z br dr fl gr kl pr sh st tr",
    "a e i o u a e i o u ai ea io ou é ö",
    "   n r s l t nd st",
)
# What follows a word, and how often.
MARKS = {" ": 0.8, ", ": 0.1, ". ": 0.07, ".\n\n": 0.03}


class Language(NamedTuple):
    """A vocabulary with the shares of its words."""

    name: str  # all else follows from it
    words: tuple[str, ...]  # the most frequent first
    cumulative: np.ndarray  # float64 [words]: shares of the words up to each
    word_bytes: float  # on average, with what follows a word


@functools.lru_cache(maxsize=16)
def language(name: str) -> Language:
    """Draws the language of a name."""
    draws, syllable = _generator(f"{name}:words"), [part.split(" ") for part in SYLLABLE]
    words: dict[str, None] = {}
    while len(words) < VOCABULARY:
        parts = syllable * (1 + int(3 * draws.random()))
        words["".join(part[int(len(part) * draws.random())] for part in parts)] = None
    ranked = sorted(words, key=lambda word: len(word) + UNEVEN * draws.random())
    shares = 1 / (3 + np.arange(VOCABULARY))
    cumulative = np.cumsum(shares) / np.sum(shares)
    cumulative[-1] = 1  # which no draw reaches
    lengths = [len(word.encode()) for word in ranked]
    after = sum(len(mark) * share for mark, share in MARKS.items())
    mean = float(np.dot(lengths, shares) / np.sum(shares)) + after
    return Language(name, tuple(ranked), cumulative, mean)


def document(of: Language, number: int) -> bytes:
    """Draws a document of a language, UTF-8."""
    draws = _generator(f"{of.name}:{number}")
    count = max(1, int(MEAN_BYTES * (0.25 + 1.5 * draws.random()) / of.word_bytes))
    words = np.searchsorted(of.cumulative, draws.random(count), side="right").tolist()
    ends = np.cumsum(list(MARKS.values()))[:-1]
    marks = np.searchsorted(ends, draws.random(count), side="right").tolist()
    spelled, parts, begins = tuple(MARKS), [], True
    for word, mark in zip(words, marks, strict=True):
        text = of.words[word]
        parts += [text.capitalize() if begins else text, spelled[mark]]
        begins = spelled[mark].startswith(".")
    return ("".join(parts).rstrip(" ,.\n") + ".\n").encode()


def _generator(seed: str) -> np.random.Generator:
    digest = hashlib.blake2b(seed.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
