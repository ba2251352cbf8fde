"""Orders of documents: shuffled over the whole corpus, or mixed from sources by weight.

An order maps a place in the stream to a document in constant time, so reading can start anywhere
and be split over processes. `num_places` is its length, or None where it is endless.
"""

import functools
from collections.abc import Sequence

import numpy as np
from grain.experimental import index_shuffle

SMALL = 2**18  # up to so many documents are shuffled as an array; Grain's cipher is slow for few
# A mixture has its proportions in each block of BLOCK documents. Blocks are longer where they would
# hold fewer than RAREST documents of a source.
BLOCK, RAREST, LONGEST_BLOCK = 4096, 32, 2**22


def shuffled_place(place: int, size: int, seed: int) -> int:
    """Returns the number of the document at a place: each once an epoch, each epoch reshuffled."""
    epoch, place = divmod(place, size)
    if size <= SMALL:
        return int(_permutation(size, seed, epoch)[place])
    return index_shuffle(place, size - 1, (seed + 0x9E3779B1 * epoch) % 2**32, rounds=4)


@functools.lru_cache(maxsize=32)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


class InOrder:
    """Order in which every document comes once, source by source: place -> (source, document)."""

    def __init__(self, sources: Sequence):
        self.sources = sources
        self.ends = np.cumsum([len(documents) for documents in sources])
        self.num_places = int(self.ends[-1])

    def __getitem__(self, place: int):
        source = int(self.ends.searchsorted(place, "right"))
        begin = int(self.ends[source]) - len(self.sources[source])
        return source, self.sources[source][place - begin]


class Shuffled(InOrder):
    """Order in which all documents of all sources are shuffled: place -> (source, document).

    sources: sequences of documents. endless: epochs follow each other; else there is one.
    """

    def __init__(self, sources: Sequence, seed: int, endless: bool = True):
        super().__init__(sources)
        self.seed, self.num_documents = seed, self.num_places
        self.num_places = None if endless else self.num_documents

    def __getitem__(self, place: int):
        return super().__getitem__(shuffled_place(place, self.num_documents, self.seed))


class Mixture:
    """Order in which each source gives its share of the bytes: place -> (source, document).

    A source that has been read whole is read again in a new order. weights: relative shares of the
    bytes. mean_bytes: mean length of the documents of each source.
    """

    def __init__(
        self, sources: Sequence, weights: Sequence[float], mean_bytes: Sequence[float], seed: int
    ):
        self.sources, self.seed, self.num_places = sources, seed, None
        self.counts = _counts(np.array(weights) / np.maximum(mean_bytes, 1))
        self.block = int(self.counts.sum())
        self.which = np.repeat(np.arange(len(self.counts)), self.counts)
        self.ranks = np.concatenate([np.arange(n) for n in self.counts])

    def __getitem__(self, place: int):
        # Shuffled: lanes read every n-th place, and each should meet all sources.
        slot = shuffled_place(place, self.block, self.seed)
        source = int(self.which[slot])
        documents = self.sources[source]
        turn = int(place // self.block * self.counts[source] + self.ranks[slot])
        return source, documents[shuffled_place(turn, len(documents), self.seed + source)]


def _counts(shares: np.ndarray) -> np.ndarray:
    """Returns the number of documents of each source in a block."""
    shares = shares / shares.sum()
    block = int(min(max(BLOCK, RAREST / shares.min()), LONGEST_BLOCK))
    return np.maximum(np.round(block * shares), 1).astype(int)
