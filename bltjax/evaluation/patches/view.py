"""Finds the patches and entropies of texts, for pictures and tables."""

import dataclasses
from collections import Counter
from typing import NamedTuple

import numpy as np

from bltjax.config import PatchingConfig
from bltjax.patching import falling
from bltjax.patching.boundaries import needs_entropies, patch_starts, rule_of
from bltjax.vocabulary import encode

# Bytes of the longest patch in each row of a histogram; the last row has all longer ones too.
ROW_ENDS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64, 128, 256)


class PatchView(NamedTuple):
    """A text and its patches. Positions are those of its bytes; BOS and EOS have none."""

    text: bytes
    starts: np.ndarray  # int [P], the position of the first byte of each patch
    entropies: np.ndarray | None  # float32 [bytes], nats: entropy of the prediction of each byte
    levels: np.ndarray | None  # float32 [bytes], nats: a byte whose entropy is above opens a patch
    num_trained: int  # number of patches under the model's own settings

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of each patch, int [P]."""
        return np.diff(self.starts, append=len(self.text))

    @property
    def patches(self) -> list[bytes]:
        """Bytes of each patch."""
        return [self.text[s : s + n] for s, n in zip(self.starts, self.lengths, strict=True)]


def look(model, texts: list[bytes], patching: PatchingConfig | None = None) -> list[PatchView]:
    """Returns a view of each text, which does not depend on the other texts.

    patching: None for the model's own; settings of the entropy model are always its own. Raises
    ValueError for a model without patches, or without the entropy model that the rule needs.
    """
    trained, has_entropies = model.patching, model.entropy_config is not None
    patching = patching or trained
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
        view_of(text, i, h, patching, trained)
        for text, i, h in zip(texts, ids, entropies, strict=True)
    ]


def histogram(lengths: Counter) -> list[tuple[str, int]]:
    """Returns rows (bytes, number of patches), up to the row of the longest patch."""
    rows, first = [], 1
    for last in ROW_ENDS:
        if first > max(lengths, default=0):
            break
        is_end = last == ROW_ENDS[-1]
        count = sum(c for n, c in lengths.items() if n >= first and (n <= last or is_end))
        name = f"{first}" if first == last else f"{first}-{last}"
        rows.append((f"{first}+" if is_end else name, count))
        first = last + 1
    return rows


class Tally:
    """Counts over one or many texts."""

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

    def report(self) -> dict:
        """Returns plain numbers; None for a mean without anything to average."""
        num_bytes = sum(length * count for length, count in self.lengths.items())
        num_patches = self.lengths.total()
        return dict(
            files=self.num_texts,
            bytes=num_bytes,
            patches=num_patches,
            mean_patch_bytes=num_bytes / num_patches if num_patches else None,
            mean_entropy=self.nats / num_bytes if num_bytes and self.has_entropies else None,
        )


def view_of(text: bytes, ids, entropies, patching, trained) -> PatchView:
    """Returns a view of a text with ids int32 [S], BOS and EOS too; entropies [S] or None."""
    starts = _starts(patching, ids, entropies)
    num_trained = len(starts if trained == patching else _starts(trained, ids, entropies))
    if entropies is None:
        return PatchView(text, starts, None, None, num_trained)
    rule, of_bytes = rule_of(patching), entropies[: len(text)]  # the first is after BOS, of byte 0
    if rule.by_length:
        levels = _falling_levels(patching, ids, entropies)
    else:
        levels = _levels(patching, of_bytes)
    return PatchView(text, starts, of_bytes, levels, num_trained)


def _falling_levels(patching: PatchingConfig, ids, entropies) -> np.ndarray:
    """Returns what the entropy of each byte must exceed to start a patch, float32 [bytes]."""
    num_bytes = len(ids) - 2
    starts = _starts(dataclasses.replace(patching, max_patch_length=None), ids, entropies)
    opened = np.zeros(num_bytes + 1, np.int32)  # where the patch before each byte, and the end, did
    opened[starts + 1] = starts
    lengths = np.arange(num_bytes, dtype=np.int32) - np.maximum.accumulate(opened)[:-1]
    return falling.levels(patching.threshold, np.maximum(lengths, 1))


def _levels(patching: PatchingConfig, entropies) -> np.ndarray | None:
    """Returns the same under a rule by entropies alone; None under others."""
    levels = [  # a byte above all of them starts a patch
        np.float32(getattr(patching, threshold)) + entropies - score(entropies)
        for score, threshold in rule_of(patching).scores
    ]
    return np.maximum.reduce(levels) if levels else None


def _starts(patching: PatchingConfig, ids, entropies) -> np.ndarray:
    """Returns the bytes at which patches start: id s is byte s - 1, since BOS comes first."""
    return np.flatnonzero(patch_starts(patching, ids, entropies)[1 : len(ids) - 1])


def _entropies(model, ids: list[np.ndarray]) -> list[np.ndarray]:
    import jax  # late: it takes seconds

    from bltjax.evaluation.score import document_entropies

    entropy_model = model.entropy_config, model.params["entropy_model"]
    with jax.set_mesh(model.mesh):
        return document_entropies(*entropy_model, ids, model.patching.reset_at_newlines)
