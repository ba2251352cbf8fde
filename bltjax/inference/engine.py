"""Generation of whole lists of prompts, and of one in a stream, for any decoder."""

from collections.abc import Iterator, Sequence

from bltjax.inference.decoders import Decoder
from bltjax.inference.jobs import Counts, Decoding, Job, Piece, Request
from bltjax.inference.room import STREAM_STEPS, num_positions, num_rows, power_of_two
from bltjax.inference.sampling import Sampling
from bltjax.inference.scheduler import Scheduler

MIXED = 4  # times the room of a text that a shorter one may share


def generate(
    decoder: Decoder,
    params: dict,  # of `decoders.for_generation`
    requests: Sequence[Request],
    sampling: Sampling = Sampling(),
    stops: Sequence[bytes] = (),
    decoding: Decoding = Decoding(),
) -> tuple[list[bytes], Counts]:
    """Returns the continuation of each prompt, without EOS or stop string, and what it took."""
    outputs, counts = [b""] * len(requests), Counts()
    # Prompts of like length share a room: the longest decides its size.
    order = sorted(range(len(requests)), key=lambda i: -requests[i].max_length)
    while order:
        size = num_positions(requests[order[0]], decoding)
        chosen = [i for i in order if num_positions(requests[i], decoding) * MIXED >= size]
        order = order[len(chosen) :]
        # Few numbers of rows, too, so that few are compiled.
        rows = num_rows(min(power_of_two(len(chosen)), decoding.batch_size))
        scheduler = Scheduler(decoder, params, decoding.with_rows(rows), [size])
        keys = [scheduler.submit(Job(requests[i], sampling, stops)) for i in chosen]
        texts = scheduler.run()
        for i, key in zip(chosen, keys, strict=True):
            outputs[i], of_text = texts[key]
            counts += of_text._replace(steps=0, global_calls=0, fills=0)
        (room,) = scheduler.rooms.values()
        counts += Counts(**room.work._asdict())
    return outputs, counts


def stream(
    decoder: Decoder,
    params: dict,  # of `decoders.for_generation`
    request: Request,
    sampling: Sampling = Sampling(),
    stops: Sequence[bytes] = (),
    decoding: Decoding = Decoding(),
) -> Iterator[tuple[bytes, Counts]]:
    """Yields the continuation of one prompt in pieces as they come, and what it took so far.

    An end that may turn out to begin a stop string is held back. All work is done on the mesh that
    is set now, whatever the caller sets between two pieces.
    """
    scheduler = Scheduler(decoder, params, decoding.with_rows(1), steps=STREAM_STEPS)
    scheduler.submit(Job(request, sampling, stops))
    return shown(_pieces(scheduler))


def _pieces(scheduler: Scheduler) -> Iterator[Piece]:
    while not scheduler.idle:
        yield from scheduler.step()


def shown(pieces: Iterator[Piece]) -> Iterator[tuple[bytes, Counts]]:
    """Yields the texts of one job's pieces that have any, and its last piece."""
    for piece in pieces:
        if piece.text or piece.finish:
            yield piece.text, piece.counts
