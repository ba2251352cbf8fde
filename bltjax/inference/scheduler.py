"""Continuous batching: jobs come and go, and rows that are at work never wait for the last of them.

Each job waits for a slot in a room that has space for its text. A prompt is read aside, in chunks
between the steps of the rows at work, and enters its slot when it is read; jobs of one prompt share
the reading. A row that is done leaves its slot to the next.

One thread owns a scheduler and calls everything.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.inference import loops
from bltjax.inference.decoders import Decoder
from bltjax.inference.jobs import Counts, Decoding, Job, Piece, Request
from bltjax.inference.loops import Reading
from bltjax.inference.room import (
    ALL_CHUNKS,
    STREAM_STEPS,
    Room,
    check_memory,
    make_shape,
    new_reading,
    num_positions,
    num_rows,
    tokens_of,
)


@dataclass
class Read:
    """A prompt that is being read, or was."""

    job: Job  # the first that asks for it
    reading: Reading
    count: int  # ids that are read

    @property
    def is_whole(self) -> bool:
        return self.count == len(self.job.request.ids)

    def serves(self, job: Job) -> bool:
        """Returns whether a job's prompt is this one."""
        mine, ids = self.job.request.ids, job.request.ids
        return job.threshold == self.job.threshold and np.array_equal(mine, ids)


class Stats(NamedTuple):
    """Jobs now, and the work since the beginning."""

    waiting: int  # jobs without a slot
    running: int  # jobs in slots
    steps: int
    global_calls: int
    new_bytes: int  # that were given out


class Scheduler:
    """Slots in rooms, and the jobs that wait for them. All work is done on the mesh that is set."""

    def __init__(
        self,
        decoder: Decoder,
        params: dict,  # of `decoders.for_generation`
        decoding: Decoding = Decoding(),
        sizes: Sequence[int] | None = None,
        steps: int = STREAM_STEPS,
        keep_prefixes: int = 0,
    ):
        """Makes a scheduler without rooms; each appears when a job needs it.

        decoding.batch_size: slots of a room. sizes: positions of the rooms, ascending; None: the
        powers of two. steps: between two looks at what was written. keep_prefixes: beginnings of
        prompts (`Job.shared`) whose caches are kept, those used last; each is as large as a slot.
        """
        self.mesh = jax.sharding.get_mesh()
        self.decoder, self.params, self.decoding = decoder, params, decoding
        self.sizes, self.steps, self.keep_prefixes = sizes, steps, keep_prefixes
        self.rooms: dict[int, Room] = {}
        self.waiting: dict[int, OrderedDict[int, Job]] = {}  # by the size of their room
        self._read: dict[int, Read] = {}  # of each size, the prompt that comes next
        self._prefixes: OrderedDict[tuple, Reading] = OrderedDict()
        self._keys = itertools.count()
        self._new_bytes = 0

    def submit(self, job: Job) -> int:
        """Lets a job wait for a slot; returns its key.

        Raises ValueError where it needs more room than there is.
        """
        size = self._size(job)
        if size not in self.rooms:
            with jax.set_mesh(self.mesh):
                self.rooms[size] = self._new_room(size, job.request)
            self.waiting[size] = OrderedDict()
        if job.log_probs and self.decoding.ahead:
            raise ValueError("log_probs=True: with drafts they are not kept")
        key, threshold = next(self._keys), self.decoder.threshold_of(job.threshold)
        shared = min(job.shared, len(job.request.ids))
        self.waiting[size][key] = job._replace(threshold=threshold, shared=shared)
        return key

    def _new_room(self, size: int, request: Request) -> Room:
        rows = num_rows(self.decoding.batch_size)
        shape = make_shape(self.decoder, rows, size, self.decoding)
        check_memory(shape, request)
        return Room(shape, self.params)

    def warm_up(self, jobs: Sequence[Job]) -> Iterator[int]:
        """Compiles what jobs with such sampling run; yields the size of a room after some programs.

        Each goes both ways into a slot, of rooms that are thrown away. Raises ValueError where the
        memory has no space for a room of the next size.
        """
        for size in self.sizes or ():
            for job in jobs:
                job = job._replace(threshold=self.decoder.threshold_of(job.threshold))
                longest = job.request._replace(max_new_bytes=size - len(job.request.ids))
                for way in (self._read_aside_and_enter, self._fill):
                    with jax.set_mesh(self.mesh):
                        way(self._new_room(size, longest), job)
                    yield size

    def _read_aside_and_enter(self, room: Room, job: Job):
        shape = self._reading_shape(room)
        read = self._begin(shape.size.positions, shape, job)
        self._advance(read, shape, len(job.request.ids), 1)
        if self.keep_prefixes:
            loops.copy(read.reading)
        room.enter({0: job}, read.reading, shape)
        room.advance(self.steps)

    def _fill(self, room: Room, job: Job):
        room.fill({0: job})
        room.advance(self.steps)

    def _size(self, job: Job) -> int:
        needed = num_positions(job.request, self.decoding)
        if self.sizes is None:
            return needed
        fits = (size for size in self.sizes if job.request.max_length <= size)
        if (size := next(fits, None)) is None:
            raise ValueError(
                f"{job.request} needs {job.request.max_length} positions, and there are "
                f"{self.sizes[-1]}: shorten the prompt or lower max_new_bytes"
            )
        return size

    def cancel(self, key: int):
        """Forgets a job, whose slot is free at the next step; one that is done is no error."""
        for size, room in self.rooms.items():
            self.waiting[size].pop(key, None)
            for slot, occupant in enumerate(room.slots):
                if occupant is not None and occupant.key == key:
                    room.leave(slot)

    @property
    def num_waiting(self) -> int:
        """Returns the number of jobs without a slot."""
        return sum(map(len, self.waiting.values()))

    @property
    def num_running(self) -> int:
        """Returns the number of jobs in slots."""
        return sum(len(room.slots) - len(room.free) for room in self.rooms.values())

    @property
    def idle(self) -> bool:
        """Returns whether there is nothing to do."""
        return not (self.num_waiting or self.num_running)

    @property
    def stats(self) -> Stats:
        """Returns the jobs now, and the work so far."""
        work = [room.work for room in self.rooms.values()]
        return Stats(
            self.num_waiting,
            self.num_running,
            steps=sum(done.steps for done in work),
            global_calls=sum(done.global_calls for done in work),
            new_bytes=self._new_bytes,
        )

    def step(self, steps: int | None = None) -> list[Piece]:
        """Lets jobs that wait enter free slots, and makes steps in all rooms; returns new text."""
        pieces = []
        with jax.set_mesh(self.mesh):
            for size, room in self.rooms.items():
                self._admit(size, room)
                more = bool(self.waiting[size])
                pieces += room.advance(steps or self.steps, until_one_is_done=more)
        self._new_bytes += sum(len(piece.text) for piece in pieces)
        return pieces

    def _admit(self, size: int, room: Room):
        """Fills an empty room at once; else reads so many chunks that rows at work go on soon."""
        waiting, free = self.waiting[size], len(room.free)
        others_wait = self._work_elsewhere(size) or not room.is_empty
        prompts = {job.request.ids.tobytes() for job in list(waiting.values())[:free]}
        alone = len(room.slots) == self._reading_rows
        if waiting and not others_wait and size not in self._read and (alone or len(prompts) > 1):
            room.fill(dict(waiting.popitem(last=False) for _ in range(min(free, len(waiting)))))
            return
        chunks = -(-free // 2) if others_wait else ALL_CHUNKS
        while waiting and room.free and chunks > 0:
            chunks -= self._read_on(size, room, chunks)
            if self._read[size].is_whole:
                self._enter(size, room)

    def _work_elsewhere(self, size: int) -> bool:
        return any(not room.is_empty for other, room in self.rooms.items() if other != size)

    @property
    def _reading_rows(self) -> int:
        """Rows of the state that prompts are read in aside: one, and what the mesh asks for."""
        return num_rows(1)

    def _reading_shape(self, room: Room):
        shape = room.shape
        return shape._replace(size=shape.size._replace(rows=self._reading_rows))

    def _read_on(self, size: int, room: Room, chunks: int) -> int:
        """Reads on in the prompt that comes next; returns the chunks that it took."""
        job, shape = next(iter(self.waiting[size].values())), self._reading_shape(room)
        num_ids, read = len(job.request.ids), self._read.get(size)
        if read is None or not read.serves(job):
            read = self._read[size] = self._begin(size, shape, job)
        took = 0
        while not read.is_whole and took < chunks:
            # A prefix that is kept ends a chunk.
            end = job.shared if read.count < job.shared else num_ids
            num = min(chunks - took, -(-(end - read.count) // shape.size.chunk))
            self._advance(read, shape, end, num)
            took += num
            if read.count == job.shared:
                self._keep(_prefix(size, job), read.reading)
        return took

    def _begin(self, size: int, shape, job: Job) -> Read:
        """Starts to read a prompt, after its beginning where that is kept."""
        prefix = _prefix(size, job)
        if prefix not in self._prefixes:
            return Read(job, new_reading([job], shape), 0)
        self._prefixes.move_to_end(prefix)
        kept = loops.copy(self._prefixes[prefix])
        return Read(job, loops.with_tokens(kept, tokens_of([job], shape)), job.shared)

    def _advance(self, read: Read, shape, end: int, chunks: int):
        ends = np.ones(shape.size.rows, np.int32)
        ends[0] = end
        lengths = sharding.put_batch(ends[sharding.rows_of_process(len(ends))])
        limit = sharding.put_whole(np.int32(chunks))
        read.reading = loops.read(shape, self.params, read.reading, lengths, limit)
        read.count = min(end, read.count + chunks * shape.size.chunk)

    def _keep(self, prefix: tuple, reading: Reading):
        if not self.keep_prefixes:
            return
        self._prefixes[prefix] = loops.copy(reading)
        while len(self._prefixes) > self.keep_prefixes:
            self._prefixes.popitem(last=False)

    def _enter(self, size: int, room: Room):
        """Puts the jobs whose prompt has been read into slots, as many as are free."""
        waiting, read = self.waiting[size], self._read[size]
        same = [key for key, job in waiting.items() if read.serves(job)]
        jobs = {key: waiting.pop(key) for key in same[: len(room.free)]}
        room.enter(jobs, read.reading, self._reading_shape(room))
        if len(jobs) == len(same):
            del self._read[size]

    def run(self) -> dict[int, tuple[bytes, Counts]]:
        """Steps until nothing is to be done; returns text and counts of each job, by its key."""
        texts: dict[int, tuple[bytes, Counts]] = {}
        while not self.idle:
            for piece in self.step(ALL_CHUNKS):
                before = texts.get(piece.key, (b"", None))[0]
                texts[piece.key] = before + piece.text, piece.counts
        return texts


def _prefix(size: int, job: Job) -> tuple:
    """Returns the key under which the caches of a prompt's beginning are kept."""
    return size, job.threshold, job.request.ids[: job.shared].tobytes()
