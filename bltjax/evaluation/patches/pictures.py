"""Draws a PatchView: as coloured text for a terminal, as an HTML page, as curves for a PNG."""

import html
import re
from collections import Counter
from textwrap import wrap

import numpy as np

from bltjax.evaluation.patches.view import PatchView, histogram
from bltjax.runtime.terminal import printable

ROW_BYTES = 80  # bytes in a row of the PNG
MAX_ROWS = 12
_WIDE, _NARROW = 80, 160  # characters in a line of its title: of any script, of ASCII
_COLOURS = ("\x1b[30;46m", "\x1b[30;43m")  # black on cyan and on yellow: legible on any background
_PLAIN = "\x1b[0m"
_BAR = 40  # characters of the longest bar
_MAX_LISTED = 48  # bytes of a patch that a page lists when the pointer is over it
_STEERS = re.compile("[\u202a-\u202e\u2066-\u2069]")  # characters that change text direction


def characters(text: bytes) -> list[tuple[str | None, bytes]]:
    """Splits a text into characters and single bytes that are part of none, each with its bytes.

    None stands for what cannot be shown: such bytes, and control characters that would steer a
    terminal or a page, except newlines and tabs.
    """
    result = []
    for c in text.decode("utf-8", "surrogateescape"):
        data = c.encode("utf-8", "surrogateescape")
        steers = (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or _STEERS.match(c)
        result.append((None if steers or "\udc80" <= c <= "\udcff" else c, data))
    return result


# ---- terminal


def terminal(view: PatchView, colour: bool) -> str:
    """Returns the text with patches in two colours, or cut with "|" without colour."""
    if not colour:
        return "|".join(map(printable, view.patches))
    shown = []
    for number, patch in enumerate(view.patches):
        on = _COLOURS[number % 2]
        # Switches the colour off at the end of a line, else it would fill the rest of the line.
        text = printable(patch).replace("\n", f"↵{_PLAIN}\n{on}")
        shown.append(f"{on}{text}{_PLAIN}")
    return "".join(shown)


def histogram_lines(lengths: Counter) -> list[str]:
    """Returns a line for each patch length: bytes, a bar, count, share."""
    rows, total = histogram(lengths), lengths.total()
    most = max((count for _, count in rows), default=0)
    return [
        f"{name:>8} {'#' * round(_BAR * count / most):{_BAR}} {count:>9} {count / total:>6.1%}"
        for name, count in rows
    ]


# ---- HTML

_STYLE = """
:root { color-scheme: light dark; --a: #cfe8ff; --b: #ffe3b8; --bar: #3b82c4; --mark: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --a: #173a5e; --b: #57401a; --bar: #6fb1ea; --mark: #ff9d94; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; }
#text { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin-bottom: 12em; }
#text b { font-weight: inherit; padding: 2px 0; background: var(--a); }
#text b:nth-child(even) { background: var(--b); }
#text b:hover { outline: 2px solid var(--bar); }
#text b:hover::after { content: attr(data-bytes); position: fixed; right: 1em; bottom: 1em;
  max-height: 80vh; overflow: hidden; padding: .6em 1em; white-space: pre; line-height: 1.35;
  background: Canvas; color: CanvasText; border: 1px solid GrayText; border-radius: 6px; }
#text s { text-decoration: none; color: var(--mark); }
#text s::before { content: "\\\\x"; }
#text u { text-decoration: none; opacity: .55; user-select: none; }
td, th { text-align: right; padding: 0 .8em 0 0; font-variant-numeric: tabular-nums; }
td.bar { width: 24em; } td.bar i { display: block; height: .9em; background: var(--bar); }
"""


def html_page(view: PatchView, name: str, facts: list[str]) -> str:
    """Returns a self-contained page: facts, a histogram, and the text with coloured patches.

    The pointer over a patch shows its number, length, bytes, positions and entropies. The text can
    be read back from the page: `u` is decoration, `s` a byte in hexadecimal, all else is UTF-8.
    """
    columns = "position and value" if view.entropies is None else "position, value and nats"
    facts_shown = "".join(f"<li>{html.escape(fact)}</li>\n" for fact in facts)
    return (
        '<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Patches of {html.escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Patches of {html.escape(name)}</h1>\n<ul>\n{facts_shown}"
        f"<li>under the pointer: number and length of a patch, {columns} of each byte</li>\n</ul>\n"
        f"{_html_histogram(Counter(view.lengths.tolist()))}"
        f'<div id="text">{_html_patches(view)}</div>\n</body>\n</html>\n'
    )


def _html_histogram(lengths: Counter) -> str:
    rows, total = histogram(lengths), lengths.total()
    most = max((count for _, count in rows), default=0)
    shown = "".join(
        f'<tr><td>{name}</td><td class="bar"><i style="width:{100 * count / most:.1f}%"></i></td>'
        f"<td>{count}</td><td>{count / total:.1%}</td></tr>\n"
        for name, count in rows
    )
    heads = "<th>bytes</th><th></th><th>patches</th><th>share</th>"
    return f"<table>\n<tr>{heads}</tr>\n{shown}</table>\n"


def _html_patches(view: PatchView) -> str:
    shown = []
    for number, (start, patch) in enumerate(zip(view.starts, view.patches, strict=True)):
        text = "".join(_html_character(*character) for character in characters(patch))
        listed = html.escape(_listed(view, number, int(start), patch))
        shown.append(f'<b data-bytes="{listed}">{text}</b>')
    return "".join(shown)


def _html_character(shown: str | None, data: bytes) -> str:
    if shown is None:
        return "".join(f"<s>{byte:02x}</s>" for byte in data)
    return "<u>↵</u>\n" if shown == "\n" else html.escape(shown)


def _listed(view: PatchView, number: int, start: int, patch: bytes) -> str:
    """Returns a line on the patch, and one for each byte: position, byte, nats."""
    lines = [f"patch {number}, length {len(patch)}"]
    for position, byte in enumerate(patch[:_MAX_LISTED], start):
        shown = chr(byte) if 32 < byte < 127 else " "
        nats = "" if view.entropies is None else f"  {view.entropies[position]:.3f}"
        lines.append(f"{position}  {byte:02x} {shown}{nats}")
    if len(patch) > _MAX_LISTED:
        lines.append(f"and {len(patch) - _MAX_LISTED} more")
    return "\n".join(lines)


# ---- PNG


def figure(view: PatchView, name: str, facts: list[str]):
    """Returns a matplotlib Figure: entropies of the bytes, patches, threshold, and a histogram.

    A text is drawn in rows of ROW_BYTES, MAX_ROWS at most; the title tells how much is left out.
    """
    from matplotlib.figure import Figure  # late: matplotlib is optional

    size = len(view.text)
    num_rows = min(max(1, -(-size // ROW_BYTES)), MAX_ROWS)
    title = [*wrap(f"Patches of {name}", _WIDE), *wrap("; ".join(facts), _NARROW)]
    if left_out := max(0, size - num_rows * ROW_BYTES):
        title.append(f"the first {size - left_out} bytes are drawn, {left_out} more are left out")
    head = 0.5 + 0.19 * len(title)  # inches: the legend, and the lines of the title
    result = Figure(figsize=(16, 1.5 * num_rows + 2.6 + head), dpi=100)
    grid = result.add_gridspec(
        num_rows + 1,
        1,
        height_ratios=[1.0] * num_rows + [1.2],
        hspace=0.5,
        left=0.045,
        right=0.985,
        bottom=0.5 / result.get_figheight(),
        top=1 - head / result.get_figheight(),
    )
    above = 1 - 0.1 / result.get_figheight()
    result.suptitle("\n".join(title), y=above, va="top", fontsize=11, parse_math=False)
    labels = _byte_labels(view.text[: num_rows * ROW_BYTES + 3])  # 3: the rest of a character
    drawn = [x[: num_rows * ROW_BYTES] for x in (view.entropies, view.levels) if x is not None]
    top = 1.08 * max((float(x.max()) for x in drawn if x.size), default=1.0)
    for row in range(num_rows):
        axes = result.add_subplot(grid[row])
        _draw_row(axes, view, row * ROW_BYTES, labels, top)
        if row == 0 and axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    _draw_histogram(result.add_subplot(grid[num_rows]), Counter(view.lengths.tolist()))
    return result


def _draw_row(axes, view: PatchView, first: int, labels: list[str], top: float):
    stop = min(first + ROW_BYTES, len(view.text))
    at = np.arange(first, stop)
    if view.entropies is not None:
        axes.plot(at, view.entropies[first:stop], ".-", color="#1f5fa8", lw=1.2, label="entropy")
        axes.set_ylabel("nats")
    else:
        axes.set_yticks([])
    if view.levels is not None:
        levels = np.append(view.levels[first:stop], view.levels[stop - 1 : stop])
        edges = np.append(at, stop)[: levels.size] - 0.5
        axes.step(edges, levels, "--", where="post", color="#c0392b", lw=1.2, label="threshold")
    starts = view.starts[(view.starts >= first) & (view.starts < stop)]
    axes.vlines(starts - 0.5, 0, top, color="#777777", lw=0.9, label="patch starts")
    begins, ends = view.starts[::2], (view.starts + view.lengths)[::2]
    seen = (begins < stop) & (ends > first)
    for begin, end in zip(begins[seen].clip(first), ends[seen].clip(max=stop), strict=True):
        axes.axvspan(begin - 0.5, end - 0.5, color="#e8eef6", lw=0, zorder=0)
    axes.set_xlim(first - 0.5, first + min(ROW_BYTES, max(len(view.text), 16)) - 0.5)
    axes.set_ylim(0, top)
    axes.set_xticks(at, labels[first:stop], family="DejaVu Sans Mono", fontsize=8, parse_math=False)
    axes.tick_params(axis="x", length=0)
    axes.text(*(0, 1.04, f"byte {first}"), transform=axes.transAxes, fontsize=8, color="#555555")


def _draw_histogram(axes, lengths: Counter):
    rows, total = histogram(lengths), max(lengths.total(), 1)
    bars = axes.bar([name for name, _ in rows], [count for _, count in rows], color="#1f5fa8")
    axes.bar_label(bars, [f"{count / total:.0%}" for _, count in rows], fontsize=8)
    axes.set_xlabel("bytes of a patch")
    axes.set_ylabel("patches")
    axes.margins(y=0.15)


def _byte_labels(text: bytes) -> list[str]:
    """Returns the label of each byte: its character at the first byte, or hexadecimal."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    known, labels = font.get_charmap(), []
    for shown, data in characters(text):
        shown = {" ": "␣", "\n": "↵", "\t": "⇥"}.get(shown, shown)
        if shown is None or ord(shown) not in known:
            labels += [f"{byte:02x}" for byte in data]
        else:
            labels += [shown] + [""] * (len(data) - 1)
    return labels
