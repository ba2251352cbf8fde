"""Files that are no text, for `not_text`: those of a directory, of Debian packages, or drawn.

Kinds, each a directory of files with one ending:
  wav16     PCM of 16 bits; wav8: the same sounds rounded to 8 bits
  ppm       pictures of 24 bits a pixel, made smaller by whole factors where they are large
  midi      Standard MIDI Files, those inside of Doom's WAD files too
  elf       programs and shared libraries
"""

import hashlib
import io
import os
import shutil
import struct
import subprocess
import sysconfig
import wave
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.studies import raw_drawn

LARGEST_READ = 64_000_000  # of a file that is looked into
SMALLEST = 512
BLANK = 0.02  # of a file: what zlib leaves of it where it says next to nothing
PICTURE_SIDE, LEAST_SIDE = 240, 96  # pixels of the longer side, about; of the shorter at least
# What `--corpus=debian` fetches. Speech of 8 kHz (CC-BY-SA 3.0, CC-BY 3.0); photographs (CC-BY 4.0,
# CC-BY-SA 3.0 and 4.0, CC0); music of two games (GPL 2, GPL 3 or later), and of a third, in its
# WADs (BSD); programs (GPL 2 or later, GPL 3 or later).
PACKAGES = (
    "asterisk-core-sounds-en-wav",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "openttd-openmsx",
    "planetblupi-music-midi",
    "freedoom",
    "coreutils",
    "util-linux",
    "findutils",
    "diffutils",
    "gzip",
    "sed",
    "grep",
)
DRAWN = "drawn"
DEBIAN = "debian"


class Kind(NamedTuple):
    """A kind of file. With either patching rule a patch has `patch` bytes on average."""

    name: str
    what: str
    patch: int  # two samples of 16 bits, four of 8, a pixel
    ending: str
    find: Callable[[bytes], list[bytes]]  # what a file of another form gives of the kind
    draw: Callable[[], Iterator[bytes]]  # files, as many as are taken
    largest: int  # bytes of a file; larger ones are left out
    rules: tuple[str, ...] = ("entropy", "static")
    share: float = 1.0  # of the bytes of the other kinds


def pcm(data: bytes) -> tuple[np.ndarray, int] | None:
    """Samples [time, channels] of a WAV file, int16 or uint8, and their rate; None for others."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            frames, rate = file.readframes(file.getnframes()), file.getframerate()
    except (wave.Error, EOFError):
        return None
    if width not in (1, 2):
        return None
    samples = np.frombuffer(frames, np.uint8 if width == 1 else "<i2")
    return samples[: samples.size // channels * channels].reshape(-1, channels), rate


def wav(samples: np.ndarray, rate: int) -> bytes:
    """A WAV file of samples [time] or [time, channels], int16 or uint8."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.astype(samples.dtype.newbyteorder("<")).tobytes())
    return out.getvalue()


def rounded(samples: np.ndarray) -> np.ndarray:
    """Samples int16 as uint8, as WAV has them: 128 is silence."""
    return ((samples.astype(np.int32) + 128 >> 8).clip(-128, 127) + 128).astype(np.uint8)


def ppm(pixels: np.ndarray) -> bytes:
    """A PPM file of uint8 [height, width, 3].

    Blanks in its header make that leave 2 when divided by 3: static patches of three bytes, which
    count BOS too, are pixels then.
    """
    height, width, _ = pixels.shape
    size, end = f"P6\n{width} {height}\n", "255\n"
    blanks = " " * ((2 - len(size + end)) % 3)
    return (size + blanks + end).encode() + pixels.tobytes()


def _sounds(data: bytes) -> list[bytes]:
    found = pcm(data) if data[:4] == b"RIFF" else None
    return [wav(*found)] if found and found[0].dtype != np.uint8 else []


def _small_sounds(data: bytes) -> list[bytes]:
    found = pcm(data) if data[:4] == b"RIFF" else None
    if not found:
        return []
    samples, rate = found
    return [wav(samples if samples.dtype == np.uint8 else rounded(samples), rate)]


def _pictures(data: bytes) -> list[bytes]:
    if not data.startswith((b"P6", b"BM", b"\x89PNG", b"\xff\xd8\xff")):
        return []
    from PIL import Image  # late: it comes with matplotlib

    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return []
    # Of a JPEG at least every second pixel is averaged away, and with it what its blocks leave.
    least = 2 if data.startswith(b"\xff\xd8\xff") else 1
    factor = max(least, round(max(picture.size) / PICTURE_SIDE))
    return (
        [ppm(np.asarray(picture.reduce(factor)))]
        if min(picture.size) >= LEAST_SIDE * factor
        else []
    )


def _music(data: bytes) -> list[bytes]:
    if data[:4] == b"MThd":
        return [data]
    return [lump for lump in _lumps(data) if lump[:4] == b"MThd"]


def _lumps(data: bytes) -> Iterator[bytes]:
    """The parts of a WAD file."""
    if data[:4] not in (b"IWAD", b"PWAD") or len(data) < 12:
        return
    count, table = struct.unpack_from("<ii", data, 4)
    if count < 0 or table < 0 or table + 16 * count > len(data):
        return
    for i in range(count):
        start, size = struct.unpack_from("<ii", data, table + 16 * i)
        yield data[start : start + size]


def _programs(data: bytes) -> list[bytes]:
    return [data] if data[:4] == b"\x7fELF" else []


def _local_programs() -> Iterator[bytes]:
    """The extension modules of the running Python, and what else is among a machine's programs."""
    places = [sysconfig.get_config_var("DESTSHARED"), sysconfig.get_path("platlib"), "/usr/bin"]
    for place in filter(None, places):
        for path in files_below(Path(place)):
            yield from _programs(path.read_bytes() if _is_elf(path) else b"")


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("wav16", "sound, 16 bits", 4, ".wav", _sounds, raw_drawn.sounds(wav), 200_000),
        Kind(
            "wav8",
            "the same sound, 8 bits",
            4,
            ".wav",
            _small_sounds,
            raw_drawn.sounds(lambda samples, rate: wav(rounded(samples), rate)),
            100_000,
            share=0.5,
        ),
        Kind("ppm", "pictures, 24 bits", 3, ".ppm", _pictures, raw_drawn.pictures(ppm), 200_000),
        Kind("midi", "music as notes", 4, ".mid", _music, raw_drawn.scores, 64_000, ("entropy",)),
        Kind("elf", "programs", 4, "", _programs, _local_programs, 200_000, ("entropy",)),
    )
}


def make(directory: Path, corpus: str, names: list[str], num_bytes: int) -> dict[str, dict]:
    """Fills DIRECTORY/KIND with about `num_bytes` of each kind -> what each is.

    corpus: a directory, "debian" or "drawn". What a directory lacks is drawn. Raises ValueError
    where packages cannot be had.
    """
    wanted = {name: int(num_bytes * KINDS[name].share) for name in names}
    found = {name: [] for name in names}
    if corpus != DRAWN:
        found = gather(fetched(directory / DEBIAN) if corpus == DEBIAN else Path(corpus), wanted)
    described = {}
    for name, files in found.items():
        origin = corpus
        if not files:
            origin = "this machine's" if name == "elf" else DRAWN
            files = list(_drawn(KINDS[name], wanted[name]))
        size = sum(len(data) for _, data in files)
        described[name] = dict(origin=origin, files=len(files), bytes=size)
        _write(directory / name, KINDS[name].ending, files)
    return described


def gather(root: Path, wanted: dict[str, int]) -> dict[str, list[tuple[str, bytes]]]:
    """Files of each kind below a directory, once each: (name, bytes), about so many bytes.

    Which ones is drawn by the hashes of their names.
    """
    found, seen = {name: [] for name in wanted}, {name: set() for name in wanted}
    missing = dict(wanted)
    for key, path in sorted((_digest(str(p.relative_to(root))), p) for p in files_below(root)):
        if max(missing.values()) <= 0:
            break
        data = path.read_bytes() if path.stat().st_size <= LARGEST_READ else b""
        for name in [name for name, size in missing.items() if size > 0]:
            for i, part in enumerate(KINDS[name].find(data)):
                if _fits(part, KINDS[name]) and part not in seen[name]:
                    seen[name].add(part)
                    found[name].append((f"{key}-{i:03d}", part))
                    missing[name] -= len(part)
    return found


def _fits(data: bytes, kind: Kind) -> bool:
    """Whether a file is of a fitting size, and no silence or empty picture."""
    if not SMALLEST <= len(data) <= kind.largest:
        return False
    return len(zlib.compress(data, 1)) > BLANK * len(data)


def _drawn(kind: Kind, num_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Files that fit, with names; the last of them reaches so many bytes."""
    for i, data in enumerate(kind.draw()):
        if num_bytes <= 0:
            return
        if _fits(data, kind):
            num_bytes -= len(data)
            yield f"{i:06d}", data


def _digest(name: str) -> str:
    return hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()


def _write(directory: Path, ending: str, files: list[tuple[str, bytes]]):
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for key, data in files:
        (partial / f"{key}{ending}").write_bytes(data)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def files_below(root: Path) -> Iterator[Path]:
    """Regular files of a directory, no links, in the order of their names."""
    if root.is_file():
        yield root
    for directory, inner, names in os.walk(root):
        inner.sort()
        for name in sorted(names):
            path = Path(directory, name)
            if not path.is_symlink() and path.is_file() and os.access(path, os.R_OK):
                yield path


def fetched(directory: Path) -> Path:
    """Downloads and unpacks PACKAGES, none of which is installed -> where. Raises ValueError."""
    done = directory / "files"
    if done.exists():
        return done
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ValueError(
            "--corpus=debian takes apt-get and dpkg-deb, which are not here: give a directory"
        )
    partial = directory / "files.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _call(["apt-get", "download", *PACKAGES], directory)
    for package in sorted(directory.glob("*.deb")):
        _call(["dpkg-deb", "-x", package.name, str(partial.absolute())], directory)
    partial.rename(done)
    return done


def _call(command: list[str], directory: Path):
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ValueError(f"{' '.join(command[:2])}: {last[0]}: give another --corpus")
