"""Scores texts: `bltjax score --checkpoint=DIR --input=FILE`.

Prints nats, bits per byte, bytes and patches of each document, and all of it as JSON in the last
line. A file is a document, decompressed if need be, or, where it holds records (.jsonl, .parquet
and others), each of them is one. Documents are any bytes; a document's score does not depend on the
others.
"""

import json
import math
import sys

from absl import flags

from bltjax import cli
from bltjax.evaluation.patches import pictures
from bltjax.evaluation.patches.view import look
from bltjax.evaluation.texts import Bad, Texts, find_texts, read_input, read_stdin, told, unreadable
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import json_number, print_table

_COLUMNS = ("document", "bytes", "patches", "nats", "bits/byte")


def score(model, documents: list[bytes], show_patches: bool = False) -> dict:
    """Scores documents, prints a table of their scores, and returns them.

    show_patches: prints each document with its patches below the table. Raises ValueError where the
    model has none.
    """
    bar = progress_bar("scoring", sum(map(len, documents)))
    scores = model.score(documents, on_progress=bar.update)
    bar.close()
    nats, num_bytes = math.fsum(s.nats for s in scores), sum(s.num_bytes for s in scores)
    bits_per_byte = nats / math.log(2) / num_bytes if num_bytes else None
    rows = [
        (number, s.num_bytes, s.num_patches, f"{s.nats:.3f}", json_number(s.bits_per_byte))
        for number, s in enumerate(scores, 1)
    ]
    if len(scores) != 1:
        num_patches = sum(s.num_patches for s in scores)
        rows.append(("all", num_bytes, num_patches, f"{nats:.3f}", bits_per_byte))
    print_table(_COLUMNS, rows)
    for number, view in enumerate(look(model, documents) if show_patches else [], 1):
        print(f"\ndocument {number}:\n{pictures.terminal(view, colour=False)}")
    return dict(
        documents=[s._asdict() | dict(bits_per_byte=json_number(s.bits_per_byte)) for s in scores],
        nats=nats,
        num_bytes=num_bytes,
        bits_per_byte=bits_per_byte,
    )


def read_documents(chosen) -> tuple[list[bytes], Texts | None, list[Bad]]:
    """Reads the documents that the flags name, or each of their lines as one, without newline.

    Returns them, the files that they are of (None: standard input), and what could not be read.
    """
    bad: list[Bad] = []
    if chosen.input == "-":
        texts = None
        documents = [read_stdin(chosen.kind, chosen.max_bytes, bad)]
    else:
        kind = "text" if chosen.lines and chosen.kind == "auto" else chosen.kind
        options = dict(kind=kind, field=chosen.field, max_bytes=chosen.max_bytes)
        texts = find_texts(chosen.input, **options)
        documents = read_input(texts, bad)
    if chosen.lines:
        lines = (document.removesuffix(b"\n").split(b"\n") for document in documents if document)
        documents = [line for several in lines for line in several]
    return documents, texts, bad


def main(argv):
    cli.check_checkpoint_and_input(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    chosen = flags.FLAGS
    try:
        documents, texts, bad = read_documents(chosen)
        result = score(cli.open_model(), documents, chosen.show_patches)
        told(texts, bad)
    except (ValueError, KeyError, OSError) as error:
        cli.fail(error)
    print(json.dumps(result | unreadable(texts, bad)))


def define_flags():
    cli.define_model_flags()
    cli.define_text_flags("input")
    cli.define_path("input", "A file, a folder or a glob; - is standard input.")
    flags.DEFINE_bool("lines", False, "Each line is a document, without its newline.")
    flags.DEFINE_bool("show_patches", False, "Print each text too, cut with | at its patches.")


if __name__ == "__main__":
    cli.run(main, define_flags)
