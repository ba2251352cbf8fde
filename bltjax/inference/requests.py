"""Requests as callers make them, checked: options by name, and numbers for each prompt."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from bltjax.config import PatchingConfig
from bltjax.inference.decoders import Decoder
from bltjax.inference.jobs import BlockDrafts, Decoding, Request
from bltjax.inference.sampling import LARGEST, Sampling, check_number, is_whole, plain
from bltjax.patching.boundaries import needs_entropies
from bltjax.runtime.terminal import short
from bltjax.vocabulary import TEXT, as_list


def configure(
    decoder: Decoder,
    sampling: Sampling,
    stop: str | bytes | Sequence[str | bytes] = (),
    threshold: float | None = None,
    decoding: Decoding = Decoding(),
) -> tuple[Decoder, list[bytes]]:
    """Returns the decoder, with `threshold` in the place of its own, and the stop strings.

    Raises ValueError for what the decoder does not have, or a value that makes no sense.
    """
    if threshold is not None:
        decoder = _with_threshold(decoder, threshold)
    if decoding.max_drafts and not decoder.ids_are_bytes:
        raise ValueError(
            f"max_drafts={decoding.max_drafts}: a model of tokens has no patches to draft past"
        )
    if decoding.blocks:
        _check_blocks(decoder, decoding.blocks.size)
    if sampling.valid_utf8 and not decoder.ids_are_bytes:
        raise ValueError(
            "valid_utf8=True needs a model of bytes, as tokens may hold half a character: decode "
            'the text with errors="replace" instead'
        )
    if not isinstance(stop, (*TEXT, Sequence)):
        raise ValueError(f"stop is a {type(stop).__name__}: give bytes, str, or a list of them")
    stops = [stop] if isinstance(stop, TEXT) else stop
    return decoder, [_stop_bytes(text) for text in stops]


def as_blocks(blocks: int | BlockDrafts) -> BlockDrafts | None:
    """Returns the blocks that an option asks for. Raises ValueError for no number of bytes."""
    if isinstance(blocks, BlockDrafts):
        return blocks
    blocks = plain(blocks)
    if not is_whole(blocks) or blocks == 1 or blocks < 0:
        raise ValueError(
            f"blocks={short(blocks)} must be a whole number of bytes from 2, or 0 for none"
        )
    return BlockDrafts(blocks) if blocks else None


def _check_blocks(decoder: Decoder, size: int):
    """Raises ValueError for blocks that the decoder was not trained to fill in."""
    trained = decoder.blt.diffusion_block if decoder.ids_are_bytes else 0
    if size > trained:
        remedy = f"give at most {trained}" if trained else "leave blocks out, or train with them"
        raise ValueError(
            f"blocks={size}: the decoder was trained to fill in blocks of {trained} bytes "
            f"(blt.diffusion_block): {remedy}"
        )


def _stop_bytes(text) -> bytes:
    """Returns the bytes of a stop string. Raises ValueError for one that no text can hold."""
    if not isinstance(text, TEXT):
        raise ValueError(f"stop holds a {type(text).__name__}: give bytes or str")
    try:
        found = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError:
        raise ValueError(
            f"stop holds {text!r}, of which no bytes can be made: give bytes"
        ) from None
    if not found:
        raise ValueError("stop holds an empty string, with which every text ends: leave it out")
    return found


def check_has_threshold(patching: PatchingConfig, threshold: float):
    """Raises ValueError where the patching rule has no threshold that another could replace."""
    if not needs_entropies(patching):
        raise ValueError(
            f"threshold={threshold}: the patching rule {patching.rule!r} has none: leave it out"
        )


def _with_threshold(decoder: Decoder, threshold: float) -> Decoder:
    patching = getattr(decoder, "patching", None)
    if patching is None:
        raise ValueError(f"threshold={threshold}: a model of tokens has no patches")
    threshold = plain(threshold)
    check_number("threshold", threshold, lambda t: abs(t) < math.inf, "finite, a number of nats")
    threshold = float(max(-LARGEST, min(threshold, LARGEST)))
    check_has_threshold(patching, threshold)
    patching = dataclasses.replace(patching, threshold=threshold)
    return dataclasses.replace(decoder, patching=patching)


def make_requests(
    decoder: Decoder,
    prompts: Iterable[str | bytes],
    max_new_bytes: int | Sequence[int],
    seed: int | Sequence[int],
    trained: int | None,
) -> list[Request]:
    """Returns a request for each prompt; max_new_bytes and seed: one number, or one for each.

    trained: positions of a row in training, where known; warns of texts that may get longer. Raises
    ValueError for prompts that are no list of str or bytes, and for numbers that make no sense.
    """
    prompts = as_list("prompts", prompts)
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, TEXT):
            raise ValueError(f"prompts[{i}] is {type(prompt).__name__}: give bytes or str")
    limits = _each("max_new_bytes", max_new_bytes, len(prompts), 2**30)
    seeds = _each("seed", seed, len(prompts), 2**32)
    requests = [
        Request(decoder.encode(prompt), *numbers)
        for prompt, *numbers in zip(prompts, limits, seeds, strict=True)
    ]
    # How many tokens a number of bytes takes is not known before.
    lengths = [r.max_length if decoder.ids_are_bytes else len(r.ids) for r in requests]
    longest, unit = max(lengths, default=0), "bytes" if decoder.ids_are_bytes else "tokens"
    if trained is not None and longest > trained:
        warnings.warn(
            f"a text may get {longest} {unit} long, and the model was trained on {trained}: "
            "shorten the prompt or lower max_new_bytes to stay within what it has seen",
            stacklevel=4,
        )
    return requests


def _each(name: str, value, count: int, limit: int) -> list[int]:
    """Returns a number below `limit` for each prompt, from one for all or one for each."""
    if hasattr(value, "dtype"):  # arrays, and NumPy's numbers
        value = np.asarray(value).tolist()
    is_list = isinstance(value, Sequence) and not isinstance(value, TEXT)
    values = list(value) if is_list else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} values for {count} prompts: give one for each")
    for number in values:
        if not (is_whole(number) and 0 <= number < limit):
            raise ValueError(f"{name}={short(number)} must be a whole number from 0, below {limit}")
    return [int(number) for number in values]
