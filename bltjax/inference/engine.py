"""Prompts to text: rows of static shape around the loops of `loops.py`, and what comes out.

Rooms come in few sizes, powers of two, so that few are compiled: a second prompt whose room is of
the same size compiles nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from bltjax import sharding
from bltjax.inference.loops import decode, prefill
from bltjax.inference.model_steps import Configs
from bltjax.inference.row_state import Plan, Request, out_of_patches
from bltjax.inference.sampling import Sampling, knobs
from bltjax.model.cache import Room
from bltjax.ops.cached_attention import BLOCK
from bltjax.vocabulary import PAD_ID, encode
from bltjax.vocabulary import decode as decode_ids

AT_ONCE = 128  # positions of a prompt that are read at once
SMALLEST_ROOM = 64
STREAM_STEPS = 16  # between looks at what has been written


@dataclass(frozen=True)
class Decoding:
    """How generation goes about it; none of it changes what greedy generation yields."""

    batch_size: int = 32  # rows at once
    max_drafts: int = 0  # bytes drafted past the end of a patch (self-speculation); 0: none
    quorum: float = 0.5  # share of the rows that wait before the global stack runs
    least_patch_bytes: float = 1.0  # mean length of patches that there is room for; 1: of any

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("max_drafts", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name}={value!r} must be a whole number from {least}")
        if self.max_drafts >= AT_ONCE:
            raise ValueError(f"max_drafts={self.max_drafts} must be less than {AT_ONCE}")
        if not 1 <= self.least_patch_bytes < np.inf:
            raise ValueError(f"least_patch_bytes={self.least_patch_bytes!r} must be 1 or more")
        if not 0 < self.quorum <= 1:
            raise ValueError(f"quorum={self.quorum!r} must be above 0 and at most 1")


class Prompt(NamedTuple):
    """One row that is asked for."""

    ids: np.ndarray  # int32, BOS first
    max_new_bytes: int
    seed: int


class Counts(NamedTuple):
    """What a generation took."""

    new_bytes: int = 0
    steps: int = 0  # of the entropy model, encoder and decoder; a byte for each row in one
    patches: int = 0  # that the global stack read
    prompt_patches: int = 0  # those of them that the prompts held
    global_calls: int = 0  # of the global stack after the prompts, for all rows of a batch at once
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other):
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def generate(
    configs: Configs,
    params: dict,  # of `model_steps.prepared`
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),
    stops: Sequence[bytes] = (),
    decoding: Decoding = Decoding(),
) -> tuple[list[bytes], Counts]:
    """The continuation of each prompt, without EOS or stop string, and what it took."""
    # Prompts of like length share a batch: the longest decides the room of all.
    order = sorted(range(len(prompts)), key=lambda i: -_length(prompts[i]))
    outputs, counts = [b""] * len(prompts), Counts()
    for start in range(0, len(order), decoding.batch_size):
        chosen = order[start : start + decoding.batch_size]
        rows = _Rows(configs, params, [prompts[i] for i in chosen], sampling, stops, decoding)
        while not rows.done:
            rows.advance(rows.plan.room.positions * (decoding.max_drafts + 2))
        texts = rows.texts()
        for i, text in zip(chosen, texts, strict=True):
            outputs[i] = text
        counts += rows.counts(texts)
    return outputs, counts


def stream(
    configs: Configs,
    params: dict,  # of `model_steps.prepared`
    prompt: Prompt,
    sampling: Sampling = Sampling(),
    stops: Sequence[bytes] = (),
    decoding: Decoding = Decoding(),
) -> Iterator[tuple[bytes, Counts]]:
    """The continuation of one prompt as it comes, in pieces, and what it took so far.

    What may turn out to be the beginning of a stop string is held back.
    """
    rows = _Rows(configs, params, [prompt], sampling, stops, decoding)
    shown = 0
    while True:
        (text,), done = rows.texts(), rows.done
        safe = len(text) if done else len(text) - _held_back(text, stops)
        if safe > shown or done:
            yield text[shown:safe], rows.counts([text])
            shown = safe
        if done:
            return
        rows.advance(STREAM_STEPS)


class _Rows:
    """A batch on its way."""

    def __init__(self, configs, params, prompts, sampling, stops, decoding):
        shards = sharding.num_row_shards(jax.sharding.get_mesh())
        # Few numbers of rows, too, so that few are compiled.
        num_rows = -(-min(_power_of_two(len(prompts)), decoding.batch_size) // shards) * shards
        capacity = room_for(max(map(_length, prompts)) + decoding.max_drafts)
        self.plan = make_plan(configs, num_rows, capacity, decoding)
        self.params, self.prompts, self.stops = params, prompts, stops
        empty = Prompt(encode(b"", add_eos=False), 0, 0)
        filled = [*prompts, *[empty] * (num_rows - len(prompts))]
        tokens = np.full((num_rows, capacity), PAD_ID, np.int32)
        for row, prompt in zip(tokens, filled, strict=True):
            row[: len(prompt.ids)] = prompt.ids
        lengths = np.array([len(p.ids) for p in filled], np.int32)
        new = np.array([p.max_new_bytes for p in filled], np.int32)
        seeds = np.array([p.seed for p in filled], np.uint32)
        here = sharding.rows_of_process(num_rows)
        tokens, *asked = sharding.put_batch(
            [x[here] for x in (tokens, lengths, lengths + new, seeds)]
        )
        self.request = Request(
            *asked,
            stops=sharding.put_whole(_stop_table(stops)),
            knobs=sharding.put_whole(jax.tree.map(np.asarray, knobs(sampling))),
        )
        self.progress = prefill(self.plan, params, tokens, self.request)

    @property
    def done(self) -> bool:
        return bool(np.all(sharding.on_host(self.progress.done)))

    def advance(self, steps: int):
        limit = sharding.put_whole(np.int32(steps))
        self.progress = decode(self.plan, self.params, self.progress, self.request, limit)

    def texts(self) -> list[bytes]:
        """What has been written of each prompt, drafts left out.

        Raises ValueError where a text has more patches than there is room for.
        """
        self._check_room()
        progress = self.progress
        tokens, lengths, anchors = sharding.on_host(
            (progress.state.record.tokens, progress.length, progress.anchor)
        )
        ends = np.where(anchors >= 0, anchors + 1, lengths)
        rows = zip(self.prompts, tokens, ends, strict=False)  # those filled up have no prompt
        return [self._text(row[len(prompt.ids) : end]) for prompt, row, end in rows]

    def _check_room(self):
        room = self.plan.room
        if room.patches < room.positions:
            full = sharding.on_host(out_of_patches(self.progress.state, self.progress.length))
            if full[: len(self.prompts)].any():
                raise ValueError(
                    f"a text has more than the {room.patches} patches that there is room for: "
                    "lower least_patch_bytes, down to 1"
                )

    def _text(self, ids) -> bytes:
        text = decode_ids(ids, cut_at_eos=True)
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        return text[: min(found, default=None)]

    def counts(self, texts: list[bytes]) -> Counts:
        """What `texts` took."""
        counts, patches = sharding.on_host(
            (self.progress.counts, self.progress.state.blt.num_patches)
        )
        rows = len(self.prompts)
        return Counts(
            new_bytes=sum(map(len, texts)),
            steps=int(counts["steps"]),
            patches=int(patches[:rows].sum()),
            prompt_patches=int(counts["prompt_patches"][:rows].sum()),
            global_calls=int(counts["global_calls"]),
            drafted=int(counts["drafted"][:rows].sum()),
            accepted=int(counts["accepted"][:rows].sum()),
        )


def make_plan(configs, rows: int, positions: int, decoding: Decoding = Decoding()) -> Plan:
    """The programs for so many rows with room for so many positions."""
    # A row may step back over its drafts and over the byte that they follow.
    patches = math.ceil(positions / decoding.least_patch_bytes / BLOCK) * BLOCK
    at_once = min(AT_ONCE, positions)
    room = Room(rows, positions, min(patches, positions), at_once, decoding.max_drafts + 1)
    return Plan(configs, room, decoding.max_drafts, decoding.quorum)


def room_for(positions: int) -> int:
    """Positions that a row has room for, where it needs so many: one of few sizes."""
    return max(SMALLEST_ROOM, _power_of_two(positions))


def _length(prompt: Prompt) -> int:
    return len(prompt.ids) + prompt.max_new_bytes


def _stop_table(stops: Sequence[bytes]) -> np.ndarray:
    """Ids int32 [S, m], of few sizes; -1 before shorter ones, and rows of -2, which nothing is."""
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
    """Length of the longest end of a text that a stop string begins with."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    ends = (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stops))
    return next(ends, 0)
