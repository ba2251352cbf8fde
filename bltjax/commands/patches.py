"""Shows the patches of a text: `bltjax patches --checkpoint=DIR --input=FILE`.

Prints the text with its patches, their lengths, and, with --png and --html, the entropy of each
byte. For a folder, a glob or a file of records it prints a table: bytes per patch of each subfolder
(a language, a source) and file. Any bytes are text. The last line is all of it as JSON.
"""

import dataclasses
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

from absl import flags

from bltjax import cli
from bltjax.config import PatchingConfig
from bltjax.evaluation.patches import pictures
from bltjax.evaluation.patches.tables import result_of, show_table, show_text
from bltjax.evaluation.patches.view import PatchView
from bltjax.evaluation.texts import (
    Bad,
    Texts,
    find_texts,
    read_input,
    read_stdin,
    told,
    unreadable,
)
from bltjax.patching.boundaries import needs_entropies
from bltjax.runtime.files import replacing
from bltjax.runtime.paths import is_remote
from bltjax.runtime.terminal import printable_name

MAX_SHOWN_BYTES = 1_000_000  # of a text that is shown: pages of more are slow to look at


def read_shown(chosen, texts: Texts | None, bad: list[Bad]) -> bytes:
    """The text to show, of a file or, without `texts`, of standard input.

    Raises ValueError where it is longer than MAX_SHOWN_BYTES.
    """
    most = MAX_SHOWN_BYTES + 1
    limit = most if chosen.max_bytes is None else min(chosen.max_bytes, most)
    if texts is None:
        text = read_stdin(chosen.kind, limit, bad)
    else:
        (text,) = read_input(texts._replace(share=limit), bad)
    if len(text) > MAX_SHOWN_BYTES:
        raise ValueError(
            f"{chosen.input} has more than the {MAX_SHOWN_BYTES} bytes that can be shown: give "
            f"--max_bytes={MAX_SHOWN_BYTES} for its beginning, or a folder for a table only"
        )
    return text


def with_threshold(patching: PatchingConfig, threshold: float) -> PatchingConfig:
    """The same rule with another threshold. Raises ValueError for rules that have none."""
    if not needs_entropies(patching):
        raise ValueError(
            f"patching rule {patching.rule!r} has no threshold: leave out --threshold={threshold}"
        )
    if not math.isfinite(threshold):
        raise ValueError(f"--threshold={threshold} must be a finite number of nats")
    return dataclasses.replace(patching, threshold=threshold)


def run(chosen) -> dict:
    """Shows what the flags ask for; returns the content of the last line."""
    texts, bad = None, []
    if chosen.input != "-":
        options = dict(kind=chosen.kind, field=chosen.field, max_bytes=chosen.max_bytes)
        texts = find_texts(chosen.input, **options, files_apart=True)
    is_table = texts is not None and (os.path.isdir(texts.path) or not texts.is_one_text())
    _check_targets(chosen, is_table)
    text = None if is_table else read_shown(chosen, texts, bad)
    model = cli.open_model()
    patching = model.patching
    if chosen.threshold is not None:
        patching = with_threshold(patching, chosen.threshold)
    if is_table:
        total, rows = show_table(model, texts, patching, bad)
    else:
        name = "standard input" if chosen.input == "-" else printable_name(Path(chosen.input).name)
        view, total, facts = show_text(model, text, patching, _colour(chosen.color))
        rows = [dict(name=chosen.input) | total.report()]
    print("\n".join(["", "bytes of a patch", *pictures.histogram_lines(total.lengths)]))
    if not is_table:
        save(view, name, facts, chosen.png, chosen.html)
    told(texts, bad)
    return result_of(total, patching, model.patching) | dict(files=rows, **unreadable(texts, bad))


def save(view: PatchView, name: str, facts: list[str], png: str | None, page: str | None):
    """Writes the pictures that are asked for, whole or not at all."""
    if png is not None:
        with replacing(Path(png)) as file:
            pictures.figure(view, name, facts).savefig(file, format="png")
        print(f"wrote {printable_name(png)}")
    if page is not None:
        with replacing(Path(page)) as file:
            file.write(pictures.html_page(view, name, facts).encode())
        print(f"wrote {printable_name(page)}")


def main(argv):
    cli.check_checkpoint_and_input(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result = run(flags.FLAGS)
    except (ValueError, KeyError, OSError) as error:
        cli.fail(error)
    print(json.dumps(result))


def _check_targets(chosen, is_table: bool):
    """A picture that cannot be written shows before the model is loaded."""
    for flag in ("png", "html"):
        target = getattr(chosen, flag)
        if target is None:
            continue
        if is_table:
            raise ValueError(f"--{flag} shows one text, {chosen.input} is more: give a file")
        folder = Path(target).parent
        if is_remote(target):
            raise ValueError(f"--{flag}={target} is in a bucket: give a file on this machine")
        if not folder.is_dir():
            raise ValueError(f"--{flag}={target} is in no folder: make {folder}")
        if Path(target).is_dir():
            raise ValueError(f"--{flag}={target} is a folder: give a file in it")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"--{flag}={target}: {folder} is not writable: choose another")
    if chosen.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--png needs matplotlib: pip install 'bltjax[plots]'")


def _colour(when: str) -> bool:
    if when != "auto":
        return when == "always"
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def define_flags():
    cli.define_model_flags()
    cli.define_text_flags("input")
    cli.define_path("input", "A file, a folder, a glob, or - for standard input.")
    cli.define_path("png", "Draw the entropy of each byte, with patches and threshold.")
    cli.define_path("html", "Write a page with coloured patches and their values.")
    flags.DEFINE_float("threshold", None, "Nats; instead of the model's own threshold.")
    flags.DEFINE_enum("color", "auto", ("auto", "always", "never"), "Colours in the terminal.")


if __name__ == "__main__":
    cli.run(main, define_flags)
