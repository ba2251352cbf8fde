"""Prints the patches of a text, or a table of those of a folder."""

import sys
from collections.abc import Iterator
from pathlib import Path

from bltjax.config import ENTROPY_RULES, PatchingConfig
from bltjax.evaluation.files import TOP, File, list_files
from bltjax.evaluation.patches import pictures
from bltjax.evaluation.patches.view import Tally, look
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import printable

READ_BYTES = 2_000_000  # of files in memory at a time


_COLUMNS = ("files", "bytes", "patches", "bytes/patch", "nats/byte")


def show_text(model, text: bytes, name: str, trained: PatchingConfig, colour: bool):
    """Prints a text with its patches; returns its (PatchView, Tally, facts in words)."""
    (view,) = look(model, [text], trained)
    tally = Tally()
    tally.add(view)
    print(pictures.terminal(view, colour))
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
    bar, tallies = progress_bar("finding patches", sum(sizes)), {}
    for group in _contents(files, max_bytes, unreadable):
        names, texts = zip(*group, strict=True)
        for name, view in zip(names, look(model, list(texts), trained), strict=True):
            tallies.setdefault(name, Tally()).add(view)
        bar.update(sum(map(len, texts)))
    bar.close()
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


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"
