"""Patches of files that are no text: below a waveform, on a picture, along the bytes of a file."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.studies import raw_corpus, raw_parts
from benchmarks.studies.pages import COLOURS
from benchmarks.studies.raw_parts import Costs

SAMPLES = 96  # of a waveform
STRIP = 56  # bytes in a row
STRIPS = 6
SHADES = ("#dbe7f5", "#f8e3c5")  # of patches, in turn


def draw(path: Path, kind: str, data: bytes, found: Costs):
    """The patches of a file as a PNG, in the manner of its kind."""
    drawn = dict(wav16=_sound, wav8=_sound, ppm=_picture).get(kind, _strips)
    figure = drawn(kind, data, found)
    figure.savefig(path, dpi=75)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # late: it is no requirement

    return Figure(figsize=(width, height), layout="constrained")


def _sound(kind: str, data: bytes, found: Costs):
    """A piece of a waveform and, below it, the cost of its bytes; patches are bands over both."""
    samples, rate = raw_corpus.pcm(data)
    width = samples.dtype.itemsize * samples.shape[1]
    head = int(np.argmax(raw_parts.parts(kind, data) != "header"))
    first = _loudest(samples[:, 0].astype(float), SAMPLES)
    piece = slice(head + first * width, head + (first + SAMPLES) * width)
    at = first + np.arange(piece.stop - piece.start) / width
    figure = _figure(11, 5)
    above, below = figure.subplots(2, sharex=True)
    above.plot(first + 0.5 + np.arange(SAMPLES), samples[first : first + SAMPLES, 0], ".-k", lw=1)
    above.set_ylabel("sample")
    _shade((above, below), at, 1 / width, found.starts[piece], first + SAMPLES)
    names = raw_parts.parts(kind, data)[piece]
    for name, colour in zip(dict.fromkeys(names), COLOURS, strict=False):
        own = names == name
        below.bar(
            at[own], found.bits[piece][own], 1 / width, align="edge", color=colour, label=name
        )
    _entropy_line(below, at + 0.5 / width, found, piece)
    below.set_xlabel(f"sample, {rate} a second")
    below.set_xlim(first, first + SAMPLES)
    figure.legend(*below.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _loudest(samples: np.ndarray, size: int) -> int:
    """Where a piece of so many samples varies most."""
    steps = np.abs(np.diff(samples, prepend=samples[:1])).cumsum()
    return int(np.argmax(steps[size:] - steps[:-size])) if len(steps) > size else 0


def _shade(axes: Sequence, at: np.ndarray, width: float, starts: np.ndarray, end: float):
    """Patches as bands in two shades; at: the left edge of each byte."""
    edges = [at[0], *at[1:][starts[1:]], end]
    for i, (left, right) in enumerate(itertools.pairwise(edges)):
        for one in axes:
            one.axvspan(left, right, color=SHADES[i % 2], lw=0, zorder=0)


def _entropy_line(axes, at: np.ndarray, found: Costs, piece: slice):
    if found.entropies is not None:
        axes.plot(at, found.entropies[piece], "-", color="black", lw=1, label="entropy")
    axes.set_ylabel("bits")
    axes.set_ylim(0, 12)


def _picture(kind: str, data: bytes, found: Costs):
    """A picture, the entropies of its pixels, their bits under the BLT, and where patches start."""
    names = raw_parts.parts(kind, data)
    head = int(np.argmax(names != "header"))
    _, width, height, _ = data[:head].split()
    shape = int(height), int(width), 3
    pixels = np.frombuffer(data[head:], np.uint8).reshape(shape)
    panels = [("the picture", pixels)]
    if found.entropies is not None:
        panels.append(("entropy, bits a pixel", found.entropies[head:].reshape(shape).sum(-1)))
    panels.append(("bits a pixel under the BLT", found.bits[head:].reshape(shape).sum(-1)))
    panels.append(("patches that start in a pixel", found.starts[head:].reshape(shape).sum(-1)))
    tall = 11 * shape[0] / shape[1] / 2 + 0.5
    figure = _figure(11, 2 * tall if len(panels) > 2 else tall)
    for axes, (title, values) in zip(figure.subplots(2, 2).flat, panels, strict=False):
        shown = axes.imshow(values, cmap="magma")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
        if values.ndim == 2:
            figure.colorbar(shown, ax=axes, fraction=0.04)
    return figure


def _strips(kind: str, data: bytes, found: Costs):
    """Rows of bytes, one from each of the largest parts: patches, bits, entropies."""
    names = raw_parts.parts(kind, data)
    places = _places(kind, names)
    figure = _figure(13, 1.35 * len(places) + 0.5)
    for axes, (title, first) in zip(np.ravel(figure.subplots(len(places))), places, strict=True):
        piece = slice(first, min(first + STRIP, len(data)))
        at = np.arange(piece.start, piece.stop)
        _shade((axes,), at, 1.0, found.starts[piece], piece.stop)
        axes.bar(at, found.bits[piece], 0.8, align="edge", color=COLOURS[0], label="bits")
        _entropy_line(axes, at + 0.4, found, piece)
        axes.set_xlim(piece.start, piece.start + STRIP)
        axes.set_xticks(at + 0.4, [f"{b:02x}" for b in data[piece]], family="monospace", fontsize=7)
        axes.tick_params(axis="x", length=0)
        axes.set_title(f"{title}, from byte {first}", fontsize=9, loc="left")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _places(kind: str, names: np.ndarray) -> list[tuple[str, int]]:
    """(what is there, first byte): of a program's parts the middles, else evenly spread."""
    if kind != "elf":
        step = max(len(names) // STRIPS, STRIP)
        return [("", i) for i in range(0, max(len(names) - STRIP, 1), step)][:STRIPS]
    found = {}
    for name in dict.fromkeys(names):
        own = np.flatnonzero(names == name)
        found[str(name)] = len(own), int(own[len(own) // 2])
    largest = sorted(found, key=lambda name: -found[name][0])[:STRIPS]
    return sorted(((name, found[name][1]) for name in largest), key=lambda place: place[1])
