"""The patches of a text, for `/v1/patches` and the page."""

import dataclasses

from bltjax.config import PatchingConfig
from bltjax.evaluation.patches.view import PatchView, look
from bltjax.inference.requests import check_has_threshold
from bltjax.patching.boundaries import needs_entropies
from bltjax.serving.errors import RequestError


def check_threshold(patching: PatchingConfig, threshold: float | None):
    """Raises RequestError for a threshold where the patching rule has none."""
    if threshold is not None:
        try:
            check_has_threshold(patching, threshold)
        except ValueError as error:
            raise RequestError(str(error), "threshold") from None


def show(model, text: bytes, threshold: float | None) -> dict:
    """Returns patches, entropies and threshold of a text."""
    patching = model.patching
    if threshold is not None:
        patching = dataclasses.replace(patching, threshold=threshold)
    (view,) = look(model, [text], patching)
    has_threshold = needs_entropies(patching)
    return dict(
        num_bytes=len(text),
        rule=patching.rule,
        threshold=patching.threshold if has_threshold else None,
        trained_threshold=model.patching.threshold if has_threshold else None,
        patches=_patches(view),
        entropies=None if view.entropies is None else [float(h) for h in view.entropies],
    )


def _patches(view: PatchView) -> list[dict]:
    pairs = zip(view.starts, view.patches, strict=True)
    return [
        dict(start=int(start), length=len(data), text=data.decode("utf-8", "replace"))
        for start, data in pairs
    ]
