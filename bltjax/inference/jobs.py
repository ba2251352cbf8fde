"""Requests to the engine, and its answers."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bltjax.inference.sampling import Sampling, check_number, is_whole, make_plain
from bltjax.runtime.terminal import short

CHUNK = 128  # positions of a prompt that are read at once, at least


@dataclass(frozen=True)
class BlockDrafts:
    """Blocks that a decoder with `blt.diffusion_block` fills in; see `block_drafts.py`."""

    size: int  # bytes of a block, at most those of training
    verified: bool = True  # BLT-DV; else BLT-D: all drafts stand
    # What is kept of a pass: bytes with a higher probability, of blocks that are verified up to the
    # first other one; 0: all.
    confidence: float = 0.0
    entropy_bound: float | None = None  # instead: the surest bytes, up to so many nats together
    # Passes of a block at most: a draft ends before the first byte that is not kept by then. None:
    # each pass keeps one byte at least, until all are.
    max_passes: int | None = None

    def __post_init__(self):
        make_plain(self)
        if not (is_whole(self.size) and self.size >= 2):
            raise ValueError(f"size={short(self.size)} of blocks must be a whole number from 2")
        check_number("confidence", self.confidence, lambda p: 0 <= p < 1, "from 0, below 1")
        if self.entropy_bound is not None:
            check_number(
                "entropy_bound",
                self.entropy_bound,
                lambda nats: 0 <= nats < math.inf,
                "a number 0 or more, or None",
            )

        if self.max_passes is not None and not (is_whole(self.max_passes) and self.max_passes > 0):
            raise ValueError(
                f"max_passes={short(self.max_passes)} must be a whole number from 1, or None"
            )

    @property
    def keeps_all(self) -> bool:
        """Tells whether all of a block is kept of the first pass."""
        return self.confidence == 0 and self.entropy_bound is None


@dataclass(frozen=True)
class Decoding:
    """Options of speed and memory; they do not change what greedy generation yields."""

    batch_size: int = 32  # rows at once
    max_drafts: int = 0  # bytes drafted past the end of a patch (self-speculation); 0: none
    quorum: float = 0.5  # share of the rows that wait before the global stack runs
    min_patch_bytes: float = 1.0  # mean length of patches that there is room for; 1: of any
    blocks: BlockDrafts | None = None  # bytes that are filled in together; not beside drafts

    def __post_init__(self):
        make_plain(self)
        if self.blocks and self.max_drafts:
            raise ValueError(
                f"max_drafts={self.max_drafts} and blocks={self.blocks.size} are two ways to "
                "draft: give one"
            )
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

    @property
    def ahead(self) -> int:
        """Positions that a row may write beyond its text."""
        return self.blocks.size if self.blocks else self.max_drafts

    def with_rows(self, rows: int) -> "Decoding":
        """Returns the options with another batch size."""
        return dataclasses.replace(self, batch_size=rows)


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


class Job(NamedTuple):
    """A request with all that its caller wants of it."""

    request: Request
    sampling: Sampling = Sampling()
    stops: Sequence[bytes] = ()
    log_probs: bool = False  # the model's own prediction of each byte, before sampling changes it
    threshold: float | None = None  # nats, of the patching rule; None: the trained one
    shared: int = 0  # first ids of the prompt that later prompts are likely to begin with, too


class Counts(NamedTuple):
    """Work that a generation took."""

    new_bytes: int = 0
    steps: int = 0  # of everything but the global stack; an id for each row in one
    patches: int = 0  # that the global stack read
    prompt_patches: int = 0  # those of them that the prompts held
    global_calls: int = 0  # of the global stack after the prompts, for all rows of a batch at once
    drafted: int = 0
    accepted: int = 0
    fills: int = 0  # passes of the decoder that filled in blocks
    in_patch: int = 0  # drafts of blocks that the patch had room for

    def __add__(self, other):
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Piece(NamedTuple):
    """Text of a job that is new since its last piece.

    What may begin a stop string is held back; EOS and stop strings are never shown.
    """

    key: int  # that `Scheduler.submit` returned
    text: bytes
    log_p: np.ndarray | None  # float32 [len(text), V], with Job.log_probs
    finish: str | None  # None: goes on; "stop": EOS or a stop string; "length"
    counts: Counts  # of this job so far; steps and global calls served its neighbours, too
