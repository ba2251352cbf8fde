"""What other coders make of files that are no text: n-grams, xz, FLAC, PNG, in bits per byte."""

import importlib.util
import io
import lzma
from collections.abc import Sequence

import numpy as np

from benchmarks.studies import raw_corpus
from bltjax.evaluation import ngram_baselines

ORDERS = (0, 1, 2, 3, 5)


def measured(kind: str, train: Sequence[bytes], held_out: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte of held-out files, by column; a coder that is not installed has none.

    order_N: n-gram models of the training files. entropy_2: of a held-out byte after the two before
    it, counted on the held-out files themselves, where rare contexts make it too low. xz: at its
    highest preset, one stream for all files. xz_trained: what it adds behind the training files.
    flac, png: file by file.
    """
    texts = b"".join(train), b"".join(held_out)
    by_order = ngram_baselines.witten_bell_bits_per_byte(*texts, ORDERS)
    size = len(texts[1])
    found = {f"order_{order}": bits for order, bits in by_order.items()}
    found |= dict(
        entropy_2=conditional_entropy(texts[1], 2),
        xz=8 * xz_bytes(texts[1]) / size,
        xz_trained=8 * (xz_bytes(texts[0] + texts[1]) - xz_bytes(texts[0])) / size,
    )
    coder = {"wav16": ("flac", flac_bytes), "wav8": ("flac", flac_bytes), "ppm": ("png", png_bytes)}
    if kind in coder:
        name, coded = coder[kind]
        sizes = [coded(data) for data in held_out]
        if None not in sizes:
            found[name] = 8 * sum(sizes) / size
    return found


def xz_bytes(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def conditional_entropy(data: bytes, order: int) -> float:
    """Bits of a byte after the `order` bytes before it, by its counts in the same data."""
    stream = np.frombuffer(data, np.uint8).astype(np.int64)
    contexts = sum(stream[i : stream.size - order + i] << 8 * (order - 1 - i) for i in range(order))
    joint = contexts << 8 | stream[order:]
    return _entropy(joint) - _entropy(contexts)


def _entropy(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def flac_bytes(data: bytes) -> int | None:
    """Bytes of a WAV file as FLAC at its highest level; None without soundfile."""
    if importlib.util.find_spec("soundfile") is None:
        return None
    import soundfile

    samples, rate = raw_corpus.pcm(data)
    subtype = "PCM_16"
    if samples.dtype == np.uint8:
        samples, subtype = (samples.astype(np.int16) - 128) << 8, "PCM_S8"
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="FLAC", subtype=subtype, compression_level=1.0)
    return len(out.getvalue())


def png_bytes(data: bytes) -> int:
    """Bytes of a picture as PNG, with the best of Pillow's settings."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "PNG", optimize=True)
    return len(out.getvalue())
