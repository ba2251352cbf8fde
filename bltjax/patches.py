"""How a model cuts a text into patches: `python -m bltjax.patches --checkpoint=DIR --input=FILE`.

Shows the text with its patches, how long they are, and, with --png and --html, how hard each byte
was. Of a folder it prints a table instead: bytes per patch of each of its subfolders (languages,
sources) and files. Any bytes are text; all of it is JSON in the last line.
"""

import dataclasses
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from bltjax import command, patch_pictures
from bltjax.command import printable
from bltjax.config import ENTROPY_RULES, PatchingConfig
from bltjax.evaluate import TOP, File, list_files
from bltjax.files import replacing
from bltjax.patch_view import PatchView, Tally, look
from bltjax.progress import Progress

MAX_SHOWN_BYTES = 1_000_000  # of a text that is shown: pages of more are slow to look at
READ_BYTES = 2_000_000  # of files in memory at a time
_COLUMNS = ("files", "bytes", "patches", "bytes/patch", "nats/byte")


def show_text(model, text: bytes, name: str, trained: PatchingConfig, colour: bool):
    """Prints a text with its patches; returns its (PatchView, Tally, facts in words)."""
    (view,) = look(model, [text], trained)
    tally = Tally()
    tally.add(view)
    print(patch_pictures.terminal(view, colour))
    facts = describe(tally, model.patching, trained)
    print("\n" + "\n".join(facts))
    return view, tally, facts


def show_folder(model, folder: Path, max_bytes: int | None, trained: PatchingConfig) -> dict:
    """Prints a table of what is in a folder, longest patches first.

    Returns dict(total=Tally, rows=[...], unreadable=[...]). Raises ValueError where no file can be
    read.
    """
    unreadable = []
    tallies = measure(model, list_files(folder, unreadable), max_bytes, trained, unreadable)
    if not tallies:
        raise ValueError(
            f"no file can be read at {str(folder)!r} ({len(unreadable)} unreadable; hidden files "
            "are left out): choose another path"
        )
    total = Tally()
    for tally in tallies.values():
        total.merge(tally)
    rows = [dict(name=name) | tally.report() for name, tally in tallies.items()]
    rows.sort(key=lambda row: (-(row["mean_patch_bytes"] or 0), row["name"]))
    print_table([*rows, dict(name="all") | total.report()] if len(rows) > 1 else rows)
    print("\n" + "\n".join(describe(total, model.patching, trained)))
    if unreadable:
        print(f"could not be read: {', '.join(map(printable, unreadable))}", file=sys.stderr)
    return dict(total=total, rows=rows, unreadable=unreadable)


def measure(
    model,
    files: list[File],
    max_bytes: int | None,
    trained: PatchingConfig,
    unreadable: list[str],
) -> dict[str, Tally]:
    """A Tally of each subfolder, and of each file that is in none; `unreadable` grows."""
    sizes = [f.num_bytes if max_bytes is None else min(f.num_bytes, max_bytes) for f in files]
    progress, tallies = Progress("finding patches", sum(sizes)), {}
    for group in _contents(files, max_bytes, unreadable):
        names, texts = zip(*group, strict=True)
        for name, view in zip(names, look(model, list(texts), trained), strict=True):
            tallies.setdefault(name, Tally()).add(view)
        progress(sum(map(len, texts)))
    progress.close()
    return tallies


def describe(tally: Tally, patching: PatchingConfig, trained: PatchingConfig) -> list[str]:
    """Bytes, patches, their mean and the rule in words, a line each."""
    found = tally.report()
    facts = [
        f"{found['bytes']} bytes, {found['patches']} patches, mean "
        f"{_number(found['mean_patch_bytes'])} bytes"
    ]
    if found["mean_entropy"] is not None:
        facts[0] += f", mean entropy {_number(found['mean_entropy'])} nats"
    if patching.rule not in ENTROPY_RULES:
        return [*facts, f"rule {patching.rule}"]
    facts.append(f"rule {patching.rule}, threshold {patching.threshold:.4f} nats")
    if patching != trained:
        mean = found["bytes"] / tally.num_trained if tally.num_trained else None
        facts.append(
            f"with the model's own threshold, {trained.threshold:.4f}: {tally.num_trained} "
            f"patches, mean {_number(mean)} bytes"
        )
    return facts


def print_table(rows: list[dict]):
    names = [printable(row["name"]) for row in rows]
    width = max(map(len, ["source", *names]))
    print(f"{'source':{width}}" + "".join(f"{column:>13}" for column in _COLUMNS))
    for name, row in zip(names, rows, strict=True):
        cells = [row["files"], row["bytes"], row["patches"]]
        cells += [_number(row["mean_patch_bytes"]), _number(row["mean_entropy"])]
        print(f"{name:{width}}" + "".join(f"{cell:>13}" for cell in cells))


def read(path: str | Path, max_bytes: int | None) -> bytes:
    """The first bytes of a file (`-`: stdin)."""
    limit = -1 if max_bytes is None else max_bytes
    if str(path) == "-":
        return sys.stdin.buffer.read(limit)
    with open(path, "rb") as file:
        return file.read(limit)


def read_shown(path: str, max_bytes: int | None) -> bytes:
    """The text to show. Raises ValueError where it is longer than MAX_SHOWN_BYTES."""
    most = MAX_SHOWN_BYTES + 1
    text = read(path, most if max_bytes is None else min(max_bytes, most))
    if len(text) > MAX_SHOWN_BYTES:
        raise ValueError(
            f"{path} has more than the {MAX_SHOWN_BYTES} bytes that can be shown: give "
            f"--max_bytes={MAX_SHOWN_BYTES} for its beginning, or a folder for a table only"
        )
    return text


def with_threshold(patching: PatchingConfig, threshold: float) -> PatchingConfig:
    """The same rule with another threshold. Raises ValueError for rules that have none."""
    if patching.rule not in ENTROPY_RULES:
        raise ValueError(
            f"patching rule {patching.rule!r} has no threshold: leave out --threshold={threshold}"
        )
    if not math.isfinite(threshold):
        raise ValueError(f"--threshold={threshold} must be a finite number of nats")
    return dataclasses.replace(patching, threshold=threshold)


def run(chosen) -> dict:
    """What the flags ask for; returns what the last line holds."""
    is_folder = chosen.input != "-" and Path(chosen.input).is_dir()
    _check_targets(chosen, is_folder)
    text = None if is_folder else read_shown(chosen.input, chosen.max_bytes)
    model = command.open_model()
    trained = model.patching
    if chosen.threshold is not None:
        model.patching = with_threshold(trained, chosen.threshold)
    if is_folder:
        found = show_folder(model, Path(chosen.input), chosen.max_bytes, trained)
        total, rows, unreadable = found["total"], found["rows"], found["unreadable"]
    else:
        name = "standard input" if chosen.input == "-" else printable(Path(chosen.input).name)
        view, total, facts = show_text(model, text, name, trained, _colour(chosen.color))
        rows, unreadable = [dict(name=chosen.input) | total.report()], []
    print("\n".join(["", "bytes of a patch", *patch_pictures.histogram_lines(total.lengths)]))
    if not is_folder:
        save(view, name, facts, chosen.png, chosen.html)
    return result_of(total, model.patching, trained) | dict(files=rows, unreadable=unreadable)


def save(view: PatchView, name: str, facts: list[str], png: str | None, page: str | None):
    """Writes the pictures that are asked for, whole or not at all."""
    if png is not None:
        with replacing(Path(png)) as file:
            patch_pictures.figure(view, name, facts).savefig(file, format="png")
        print(f"wrote {printable(png)}")
    if page is not None:
        with replacing(Path(page)) as file:
            file.write(patch_pictures.html_page(view, name, facts).encode())
        print(f"wrote {printable(page)}")


def result_of(total: Tally, patching: PatchingConfig, trained: PatchingConfig) -> dict:
    has_threshold = patching.rule in ENTROPY_RULES
    report = total.report()
    del report["files"]
    num_trained = total.num_trained
    return report | dict(
        rule=patching.rule,
        threshold=patching.threshold if has_threshold else None,
        trained=dict(
            threshold=trained.threshold if has_threshold else None,
            patches=num_trained,
            mean_patch_bytes=report["bytes"] / num_trained if num_trained else None,
        ),
        histogram={str(n): count for n, count in sorted(total.lengths.items())},
    )


def main(argv):
    command.check_checkpoint_and_input(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result = run(flags.FLAGS)
    except (ValueError, KeyError, OSError) as error:
        command.fail(error)
    print(json.dumps(result))


def _check_targets(chosen, is_folder: bool):
    """A picture that cannot be written shows before the model is loaded."""
    for flag in ("png", "html"):
        target = getattr(chosen, flag)
        if target is None:
            continue
        if is_folder:
            raise ValueError(f"--{flag} shows one text, {chosen.input} is a folder: give a file")
        if not Path(target).parent.is_dir():
            raise ValueError(f"--{flag}={target} is in no folder: make {Path(target).parent}")
    if chosen.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--png needs matplotlib: pip install 'bltjax[plots]'")


def _contents(
    files: list[File], max_bytes: int | None, unreadable: list[str]
) -> Iterator[list[tuple[str, bytes]]]:
    """(name of its row, bytes) of consecutive files, about READ_BYTES of them at a time."""
    group, size = [], 0
    for file in files:
        try:
            text = read(file.path, max_bytes)
        except OSError:
            unreadable.append(str(file.path))
            continue
        group.append((file.path.name if file.source == TOP else file.source, text))
        size += len(text)
        if size >= READ_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _colour(when: str) -> bool:
    if when != "auto":
        return when == "always"
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"


def _define_flags():
    command.define_model_flags()
    flags.adopt_module_key_flags(command)  # shown by --help
    flags.DEFINE_string("input", None, "A file, a folder of files, or - for standard input.")
    flags.DEFINE_string("png", None, "Draw the entropy of each byte, with patches and threshold.")
    flags.DEFINE_string("html", None, "Write a page with coloured patches and their values.")
    flags.DEFINE_float("threshold", None, "Nats; instead of the model's own threshold.")
    flags.DEFINE_integer("max_bytes", None, "Only the beginning of a text, or of each file.", 0)
    flags.DEFINE_enum("color", "auto", ("auto", "always", "never"), "Colours in the terminal.")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=command.parse)
