"""Packs rows in a fixed number of lanes, so that any number of processes makes the same batches.

Row i of every batch comes from lane i. Lane i of n reads the documents at places i, i + n,
i + 2n, ... of the corpus's order and packs them independently of other lanes. Results do not depend
on the process that works on a lane, its helpers, or how far it reads ahead. The state of a lane is
a few numbers: the documents read, and the position in each open one.
"""

from typing import NamedTuple

import grain
import numpy as np

from bltjax.config import PatchingConfig
from bltjax.config.chat import ChatConfig
from bltjax.data import conversations
from bltjax.data.batches.packing import OpenDocument, Packer, patch_ends
from bltjax.data.batches.rows import Row
from bltjax.data.teacher_tokens import TeacherTokenizer
from bltjax.data.tokenizer import Tokenizer
from bltjax.patching.boundaries import patch_starts
from bltjax.vocabulary import encode

NONE = -1  # place in a state where there is no open document


class Layout(NamedTuple):
    """Shape and content of rows."""

    row_bytes: int  # positions, also where ids are not bytes
    row_patches: int = 0
    patching: PatchingConfig | None = None  # None: rows have no patches, and row_patches is 0
    pool: int = 32  # documents that a lane has open
    slack: float = 0.02  # share of a row's compute, see `packing`
    tokenizer: Tokenizer | None = None  # source of the ids; None: ids are bytes
    # Of each source, if its documents are conversations of which the answers alone are learned.
    chat: tuple[ChatConfig | None, ...] = ()
    teacher: TeacherTokenizer | None = None  # whose tokens rows have beside their bytes


class Lane:
    """An iterator over the rows of one lane.

    documents: an order, see `order`. `state` is int64 [1 + 2 * pool]: the number of documents read,
    then the place and the position of each open one.
    """

    def __init__(self, documents, layout: Layout, lane: int, num_lanes: int, state=None):
        self.documents, self.layout = documents, layout
        self.lane, self.num_lanes = lane, num_lanes
        self.packer = Packer(layout.row_bytes, layout.row_patches, layout.pool, layout.slack)
        self.state = initial_state(layout) if state is None else state

    @property
    def state(self) -> np.ndarray:
        state = initial_state(self.layout)
        state[0] = self.num_read
        for slot, document in enumerate(self.packer.open):
            state[1 + 2 * slot : 3 + 2 * slot] = document.index, document.position
        return state

    @state.setter
    def state(self, state: np.ndarray):
        self.num_read = int(state[0])
        places = state[1:].reshape(-1, 2)
        self.packer.open = [self._open(*map(int, p)) for p in places if p[0] != NONE]

    def __iter__(self):
        return self

    def __next__(self) -> Row:
        row = self.packer.next_row(self._arriving())
        if row is None:
            raise StopIteration
        return row

    def _arriving(self):
        while True:
            place = self.lane + self.num_read * self.num_lanes
            if self.documents.num_places is not None and place >= self.documents.num_places:
                return
            self.num_read += 1
            yield self._open(place)

    def _open(self, place: int, position: int = 0) -> OpenDocument:
        source, document = self.documents[place]
        tokenizer = self.layout.tokenizer
        ids, ends = (tokenizer.encode if tokenizer else encode)(document.data), None
        if self.layout.row_patches:
            starts = patch_starts(self.layout.patching, ids, document.entropies)
            ends = patch_ends(ids, starts[: len(ids)])
        learned, chat = None, self.layout.chat[source] if self.layout.chat else None
        if chat is not None:  # neither BOS nor EOS is
            learned = np.pad(conversations.learned(document.data, chat), 1)
        small = tokenizer is None or len(tokenizer) <= 2**16
        ids = ids.astype(np.uint16 if small else np.uint32)
        teacher = self.layout.teacher
        tokens = None if teacher is None else teacher.token_ends(document.data)
        return OpenDocument(ids, ends, source, place, position, learned, tokens)


def initial_state(layout: Layout) -> np.ndarray:
    """Returns the state of a lane that has read nothing."""
    return np.array([0] + [NONE] * 2 * layout.pool, np.int64)


class LaneBatches(grain.IterDataset):
    """Batches of one row from each of several lanes, with the states of the lanes.

    An element is (Row [lanes, ...], int64 [lanes, 1 + 2 * pool]); the next batch follows from it.
    """

    def __init__(self, documents, layout: Layout, lanes, num_lanes: int, states: np.ndarray):
        super().__init__()
        self.documents, self.layout = documents, layout
        self.lanes, self.num_lanes, self.states = lanes, num_lanes, states

    def __iter__(self):
        return _LaneIterator(self)


class _LaneIterator(grain.DatasetIterator):
    def __init__(self, parent: LaneBatches):
        super().__init__()
        self._batches = parent
        self.set_state(parent.states)

    def __next__(self):
        rows = [next(lane) for lane in self._lanes]
        return Row(*map(np.stack, zip(*rows, strict=True))), self.get_state()

    def get_state(self):
        return np.stack([lane.state for lane in self._lanes])

    def set_state(self, state):
        p = self._batches
        self._lanes = [
            Lane(p.documents, p.layout, lane, p.num_lanes, s)
            for lane, s in zip(p.lanes, state, strict=True)
        ]
