"""What a study leaves: results.csv, pictures, and README.md, a page that shows them."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

COLOURS = ("#1155aa", "#cc3333", "#2a8a3e", "#e08a00", "#7a3db8", "#555555", "#00a0a0", "#b0559a")

# Columns of a table of points, as `table` takes them.
QUALITY = dict(bits_per_byte=".4f", median_source=".4f")
COST = dict(
    training_flops=".3g",
    training_bytes=".3g",
    flops_per_byte=".3g",
    entropy_model_flops_per_byte=".3g",
    patch_bytes=".2f",
    parameters=",",
    parameters_without_hash_tables=",",
)


def write_csv(path: Path, rows: Sequence[dict]):
    """Rows under all of their keys, in order; a value that a row lacks is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def read_csv(path: Path) -> list[dict]:
    """The rows that `write_csv` wrote: numbers as numbers, None for what is empty."""
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """A Markdown table; columns: key -> format spec, under the key with spaces for underscores."""

    def cell(value, spec: str) -> str:
        if value is None:
            return ""
        return format(value, spec) if spec and not isinstance(value, str) else str(value)

    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        cells = (cell(row.get(name), spec) for name, spec in columns.items())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(path: Path, title: str, *parts: str):
    """Parts with an empty line between; pictures are parts such as `![](curves.png)`."""
    partial = path.with_suffix(".partial")
    partial.write_text("\n\n".join([f"# {title}", *parts]) + "\n")
    os.replace(partial, path)


def curves(path: Path, series: dict[str, list[tuple]], x: str, y: str, log_x: bool = True):
    """Lines with marks as a PNG; series: name -> [(x, y, error or 0)], axes x and y named."""
    figure, axes = _figure()
    for (name, points), colour in zip(series.items(), COLOURS * len(series), strict=False):
        xs, ys, errors = zip(*sorted(points), strict=True)
        axes.errorbar(xs, ys, errors, label=name, color=colour, marker="o", ms=4, capsize=3)
    if log_x:
        axes.set_xscale("log")
    _finish(figure, axes, path, x, y)


def bars(
    path: Path,
    groups: dict[str, dict[str, float]],
    y: str,
    chance: float | None = None,
    log: bool = False,
):
    """Bars side by side as a PNG; groups: name of a colour -> {place: value}.

    chance: what guessing would attain, drawn as a line. log: whether y is logarithmic.
    """
    places = list(dict.fromkeys(place for values in groups.values() for place in values))
    figure, axes = _figure(width=max(6.5, min(12, 0.4 * len(places))))
    there = {place: [name for name in groups if place in groups[name]] for place in places}
    wide = 0.8 / max(map(len, there.values()))
    for i, (name, values) in enumerate(groups.items()):
        at = [
            places.index(place) + wide * (there[place].index(name) - (len(there[place]) - 1) / 2)
            for place in values
        ]
        axes.bar(at, list(values.values()), wide, label=name, color=COLOURS[i % len(COLOURS)])
    if chance is not None:
        axes.axhline(chance, color="black", ls="--", lw=1.5, label=f"chance, {chance:g}")
    axes.set_xticks(range(len(places)), places, rotation=45, ha="right")
    if log:
        axes.set_yscale("log")
    _finish(figure, axes, path, "", y)


def changes(path: Path, groups: dict[str, dict[str, float]], x: str):
    """Lying bars as a PNG, from zero to either side; groups: name of a colour -> {place: value}.

    Linear up to 0.1 and logarithmic beyond, so that large changes leave room for small ones.
    """
    places = [place for values in groups.values() for place in values]
    figure, axes = _figure(width=8, height=1 + 0.26 * len(places))
    first = 0
    for (name, values), colour in zip(groups.items(), COLOURS * len(groups), strict=False):
        at = range(first, first + len(values))
        drawn = axes.barh(at, list(values.values()), color=colour, label=name)
        axes.bar_label(drawn, fmt="%+.3f", padding=3, fontsize=8)
        first = at.stop
    axes.set_yticks(range(len(places)), places)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.1)
    axes.margins(x=0.1)
    axes.axvline(0, color="#555555", lw=1)
    _finish(figure, axes, path, x, "")


def _figure(width: float = 6.5, height: float = 4.2):
    from matplotlib.figure import Figure  # late: it is no requirement

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure, axes, path: Path, x: str, y: str):
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(fontsize=8, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=130)
