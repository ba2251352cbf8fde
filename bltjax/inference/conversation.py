"""A text that is continued turn by turn: what was read of it once is not read again."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from bltjax import sharding
from bltjax.inference.decoders import Decoder
from bltjax.inference.engine import Batch, Counts, Decoding, Request, num_positions, pieces
from bltjax.inference.sampling import Sampling

# Positions that may be taken back: an EOS that ended a turn, or a byte, and the one before it.
REWIND = 2


class Conversation:
    """Keeps the caches of the text that was continued last.

    params: of `decoders.for_generation`.
    """

    def __init__(self, decoder: Decoder, params: dict):
        self.decoder, self.params = decoder, params
        self._batch: Batch | None = None
        self.kept = 0  # ids of the newest request that had been read before it

    def stream(
        self, request: Request, sampling: Sampling = Sampling(), stops: Sequence[bytes] = ()
    ) -> Iterator[tuple[bytes, Counts]]:
        """Yields the continuation of a text as `engine.stream` does.

        Reads what is new: where the text goes on from the one before, with what was written then,
        that is the last turn. Another text is read from its beginning.
        """
        self.kept = self._shared(request)
        if self.kept:
            self._batch.go_on(request, sampling, stops, self.kept)
        else:
            rows = self.decoder, self.params, [request], sampling, stops
            self._batch = Batch(*rows, Decoding(), rewind=REWIND)
        return pieces(self._batch)

    def _shared(self, request: Request) -> int:
        """Returns how many first ids of a request are in the caches; 0 where these are no use."""
        batch = self._batch
        if batch is None or batch.mesh != jax.sharding.get_mesh():
            return 0
        if num_positions(request.max_length) > batch.shape.size.positions:
            return 0
        tokens, lengths = sharding.on_host((batch.progress.state.tokens, batch.progress.length))
        read = tokens[0, : lengths[0]]
        most = min(len(read), len(request.ids))
        same = int(np.argmin(np.append(read[:most] == request.ids[:most], False)))
        return same if len(read) - (same - 1) <= REWIND else 0
