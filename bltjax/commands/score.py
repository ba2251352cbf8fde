"""Scores texts: `bltjax score --checkpoint=DIR --input=FILE`.

Prints nats, bits per byte, bytes and patches of each document, and all of it as JSON in the last
line. Documents are any bytes; a document's score does not depend on the others.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
from absl import flags

from bltjax import cli
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import json_number, printable
from bltjax.vocabulary import PAD_ID, encode

MAX_SHOWN_BYTES = 1_000_000  # of a document whose patches are shown: they are found in one pass
_HEADER = f"{'document':>9} {'bytes':>10} {'patches':>9} {'nats':>13} {'bits/byte':>10}"


def score(model, documents: list[bytes], show_patches: bool = False) -> dict:
    """Prints a table of the documents' scores, and returns it.

    Raises ValueError where patches are to be shown of a model that has none, or of a text of more
    than MAX_SHOWN_BYTES.
    """
    longest = max(map(len, documents), default=0)
    if show_patches and longest > MAX_SHOWN_BYTES:
        raise ValueError(
            f"--show_patches is for documents of up to {MAX_SHOWN_BYTES} bytes, this one has "
            f"{longest}: leave it out, or give a part of the text"
        )
    bar = progress_bar("scoring", sum(map(len, documents)))
    scores = model.score(documents, on_progress=bar.update)
    bar.close()
    print(_HEADER)
    for number, (document, found) in enumerate(zip(documents, scores, strict=True), 1):
        print(_line(number, found.num_bytes, found.num_patches, found.nats))
        if show_patches:
            print("|".join(map(printable, patches(model, document))))
    nats, num_bytes = math.fsum(s.nats for s in scores), sum(s.num_bytes for s in scores)
    if len(scores) != 1:
        print(_line("all", num_bytes, sum(s.num_patches for s in scores), nats))
    return dict(
        documents=[s._asdict() | dict(bits_per_byte=json_number(s.bits_per_byte)) for s in scores],
        nats=nats,
        num_bytes=num_bytes,
        bits_per_byte=json_number(_bits_per_byte(nats, num_bytes)),
    )


def patches(model, document: bytes) -> list[bytes]:
    """The document cut where patches start; nothing is cut off, and none are empty."""
    ids = encode(document)
    # A power of two of positions, so that few lengths are compiled. What follows a text does not
    # move its patches.
    tokens = np.full((1, max(64, 1 << (len(ids) - 1).bit_length())), PAD_ID, np.int32)
    tokens[0, : len(ids)] = ids
    starts = np.cumsum(model.patch_lengths(tokens)[0]) - 1  # the first id is BOS
    cuts = [0, *(int(s) for s in starts if 0 < s < len(document)), len(document)]
    return [document[a:b] for a, b in itertools.pairwise(cuts) if b > a]


def read_documents(path: str, lines: bool = False) -> list[bytes]:
    """The file (`-`: stdin) as one document, or its lines, without newlines, as one each."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    if not lines:
        return [data]
    return data.removesuffix(b"\n").split(b"\n") if data else []


def main(argv):
    cli.check_checkpoint_and_input(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        documents = read_documents(flags.FLAGS.input, flags.FLAGS.lines)
        result = score(cli.open_model(), documents, flags.FLAGS.show_patches)
    except (ValueError, KeyError, OSError) as error:
        cli.fail(error)
    print(json.dumps(result))


def _line(name, num_bytes: int, num_patches: int, nats: float) -> str:
    bits = _bits_per_byte(nats, num_bytes)
    shown = "-" if math.isnan(bits) else f"{bits:.4f}"
    return f"{name:>9} {num_bytes:>10} {num_patches:>9} {nats:>13.3f} {shown:>10}"


def _bits_per_byte(nats: float, num_bytes: int) -> float:
    return nats / math.log(2) / num_bytes if num_bytes else math.nan


def define_flags():
    cli.define_model_flags()
    flags.DEFINE_string("input", None, "A file, which is one document; - is standard input.")
    flags.DEFINE_bool("lines", False, "Each line is a document, without its newline.")
    flags.DEFINE_bool("show_patches", False, "Print each text too, cut with | at its patches.")


if __name__ == "__main__":
    cli.run(main, define_flags)
