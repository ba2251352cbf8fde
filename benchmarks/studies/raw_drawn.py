"""Sounds, scores and pictures that are drawn by a seed, where no real ones are at hand.

A score is played as sound and written as MIDI. They stand in for real files in a trial; what is
measured on them says little, since their makers are simple.
"""

import itertools
import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

RATE = 8000  # samples of a second
BEAT = 0.4  # seconds
TICKS = 96  # of a beat
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))
WIDTH, HEIGHT = 200, 150  # of a picture


class Note(NamedTuple):
    beat: float
    length: float  # beats
    pitch: int  # as MIDI counts
    loudness: int  # 1 to 127
    channel: int


def score(seed: int, beats: int) -> list[Note]:
    """A melody over broken chords, in order of time."""
    draw = random.Random(seed)
    scale, key = draw.choice(SCALES), draw.randrange(48, 60)

    def pitch(step: int) -> int:
        return key + 12 * (step // 7) + scale[step % 7]

    notes, step, beat = [], 7, 0.0
    for bar, root in enumerate(draw.choices((0, 3, 4, 5), k=beats // 4)):
        for i in range(8):
            chord = root + (0, 2, 4, 2)[i % 4]
            notes.append(Note(4 * bar + i / 2, 0.5, pitch(chord) - 12, draw.randrange(50, 70), 1))
    while beat < beats:
        length = draw.choice((0.5, 0.5, 1.0, 1.0, 2.0))
        step = min(max(step + draw.choice((-2, -1, -1, 0, 1, 1, 2)), 5), 16)
        notes.append(Note(beat, min(length, beats - beat), pitch(step), draw.randrange(70, 110), 0))
        beat += length
    return sorted(notes)


def midi(notes: list[Note]) -> bytes:
    """A Standard MIDI File of format 0."""
    events = [(n.beat, b"%c%c%c" % (0x90 | n.channel, n.pitch, n.loudness)) for n in notes]
    events += [(n.beat + n.length, b"%c%c\x40" % (0x80 | n.channel, n.pitch)) for n in notes]
    track, now = bytearray(b"\x00\xff\x51\x03" + int(BEAT * 1e6).to_bytes(3, "big")), 0
    for beat, event in sorted(events):
        ticks = round(beat * TICKS)
        track += _varied(ticks - now) + event
        now = ticks
    track += b"\x00\xff\x2f\x00"
    return b"MThd" + struct.pack(">IHHH4sI", 6, 0, 1, TICKS, b"MTrk", len(track)) + bytes(track)


def _varied(value: int) -> bytes:
    """A number as MIDI writes it, seven bits a byte."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F | 0x80)
    return bytes(reversed(digits))


def played(notes: list[Note], seed: int) -> np.ndarray:
    """A score as samples, int16 [time]: decaying harmonics, and a little noise."""
    last = max(note.beat + note.length for note in notes)
    out = np.random.default_rng(seed).normal(0, 12, math.ceil((last * BEAT + 0.3) * RATE))
    for note in notes:
        time = np.arange(int((note.length * BEAT + 0.2) * RATE)) / RATE
        pitch = 440 * 2 ** ((note.pitch - 69) / 12)
        waves = sum(np.sin(2 * np.pi * k * pitch * time) / k**2 for k in range(1, 5))
        start = int(note.beat * BEAT * RATE)
        out[start : start + time.size] += 60 * note.loudness * np.exp(-4 * time) * waves
    return out.clip(-32768, 32767).round().astype(np.int16)


def picture(seed: int) -> np.ndarray:
    """Discs and bars before a sloping sky, with grain: uint8 [HEIGHT, WIDTH, 3]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    low, high = draw.uniform(0, 255, (2, 3))
    pixels = low + (high - low) * (y / HEIGHT)[..., None]
    for _ in range(12):
        left, top, size = draw.uniform(0, WIDTH), draw.uniform(0, HEIGHT), draw.uniform(5, 50)
        colour, slope = draw.uniform(0, 255, 3), draw.uniform(-1, 1)
        disc = (x - left) ** 2 + (y - top) ** 2 < size**2
        bar = abs(y - top + slope * (x - left)) < size / 5
        pixels[disc if draw.random() < 0.6 else bar] = colour
    pixels += draw.normal(0, 2, (HEIGHT, WIDTH, 1)) + draw.normal(0, 1, pixels.shape)
    return pixels.clip(0, 255).round().astype(np.uint8)


def sounds(write: Callable) -> Callable[[], Iterator[bytes]]:
    """Sound files without end; write(samples, rate) -> a file."""
    return lambda: (write(played(score(i, 16), i), RATE) for i in itertools.count())


def scores() -> Iterator[bytes]:
    """MIDI files without end, of the same music at greater length."""
    return (midi(score(i, 400)) for i in itertools.count())


def pictures(write: Callable) -> Callable[[], Iterator[bytes]]:
    """Pictures without end; write(pixels) -> a file."""
    return lambda: (write(picture(i)) for i in itertools.count())
