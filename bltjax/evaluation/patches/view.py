"""Where patches start in a text and how hard each of its bytes was: what the pictures show."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from bltjax.config import PatchingConfig
from bltjax.patching.boundaries import needs_entropies, patch_starts, rule_of
from bltjax.vocabulary import encode

LONGEST_BAR = 16  # bytes; longer patches share the last row of a histogram


class PatchView(NamedTuple):
    """A text as the model cuts it. Its bytes alone are counted, BOS and EOS are not."""

    text: bytes
    starts: np.ndarray  # int [P], the first byte of each patch; bytes 0..starts[1]-1 are the first
    entropies: np.ndarray | None  # float32 [bytes], nats: how uncertain each was before it was read
    levels: np.ndarray | None  # float32 [bytes], nats: a byte above opens a patch; entropy rules
    num_trained: int  # patches under the settings that the model came with

    @property
    def lengths(self) -> np.ndarray:
        """int [P], bytes."""
        return np.diff(self.starts, append=len(self.text))

    @property
    def patches(self) -> list[bytes]:
        return [self.text[s : s + n] for s, n in zip(self.starts, self.lengths, strict=True)]


def look(model, texts: list[bytes], trained: PatchingConfig | None = None) -> list[PatchView]:
    """A view of each text, whatever texts come with it.

    trained: what `num_trained` counts with; None: `model.patching`, as everything else. Raises
    ValueError for a model without patches, or without the entropy model that its rule needs.
    """
    patching, has_entropies = model.patching, model.entropy_config is not None
    if model.config is None:
        raise ValueError(
            "this is an entropy model alone, it has no patches: give the checkpoint of a BLT"
        )
    if needs_entropies(patching) and not has_entropies:
        raise ValueError(
            f"patching rule {patching.rule!r} needs an entropy model and there is none: give "
            "--entropy_model=DIR"
        )
    ids = [encode(text) for text in texts]
    entropies = _entropies(model, ids) if has_entropies else [None] * len(ids)
    return [
        _view(text, i, h, patching, trained or patching)
        for text, i, h in zip(texts, ids, entropies, strict=True)
    ]


def histogram(lengths: Counter) -> list[tuple[str, int]]:
    """(bytes, patches of that many) for 1, 2, ... to the longest; from LONGEST_BAR on together."""
    longest = max(lengths, default=0)
    rows = [(str(n), lengths[n]) for n in range(1, min(longest, LONGEST_BAR) + 1)]
    if longest > LONGEST_BAR:
        count = sum(count for n, count in lengths.items() if n >= LONGEST_BAR)
        rows[-1] = (f"{LONGEST_BAR}+", count)
    return rows


class Tally:
    """What is counted of one or many texts."""

    def __init__(self):
        self.num_texts = self.num_trained = 0
        self.lengths = Counter()  # of patches, in bytes
        self.nats = 0.0
        self.has_entropies = True

    def add(self, view: PatchView):
        self.num_texts += 1
        self.num_trained += view.num_trained
        self.lengths.update(view.lengths.tolist())
        if view.entropies is None:
            self.has_entropies = False
        else:
            self.nats += float(view.entropies.sum(dtype=np.float64))

    def merge(self, other: "Tally"):
        self.num_texts += other.num_texts
        self.num_trained += other.num_trained
        self.lengths.update(other.lengths)
        self.has_entropies &= other.has_entropies
        self.nats += other.nats

    def report(self) -> dict:
        """Plain numbers; None for means of nothing."""
        num_bytes = sum(length * count for length, count in self.lengths.items())
        num_patches = self.lengths.total()
        return dict(
            files=self.num_texts,
            bytes=num_bytes,
            patches=num_patches,
            mean_patch_bytes=num_bytes / num_patches if num_patches else None,
            mean_entropy=self.nats / num_bytes if num_bytes and self.has_entropies else None,
        )


def _view(text, ids, entropies, patching, trained) -> PatchView:
    starts = _starts(patching, ids, entropies)
    num_trained = len(starts if trained == patching else _starts(trained, ids, entropies))
    if entropies is None:
        return PatchView(text, starts, None, None, num_trained)
    entropies = entropies[: len(text)]  # the first is after BOS, about byte 0
    levels = [  # a byte above all of them starts a patch
        np.float32(getattr(patching, threshold)) + entropies - score(entropies)
        for score, threshold in rule_of(patching).scores
    ]
    highest = np.maximum.reduce(levels) if levels else None
    return PatchView(text, starts, entropies, highest, num_trained)


def _starts(patching: PatchingConfig, ids, entropies) -> np.ndarray:
    """The bytes at which patches start. The id at s is byte s-1, for BOS comes first."""
    return np.flatnonzero(patch_starts(patching, ids, entropies)[1 : len(ids) - 1])


def _entropies(model, ids: list[np.ndarray]) -> list[np.ndarray]:
    import jax  # late: it takes seconds

    from bltjax.evaluation.score import document_entropies

    with jax.set_mesh(model.mesh):
        return document_entropies(
            model.entropy_config,
            model.params["entropy_model"],
            ids,
            model.patching.reset_at_newlines,
        )
