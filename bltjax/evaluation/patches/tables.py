"""Prints the patches of a text, or a table of the patches of a folder's files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from bltjax.config import PatchingConfig
from bltjax.data.sources.readers import in_chunks
from bltjax.evaluation import files
from bltjax.evaluation.files import File
from bltjax.evaluation.patches import pictures
from bltjax.evaluation.patches.view import Tally, look
from bltjax.patching.boundaries import needs_entropies
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import print_table

READ_BYTES = 2_000_000  # of files in memory at a time
_COLUMNS = ("source", "files", "bytes", "patches", "bytes/patch", "nats/byte")


def show_text(model, text: bytes, patching: PatchingConfig, colour: bool):
    """Prints a text with its patches; returns (PatchView, Tally, facts in words)."""
    (view,) = look(model, [text], patching)
    tally = Tally()
    tally.add(view)
    print(pictures.terminal(view, colour))
    facts = describe(tally, patching, model.patching)
    print("\n" + "\n".join(facts))
    return view, tally, facts


def show_folder(model, folder: Path, max_bytes: int | None, patching: PatchingConfig) -> dict:
    """Prints a table of the subfolders and files of a folder, those with long patches first.

    max_bytes: only the beginning of each file is read. Returns dict(total=Tally, rows=[...],
    unreadable=[...]). Raises ValueError where no file can be read.
    """
    unreadable = []
    found = files.list_files(folder, unreadable)
    total, tallies = measure(model, found, max_bytes, patching, unreadable)
    if not tallies:
        raise files.no_file(folder, unreadable)
    rows = [dict(name=name) | tally.report() for name, tally in tallies.items()]
    rows.sort(key=lambda row: (-(row["mean_patch_bytes"] or 0), row["name"]))
    shown = [*rows, dict(name="all") | total.report()] if len(rows) > 1 else rows
    print_table(_COLUMNS, (row.values() for row in shown), digits=3)
    print("\n" + "\n".join(describe(total, patching, model.patching)))
    files.warn_of_unreadable(unreadable)
    return dict(total=total, rows=rows, unreadable=unreadable)


def measure(
    model,
    found: list[File],
    max_bytes: int | None,
    patching: PatchingConfig,
    unreadable: list[str],
) -> tuple[Tally, dict[str, Tally]]:
    """Returns a Tally of all files, and one of each subfolder and of each file that is in none.

    Files that cannot be read are added to `unreadable`.
    """
    sizes = [f.num_bytes if max_bytes is None else min(f.num_bytes, max_bytes) for f in found]
    bar, total, tallies = progress_bar("finding patches", sum(sizes)), Tally(), {}
    named = _texts(found, max_bytes, unreadable)
    for chunk in in_chunks(named, lambda name_and_text: len(name_and_text[1]), READ_BYTES):
        names, texts = zip(*chunk, strict=True)
        for name, view in zip(names, look(model, list(texts), patching), strict=True):
            total.add(view)
            tallies.setdefault(name, Tally()).add(view)
        bar.update(sum(map(len, texts)))
    bar.close()
    return total, tallies


def describe(tally: Tally, patching: PatchingConfig, trained: PatchingConfig) -> list[str]:
    """Returns sentences on the number of bytes and patches, their means, and the rule.

    trained: the model's own patching; where it differs its patches are told too.
    """
    found = tally.report()
    facts = [
        f"{found['bytes']} bytes, {found['patches']} patches, mean "
        f"{_number(found['mean_patch_bytes'])} bytes"
    ]
    if found["mean_entropy"] is not None:
        facts[0] += f", mean entropy {_number(found['mean_entropy'])} nats"
    if not needs_entropies(patching):
        return [*facts, f"rule {patching.rule}"]
    facts.append(f"rule {patching.rule}, threshold {patching.threshold:.4f} nats")
    if patching != trained:
        mean = found["bytes"] / tally.num_trained if tally.num_trained else None
        facts.append(
            f"with the model's own threshold, {trained.threshold:.4f}: {tally.num_trained} "
            f"patches, mean {_number(mean)} bytes"
        )
    return facts


def result_of(total: Tally, patching: PatchingConfig, trained: PatchingConfig) -> dict:
    """Returns the numbers of all texts, as the command prints them in JSON."""
    has_threshold = needs_entropies(patching)
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


def _texts(
    found: Iterable[File], max_bytes: int | None, unreadable: list[str]
) -> Iterator[tuple[str, bytes]]:
    """Yields the name of the table's row that a file belongs to, and the file's bytes."""
    for file in found:
        try:
            text = files.read_beginning(file.path, max_bytes)
        except OSError:
            unreadable.append(str(file.path))
            continue
        yield file.path.name if file.source == files.TOP else file.source, text


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"
