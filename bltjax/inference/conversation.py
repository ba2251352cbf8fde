"""A text that is continued turn by turn: what was read of it once is not read again."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from bltjax import sharding
from bltjax.inference.decoders import Decoder
from bltjax.inference.engine import shown
from bltjax.inference.jobs import Counts, Decoding, Job, Piece, Request
from bltjax.inference.room import (
    STREAM_STEPS,
    Room,
    check_memory,
    make_shape,
    num_positions,
    num_rows,
)
from bltjax.inference.sampling import Sampling

# Positions that may be taken back: an EOS that ended a turn, or a byte, and the one before it.
REWIND = 2
KEY = 0  # of the only job


class Conversation:
    """Keeps the caches of the text that was continued last.

    params: of `decoders.for_generation`.
    """

    def __init__(self, decoder: Decoder, params: dict):
        self.decoder, self.params = decoder, params
        self._room: Room | None = None
        self.kept = 0  # ids of the newest request that had been read before it

    def stream(
        self, request: Request, sampling: Sampling = Sampling(), stops: Sequence[bytes] = ()
    ) -> Iterator[tuple[bytes, Counts]]:
        """Yields the continuation of a text as `engine.stream` does.

        Reads what is new: where the text goes on from the one before, with what was written then,
        that is the last turn. Another text is read from its beginning.
        """
        threshold, decoding = self.decoder.threshold_of(None), Decoding()
        job = Job(request, sampling, stops, threshold=threshold)
        self.kept = self._shared(request)
        if self.kept:
            self._room.go_on(KEY, job, self.kept)
        else:
            positions = num_positions(request, decoding)
            shape = make_shape(self.decoder, num_rows(1), positions, decoding, REWIND)
            check_memory(shape, request)
            self._room = Room(shape, self.params)
            self._room.fill({KEY: job})
        return shown(_pieces(self._room))

    def _shared(self, request: Request) -> int:
        """Returns how many first ids of a request are in the caches; 0 where these are no use."""
        room = self._room
        if room is None or room.mesh != jax.sharding.get_mesh():
            return 0
        if num_positions(request, Decoding()) > room.shape.size.positions:
            return 0
        tokens, lengths = sharding.on_host((room.progress.state.tokens, room.progress.length))
        read = tokens[0, : lengths[0]]
        most = min(len(read), len(request.ids))
        same = int(np.argmin(np.append(read[:most] == request.ids[:most], False)))
        return same if len(read) - (same - 1) <= REWIND else 0


def _pieces(room: Room) -> Iterator[Piece]:
    while not room.is_empty:
        with jax.set_mesh(room.mesh):
            pieces = room.advance(STREAM_STEPS)
        yield from pieces
