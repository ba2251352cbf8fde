"""The order in which documents are read: shuffled over the whole corpus, sources mixed.

An order gives the document at any place at once, so reading can go on anywhere, in any number of
processes. `num_places` is where it ends, or None.
"""

import functools
from collections.abc import Sequence

import numpy as np
from grain.experimental import index_shuffle

SMALL = 2**18  # documents that are shuffled as an array; Grain's cipher is slow for few
# A mixture has its proportions in each block of so many documents, or more if it takes more for
# so many of the rarest source.
BLOCK, RAREST, LONGEST_BLOCK = 4096, 32, 2**22


def shuffled_place(place: int, size: int, seed: int) -> int:
    """Which of `size` documents stands at a place: each once an epoch, in a new order each."""
    epoch, place = divmod(place, size)
    if size <= SMALL:
        return int(_permutation(size, seed, epoch)[place])
    return index_shuffle(place, size - 1, (seed + 0x9E3779B1 * epoch) % 2**32, rounds=4)


@functools.lru_cache(maxsize=32)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


class InOrder:
    """Places -> (source number, document): every document once, source by source."""

    def __init__(self, sources: Sequence):
        self.sources = sources
        self.ends = np.cumsum([len(documents) for documents in sources])
        self.num_places = int(self.ends[-1])

    def __getitem__(self, place: int):
        source = int(self.ends.searchsorted(place, "right"))
        begin = int(self.ends[source]) - len(self.sources[source])
        return source, self.sources[source][place - begin]


class Shuffled(InOrder):
    """Places -> (source number, document), over all documents of all sources together.

    sources: sequences of documents. Without `endless` there is one epoch, and a last place.
    """

    def __init__(self, sources: Sequence, seed: int, endless: bool = True):
        super().__init__(sources)
        self.seed, self.num_documents = seed, self.num_places
        self.num_places = None if endless else self.num_documents

    def __getitem__(self, place: int):
        return super().__getitem__(shuffled_place(place, self.num_documents, self.seed))


class Mixture:
    """Places -> (source number, document), each source giving its share of the bytes.

    A source is read again, in a new order, when it has been read whole. weights: shares of the
    bytes, in any unit. mean_bytes: of a document of each source.
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
    """Documents of each source in a block, which is as long as the rarest source needs."""
    shares = shares / shares.sum()
    block = int(min(max(BLOCK, RAREST / shares.min()), LONGEST_BLOCK))
    return np.maximum(np.round(block * shares), 1).astype(int)
