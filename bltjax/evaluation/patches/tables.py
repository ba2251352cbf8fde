"""Prints the patches of a text, or a table of the patches of many."""

from bltjax.config import PatchingConfig
from bltjax.data.sources.readers import in_chunks
from bltjax.evaluation.patches import pictures
from bltjax.evaluation.patches.view import Tally, look
from bltjax.evaluation.texts import Bad, Texts, read_texts
from bltjax.patching.boundaries import needs_entropies
from bltjax.runtime.progress import progress_bar
from bltjax.runtime.terminal import print_table

READ_BYTES = 2_000_000  # of documents in memory at a time
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


def show_table(
    model, texts: Texts, patching: PatchingConfig, bad: list[Bad]
) -> tuple[Tally, list[dict]]:
    """Prints a table of sources, those with long patches first.

    Returns a Tally of all and the rows. Records that are no documents are added to `bad`. Raises
    ValueError where no document can be read.
    """
    total, tallies = measure(model, texts, patching, bad)
    if not tallies:
        raise texts.without_text(bad)
    rows = [dict(name=name) | tally.report() for name, tally in tallies.items()]
    rows.sort(key=lambda row: (-(row["mean_patch_bytes"] or 0), row["name"]))
    shown = [*rows, dict(name="all") | total.report()] if len(rows) > 1 else rows
    print_table(_COLUMNS, (row.values() for row in shown), digits=3)
    print("\n" + "\n".join(describe(total, patching, model.patching)))
    return total, rows


def measure(
    model, texts: Texts, patching: PatchingConfig, bad: list[Bad]
) -> tuple[Tally, dict[str, Tally]]:
    """Returns a Tally of all documents, and one of each source."""
    bar, total, tallies = progress_bar("finding patches", texts.num_bytes()), Tally(), {}
    documents = read_texts(texts, bad)
    for chunk in in_chunks(documents, lambda document: len(document.data), READ_BYTES):
        views = look(model, [document.data for document in chunk], patching)
        for document, view in zip(chunk, views, strict=True):
            total.add(view)
            tallies.setdefault(document.source, Tally()).add(view)
        bar.update(sum(len(document.data) for document in chunk))
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


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"
