"""A room: slots of static shape, in each of which a row is generated for a job of its own.

Rooms come in few sizes, powers of two, so that few programs are compiled: a second prompt whose
room is of the same size compiles nothing.
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
from bltjax.inference import loops
from bltjax.inference.decoders import Decoder
from bltjax.inference.jobs import CHUNK, Counts, Decoding, Job, Piece, Request
from bltjax.inference.loops import Reading, View
from bltjax.inference.memory import GIB, needed_and_free
from bltjax.inference.row_state import NEVER, ProgramShape, RequestArrays
from bltjax.inference.sampling import sampling_arrays
from bltjax.model.cache import CacheSize
from bltjax.ops import platform
from bltjax.ops.cached_attention import BLOCK
from bltjax.vocabulary import EOS_ID, PAD_ID, encode

# On accelerators each piece of a prompt reads all weights: pieces are longer while the scores of
# attention within one, rows x heads x positions^2, stay small.
LONGEST_CHUNK, CHUNK_OF_ROWS = 1024, 16_384  # positions of a row, and of all rows of a device
MIN_POSITIONS = 64
STREAM_STEPS = 16  # between looks at what has been written
ALL_CHUNKS = NEVER
MANY = 16  # rows: on CPUs a call of the global stack then serves a quarter of them
# Stop strings of a row, and bytes of each, that tables have room for at least: one program serves
# rows without any, and with most.
NUM_STOPS, STOP_BYTES = 8, 16


class Work(NamedTuple):
    """Work of a room for all its rows; fields as of `Counts`."""

    steps: int = 0
    global_calls: int = 0
    fills: int = 0

    def since(self, before: "Work") -> "Work":
        """Returns the work that came after."""
        return Work(*(a - b for a, b in zip(self, before, strict=True)))


@dataclass
class Occupant:
    """The job in a slot, and what the host knows of its row."""

    key: int
    job: Job
    work: Work  # of the room before it came
    shown: int = 0  # bytes that were given out
    log_p: np.ndarray | None = None  # float32 [n, V], of bytes that were not given out yet


class Room:
    """Rows of static shape that are generated together, on the mesh that is set."""

    def __init__(self, shape: ProgramShape, params: dict):
        self.mesh = jax.sharding.get_mesh()
        self.shape, self.params = shape, params
        self.slots: list[Occupant | None] = [None] * shape.size.rows
        self.progress, self._arrays = None, None
        self.work = Work()  # all that was done here
        self._work_before = Work()  # before the rows that are here were filled in

    @property
    def free(self) -> list[int]:
        """Returns the slots without a job."""
        return [i for i, occupant in enumerate(self.slots) if occupant is None]

    @property
    def is_empty(self) -> bool:
        """Returns whether there is no job."""
        return not any(self.slots)

    def fill(self, jobs: dict[int, Job]):
        """Reads the prompts of jobs, by their keys, all at once; no other may be here."""
        self._occupy(jobs)
        self._start(new_reading(list(jobs.values()), self.shape))

    def go_on(self, key: int, job: Job, kept: int):
        """Goes on with another job, whose first `kept` ids are those of the first row."""
        self._occupy({key: job})
        every = np.ones(self.shape.size.rows, np.int32)
        every[0] = kept
        tokens, kept_rows = tokens_of([job], self.shape), _put_rows(every)
        self._start(loops.reopen(self.shape, self.progress, tokens, kept_rows))

    def enter(self, jobs: dict[int, Job], reading: Reading, reading_shape: ProgramShape):
        """Puts jobs of one prompt, by their keys, into free slots, once `reading` has read it."""
        for key, job in jobs.items():
            if self.progress is None:
                self._start(new_reading([], self.shape))
            slot = self.free[0]
            self.slots[slot] = self._occupant(key, job)
            arrays = _put_rows(_arrays_of([job], reading_shape))
            row = loops.start(reading_shape, self._num_log_probs, reading, arrays)
            self._match_log_probs()
            self.progress = loops.enter(self.progress, row, sharding.put_whole(np.int32(slot)))
        self._arrays = None

    def leave(self, slot: int):
        """Takes the job out of a slot."""
        self.slots[slot] = None
        self._arrays = None

    def advance(self, steps: int, until_one_is_done: bool = False) -> list[Piece]:
        """Makes at most so many steps; returns what came of them.

        until_one_is_done: fewer, once a row is done.
        """
        if self.is_empty:
            return []
        if self._arrays is None:
            self._renew()
        limits = len(self.free) + 1 if until_one_is_done else len(self.slots)
        steps, max_done = sharding.put_whole((np.int32(self._limited(steps)), np.int32(limits)))
        self.progress = loops.decode(
            self.shape, self.params, self.progress, self._arrays, steps, max_done
        )
        return list(self._pieces())

    def _occupy(self, jobs: dict[int, Job]):
        """Puts jobs into the first slots."""
        self._work_before = self.work
        empty = [None] * (len(self.slots) - len(jobs))
        self.slots = [self._occupant(*item) for item in jobs.items()] + empty

    def _occupant(self, key: int, job: Job) -> Occupant:
        return Occupant(key, job, self.work)

    def _start(self, reading: Reading):
        """Reads the prompts of all slots, and makes rows of them that write on."""
        self._arrays = _put_rows(_arrays_of(self._jobs, self.shape))
        lengths, chunks = self._arrays.prompt_lengths, sharding.put_whole(np.int32(ALL_CHUNKS))
        if not self.is_empty:
            reading = loops.read(self.shape, self.params, reading, lengths, chunks)
        self.progress = loops.start(self.shape, self._num_log_probs, reading, self._arrays)

    def _renew(self):
        """Tells the programs which jobs there are now."""
        self._arrays = _put_rows(_arrays_of(self._jobs, self.shape))
        is_free = _put_rows(np.array([job is None for job in self._jobs]))
        self.progress = self.progress._replace(done=self.progress.done | is_free)
        self._match_log_probs()

    @property
    def _jobs(self) -> list[Job | None]:
        return [occupant.job if occupant else None for occupant in self.slots]

    @property
    def _num_log_probs(self) -> int:
        """Steps of a round whose log-probabilities are kept; 0 where no job asks."""
        return STREAM_STEPS * any(o.job.log_probs for o in self.slots if o)

    def _match_log_probs(self):
        """Gives the rows at work room for log-probabilities once a job asks, or takes it."""
        asked, has = self._num_log_probs, self.progress.log_probs is not None
        if has != bool(asked):
            self.progress = _with_log_probs(asked, self.progress)

    def _limited(self, steps: int) -> int:
        """Returns the steps to make before the host must look."""
        stops = any(o.job.stops for o in self.slots if o)
        finds_stops = stops and not self.shape.decoder.ids_are_bytes
        if self._num_log_probs or finds_stops:
            return min(steps, STREAM_STEPS)
        return min(steps, self.shape.size.positions * (self.shape.max_drafts + 2), NEVER - 1)

    def _pieces(self) -> Iterator[Piece]:
        """Yields the new text of each row; takes out the jobs that are done."""
        view = sharding.on_host(loops.look(self.shape, self.progress))
        counted = int(view.num_steps), int(view.num_global_calls), int(view.num_fills)
        self.work = Work(*(a + b for a, b in zip(self._work_before, counted, strict=True)))
        for slot, occupant in enumerate(self.slots):
            if occupant is not None:
                piece = self._piece(occupant, slot, view)
                if piece.finish:
                    self.leave(slot)
                yield piece

    def _piece(self, occupant: Occupant, slot: int, view: View) -> Piece:
        request, _, stops, *_ = job = occupant.job
        if view.is_full[slot]:
            raise ValueError(
                f"a text has more than the {self.shape.size.patches} patches that there is room "
                "for: lower min_patch_bytes, down to 1"
            )
        end, drafted, accepted, in_patch = int(view.length[slot]), 0, 0, 0
        if view.drafts is not None:
            drafted, accepted, in_patch, anchor = (int(x[slot]) for x in view.drafts)
            end = anchor + 1 if anchor >= 0 else end  # what is drafted may not stand
        ids = view.tokens[slot, len(request.ids) : end]
        whole = self.shape.decoder.decode(ids)[: request.max_new_bytes]
        text = whole[: min((at for stop in stops if (at := whole.find(stop)) >= 0), default=None)]
        ended = len(text) < len(whole) or (len(ids) and ids[-1] == EOS_ID)
        done = ended or bool(view.done[slot])
        shown, safe = occupant.shown, len(text) if done else len(text) - held_back(text, stops)
        safe = max(safe, shown)
        occupant.shown = safe
        counts = Counts(
            new_bytes=len(text),
            patches=int(view.num_patches[slot]),
            prompt_patches=int(view.prompt_patches[slot]),
            drafted=drafted,
            accepted=accepted,
            in_patch=in_patch,
            **self.work.since(occupant.work)._asdict(),
        )
        log_p = None
        if job.log_probs:
            written, first = (x[slot] for x in view.log_probs)
            new = written[: end - int(first)]
            both = new if occupant.log_p is None else np.concatenate([occupant.log_p, new])
            log_p, occupant.log_p = both[: safe - shown], both[safe - shown :]
        finish = ("stop" if ended else "length") if done else None
        return Piece(occupant.key, text[shown:safe], log_p, finish, counts)


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
        max_rewind=max(decoding.ahead + 1, rewind),
    )
    decoder, max_rows = decoder.without_threshold(), _rows_of_call(rows)
    drafts = decoding.max_drafts, decoding.quorum, decoding.blocks
    return ProgramShape(decoder, size, *drafts, max_rows)


def _rows_of_call(rows: int) -> int | None:
    """Returns the rows that a call of the global stack serves; None: all.

    On CPUs a call for many rows costs what their products cost, and rows that do not wait need
    none. On accelerators, and for few rows, it costs reading the weights.
    """
    shards = sharding.num_row_shards(jax.sharding.get_mesh())
    are_many = rows >= MANY and platform.platform() == "cpu" and shards == 1
    return rows // 4 if are_many else None


def _chunk(rows: int) -> int:
    """Returns the positions of a prompt that are read at once."""
    if platform.platform() == "cpu":
        return CHUNK
    rows_of_device = rows // sharding.num_row_shards(jax.sharding.get_mesh())
    return min(max(CHUNK, CHUNK_OF_ROWS // rows_of_device), max(CHUNK, LONGEST_CHUNK))


def check_memory(shape: ProgramShape, longest: Request):
    """Raises ValueError where the caches are larger than the memory that the devices have left."""
    mesh, size = jax.sharding.get_mesh(), shape.size
    rows = jax.NamedSharding(mesh, sharding.batch_spec(2))
    tokens = jax.ShapeDtypeStruct((size.rows, size.positions), jnp.int32, sharding=rows)
    row = jax.NamedSharding(mesh, sharding.batch_spec(1))
    thresholds = jax.ShapeDtypeStruct((size.rows,), jnp.float32, sharding=row)
    new_state = functools.partial(shape.decoder.new_state, size)
    state = jax.eval_shape(new_state, tokens, thresholds)
    needed, free = needed_and_free(state)
    if free is not None and needed > free:
        raise ValueError(
            f"{longest} needs {needed / GIB:.1f} GiB for the caches of {size.rows} rows, and "
            f"{free / GIB:.1f} GiB are free: lower max_new_bytes or batch_size, or raise "
            "min_patch_bytes"
        )


def num_positions(request: Request, decoding: Decoding) -> int:
    """Returns the smallest of the few sizes that has room for a request. Raises ValueError."""
    needed = request.max_length + decoding.ahead
    if needed > NEVER:
        raise ValueError(
            f"{request} needs a row of {needed} ids, and one has {NEVER} at most: lower "
            "max_new_bytes"
        )
    return room_size(needed)


def room_size(positions: int) -> int:
    """Returns the smallest of the few sizes that has room for so many positions."""
    return max(MIN_POSITIONS, power_of_two(positions))


def num_rows(wanted: int) -> int:
    """Returns the smallest number of rows from `wanted` on that the mesh splits."""
    shards = sharding.num_row_shards(jax.sharding.get_mesh())
    return -(-wanted // shards) * shards


def new_reading(jobs: Sequence[Job], shape: ProgramShape) -> Reading:
    """Returns the state in which the prompts of jobs are read; rows beyond them hold nothing."""
    thresholds = np.zeros(shape.size.rows, np.float32)
    thresholds[: len(jobs)] = [job.threshold for job in jobs]
    return loops.new_reading(shape, tokens_of(jobs, shape), _put_rows(thresholds))


def tokens_of(jobs: Sequence[Job], shape: ProgramShape):
    """Returns the ids int32 [B, C] of the prompts of jobs on the devices."""
    tokens = np.full((shape.size.rows, shape.size.positions), PAD_ID, np.int32)
    nothing = [shape.decoder.encode(b"")] * (len(tokens) - len(jobs))
    for row, ids in zip(tokens, [*(job.request.ids for job in jobs), *nothing], strict=True):
        row[: len(ids)] = ids
    return _put_rows(tokens)


def power_of_two(n: int) -> int:
    """Returns the smallest power of two from n on."""
    return 1 << (n - 1).bit_length()


def held_back(text: bytes, stops: Sequence[bytes]) -> int:
    """Returns the length of the longest end of a text that a stop string begins with."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    ends = (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stops))
    return next(ends, 0)


def _arrays_of(jobs: Sequence[Job | None], shape: ProgramShape) -> RequestArrays:
    """Returns what the programs know of the jobs in the slots, as host arrays."""
    nothing = Job(Request(np.zeros(1, np.int32), 0, 0))
    free = [None] * (shape.size.rows - len(jobs))
    jobs = [job or nothing for job in (*jobs, *free)]
    requests, has_bytes = [job.request for job in jobs], shape.decoder.ids_are_bytes
    return RequestArrays(
        prompt_lengths=np.int32([len(r.ids) for r in requests]),
        max_new_bytes=np.int32([r.max_new_bytes for r in requests]),
        seeds=np.uint32([r.seed for r in requests]),
        stops=_stop_tables([job.stops if has_bytes else () for job in jobs]),
        sampling=sampling_arrays([job.sampling for job in jobs]),
    )


def _stop_tables(rows: Sequence[Sequence[bytes]]) -> np.ndarray:
    """Returns ids int32 [B, S, m] of few sizes: -1 before shorter ones, -3, no id, to fill up."""
    num_stops = max(NUM_STOPS, *map(len, rows))
    longest = max([STOP_BYTES, *(len(stop) for row in rows for stop in row)])
    shape = len(rows), power_of_two(num_stops), power_of_two(longest)
    tables = np.full(shape, -3, np.int32)
    for table, stops in zip(tables, rows, strict=True):
        for row, stop in zip(table, stops, strict=False):
            row[:] = -1
            row[len(row) - len(stop) :] = encode(stop, add_bos=False, add_eos=False)
    return tables


def _put_rows(arrays):
    """Puts host arrays [B, ...] on the devices, each process its own rows."""
    here = sharding.rows_of_process(len(jax.tree.leaves(arrays)[0]))
    return sharding.put_batch(jax.tree.map(lambda x: x[here], arrays))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _with_log_probs(num: int, progress):
    """Returns the rows with room for log-probabilities of `num` steps; 0: without."""
    if not num:
        return progress._replace(log_probs=None)
    zeros = jnp.zeros_like(progress.next_log_p)
    log_probs = loops.LogProbs(zeros, zeros[:, None].repeat(num, axis=1), progress.length)
    return progress._replace(log_probs=log_probs)
