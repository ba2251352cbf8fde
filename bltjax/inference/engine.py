"""The engine of generation: runs the loops of `loops.py` on batches of requests, for any decoder.

Caches come in few sizes, powers of two, so that few programs are compiled: a second prompt whose
cache is of the same size compiles nothing.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax import sharding
from bltjax.inference.decoders import Decoder
from bltjax.inference.loops import decode, extend, prefill
from bltjax.inference.memory import GIB, needed_and_free
from bltjax.inference.row_state import NEVER, ProgramShape, RequestArrays
from bltjax.inference.sampling import Sampling, check_number, is_whole, make_plain, sampling_arrays
from bltjax.model.cache import CacheSize
from bltjax.ops import platform
from bltjax.ops.cached_attention import BLOCK
from bltjax.runtime.terminal import short
from bltjax.vocabulary import PAD_ID, encode

CHUNK = 128  # positions of a prompt that are read at once, at least
# On accelerators each piece of a prompt reads all weights: pieces are longer while the scores of
# attention within one, rows x heads x positions^2, stay small.
LONGEST_CHUNK, CHUNK_OF_ROWS = 1024, 16_384  # positions of a row, and of all rows of a device
MIN_POSITIONS = 64
STREAM_STEPS = 16  # between looks at what has been written


@dataclass(frozen=True)
class Decoding:
    """Options of speed and memory; they do not change what greedy generation yields."""

    batch_size: int = 32  # rows at once
    max_drafts: int = 0  # bytes drafted past the end of a patch (self-speculation); 0: none
    quorum: float = 0.5  # share of the rows that wait before the global stack runs
    min_patch_bytes: float = 1.0  # mean length of patches that there is room for; 1: of any

    def __post_init__(self):
        make_plain(self)
        for name, least in (("batch_size", 1), ("max_drafts", 0)):
            value = getattr(self, name)
            if not (is_whole(value) and value >= least):
                raise ValueError(f"{name}={short(value)} must be a whole number from {least}")
        if self.max_drafts >= CHUNK:
            raise ValueError(f"max_drafts={short(self.max_drafts)} must be less than {CHUNK}")
        check_number(
            "min_patch_bytes", self.min_patch_bytes, lambda n: 1 <= n < math.inf, "1 or more"
        )
        check_number("quorum", self.quorum, lambda share: 0 < share <= 1, "above 0 and at most 1")


class Request(NamedTuple):
    """One prompt to continue."""

    ids: np.ndarray  # int32, BOS first
    max_new_bytes: int
    seed: int

    @property
    def max_length(self) -> int:
        """Positions of a row whose every new id is a single byte."""
        return len(self.ids) + self.max_new_bytes

    def __str__(self):
        return f"max_new_bytes={self.max_new_bytes} after a prompt of {len(self.ids)} ids"


class Counts(NamedTuple):
    """Work that a generation took."""

    new_bytes: int = 0
    steps: int = 0  # of everything but the global stack; an id for each row in one
    patches: int = 0  # that the global stack read
    prompt_patches: int = 0  # those of them that the prompts held
    global_calls: int = 0  # of the global stack after the prompts, for all rows of a batch at once
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other):
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def generate(
    decoder: Decoder,
    params: dict,  # of `decoders.for_generation`
    requests: Sequence[Request],
    sampling: Sampling = Sampling(),
    stops: Sequence[bytes] = (),
    decoding: Decoding = Decoding(),
) -> tuple[list[bytes], Counts]:
    """Returns the continuation of each prompt, without EOS or stop string, and what it took."""
    # Prompts of like length share a batch: the longest decides the size of all.
    order = sorted(range(len(requests)), key=lambda i: -requests[i].max_length)
    outputs, counts = [b""] * len(requests), Counts()
    for start in range(0, len(order), decoding.batch_size):
        chosen = order[start : start + decoding.batch_size]
        own = [requests[i] for i in chosen]
        batch = Batch(decoder, params, own, sampling, stops, decoding)
        while not batch.done:
            batch.advance(batch.max_steps)
        texts = batch.texts()
        for i, text in zip(chosen, texts, strict=True):
            outputs[i] = text
        counts += batch.counts(texts)
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
    return pieces(Batch(decoder, params, [request], sampling, stops, decoding))


def pieces(batch: "Batch") -> Iterator[tuple[bytes, Counts]]:
    """Yields the text of a batch of one request in pieces, as `stream` does."""
    shown, done = 0, False
    while not done:
        with jax.set_mesh(batch.mesh):
            (text,), done = batch.texts(), batch.done
            counts = batch.counts([text])
        safe = len(text) if done else len(text) - _held_back(text, batch.stops)
        if safe > shown or done:
            yield text[shown:safe], counts
            shown = safe
        if not done:
            with jax.set_mesh(batch.mesh):
                batch.advance(STREAM_STEPS)


class Batch:
    """Rows of static shape that are being generated together."""

    def __init__(self, decoder, params, requests, sampling, stops, decoding, rewind=0):
        self.mesh = jax.sharding.get_mesh()
        shards = sharding.num_row_shards(self.mesh)
        # Few numbers of rows, too, so that few are compiled.
        num_rows = -(-min(_power_of_two(len(requests)), decoding.batch_size) // shards) * shards
        longest = max(requests, key=lambda request: request.max_length)
        needed = longest.max_length + decoding.max_drafts
        if needed > NEVER:
            raise ValueError(
                f"{longest} needs a row of {needed} ids, and one has {NEVER} at most: lower "
                "max_new_bytes"
            )
        capacity = num_positions(needed)
        self.shape = make_shape(decoder, num_rows, capacity, decoding, rewind)
        _check_memory(self.shape, longest)
        self.params, self.rows_here = params, sharding.rows_of_process(num_rows)
        tokens = self._lay_out(requests, sampling, stops)
        self.progress = prefill(self.shape, params, tokens, self.arrays)

    def go_on(self, request: Request, sampling: Sampling, stops: Sequence[bytes], kept: int):
        """Goes on with another request, whose first `kept` ids are those of the first row."""
        tokens = self._lay_out([request], sampling, stops)
        every = np.ones(self.shape.size.rows, np.int32)
        every[0] = kept
        (kept_rows,) = self._put_rows(every)
        self.progress = extend(
            self.shape, self.params, self.progress, tokens, self.arrays, kept_rows
        )

    def _lay_out(self, requests, sampling: Sampling, stops: Sequence[bytes]):
        """Takes requests over into `arrays`; returns their ids."""
        self.requests, self.stops = requests, stops
        decoder, (num_rows, capacity, *_) = self.shape.decoder, self.shape.size
        empty = Request(decoder.encode(b""), 0, 0)
        filled = [*requests, *[empty] * (num_rows - len(requests))]
        tokens = np.full((num_rows, capacity), PAD_ID, np.int32)
        for row, request in zip(tokens, filled, strict=True):
            row[: len(request.ids)] = request.ids
        lengths = np.array([len(r.ids) for r in filled], np.int32)
        limits = np.array([r.max_new_bytes for r in filled], np.int32)
        seeds = np.array([r.seed for r in filled], np.uint32)
        tokens, *numbers = self._put_rows(tokens, lengths, limits, seeds)
        self.arrays = RequestArrays(
            *numbers,
            stops=sharding.put_whole(_stop_table(stops if decoder.ids_are_bytes else ())),
            sampling=sharding.put_whole(jax.tree.map(np.asarray, sampling_arrays(sampling))),
        )
        return tokens

    def _put_rows(self, *arrays):
        return sharding.put_batch([x[self.rows_here] for x in arrays])

    @property
    def done(self) -> bool:
        return bool(np.all(sharding.on_host(self.progress.done)))

    @property
    def max_steps(self) -> int:
        """Steps to make at once: of ids that are not bytes the host looks for stop strings."""
        if self.stops and not self.shape.decoder.ids_are_bytes:
            return STREAM_STEPS
        return min(self.shape.size.positions * (self.shape.max_drafts + 2), NEVER - 1)

    def advance(self, steps: int):
        """Makes at most so many steps."""
        limit = sharding.put_whole(np.int32(steps))
        self.progress = decode(self.shape, self.params, self.progress, self.arrays, limit)
        if self.stops and not self.shape.decoder.ids_are_bytes:
            done = np.array(sharding.on_host(self.progress.done))
            for i, text in enumerate(self._uncut_texts()):
                done[i] |= self._cut(text) != text
            (done,) = self._put_rows(done)
            self.progress = self.progress._replace(done=done)

    def texts(self) -> list[bytes]:
        """Returns the text of each row so far, drafts left out.

        Raises ValueError where a text has more patches than there is room for.
        """
        size, decoder = self.shape.size, self.shape.decoder
        if size.patches < size.positions:
            full = decoder.out_of_patches(self.progress.state, self.progress.length)
            if sharding.on_host(full)[: len(self.requests)].any():
                raise ValueError(
                    f"a text has more than the {size.patches} patches that there is room for: "
                    "lower min_patch_bytes, down to 1"
                )
        return [self._cut(text) for text in self._uncut_texts()]

    def _uncut_texts(self) -> list[bytes]:
        progress = self.progress
        tokens, ends = sharding.on_host((progress.state.tokens, progress.length))
        if progress.drafting is not None:
            anchors = sharding.on_host(progress.drafting.anchor)
            ends = np.where(anchors >= 0, anchors + 1, ends)
        rows = zip(self.requests, tokens, ends, strict=False)  # those filled up have no request
        return [
            self.shape.decoder.decode(row[len(r.ids) : end])[: r.max_new_bytes]
            for r, row, end in rows
        ]

    def _cut(self, text: bytes) -> bytes:
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        return text[: min(found, default=None)]

    def counts(self, texts: list[bytes]) -> Counts:
        """Returns the work that `texts` took."""
        progress, drafting = self.progress, self.progress.drafting

        def total(of_rows):
            return int(sharding.on_host(of_rows)[: len(self.requests)].sum())

        return Counts(
            new_bytes=sum(map(len, texts)),
            steps=int(sharding.on_host(progress.num_steps)),
            patches=total(self.shape.decoder.num_patches(progress.state)),
            prompt_patches=total(progress.prompt_patches),
            global_calls=int(sharding.on_host(progress.num_global_calls)),
            drafted=total(drafting.num_drafted) if drafting else 0,
            accepted=total(drafting.num_accepted) if drafting else 0,
        )


def make_shape(
    decoder: Decoder, rows: int, positions: int, decoding: Decoding, rewind: int = 0
) -> ProgramShape:
    """Returns the shape of the programs for so many rows of so many positions.

    rewind: positions that rows may step back over, beside those of drafts.
    """
    patches = math.ceil(positions / decoding.min_patch_bytes / BLOCK) * BLOCK
    size = CacheSize(
        rows=rows,
        positions=positions,
        patches=min(max(patches, BLOCK), positions),
        chunk=min(_chunk(rows), positions),
        # The drafts, and the byte that they follow.
        max_rewind=max(decoding.max_drafts + 1, rewind),
    )
    return ProgramShape(decoder, size, decoding.max_drafts, decoding.quorum)


def _chunk(rows: int) -> int:
    """Returns the positions of a prompt that are read at once."""
    if platform.platform() == "cpu":
        return CHUNK
    rows_of_device = rows // sharding.num_row_shards(jax.sharding.get_mesh())
    return min(max(CHUNK, CHUNK_OF_ROWS // rows_of_device), max(CHUNK, LONGEST_CHUNK))


def _check_memory(shape: ProgramShape, longest: Request):
    """Raises ValueError where the caches are larger than the memory that the devices have left."""
    mesh, size = jax.sharding.get_mesh(), shape.size
    rows = jax.NamedSharding(mesh, sharding.batch_spec(2))
    tokens = jax.ShapeDtypeStruct((size.rows, size.positions), jnp.int32, sharding=rows)
    state = jax.eval_shape(functools.partial(shape.decoder.new_state, size), tokens)
    needed, free = needed_and_free(state)
    if free is not None and needed > free:
        raise ValueError(
            f"{longest} needs {needed / GIB:.1f} GiB for the caches of {size.rows} rows, and "
            f"{free / GIB:.1f} GiB are free: lower max_new_bytes or batch_size, or raise "
            "min_patch_bytes"
        )


def num_positions(needed: int) -> int:
    """Returns the smallest of the few sizes that has room for `needed` positions."""
    return max(MIN_POSITIONS, _power_of_two(needed))


def _stop_table(stops: Sequence[bytes]) -> np.ndarray:
    """Returns ids int32 [S, m] of few sizes: -1 before shorter ones, rows of -2 to fill it up."""
    if not stops:
        return np.zeros((0, 1), np.int32)
    longest = _power_of_two(max(map(len, stops)))
    table = np.full((_power_of_two(len(stops)), longest), -2, np.int32)
    for row, stop in zip(table, stops, strict=False):
        row[:] = -1
        row[longest - len(stop) :] = encode(stop, add_bos=False, add_eos=False)
    return table


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _held_back(text: bytes, stops: Sequence[bytes]) -> int:
    """Returns the length of the longest end of a text that a stop string begins with."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    ends = (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stops))
    return next(ends, 0)
