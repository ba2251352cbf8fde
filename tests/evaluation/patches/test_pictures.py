"""What the pictures of patches show: in a terminal, on a page, as curves."""

import html.parser
import io
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bltjax.evaluation.patches import pictures
from bltjax.evaluation.patches.view import PatchView, histogram
from bltjax.runtime.terminal import printable
from tests.figures import collisions

FACTS = ["5 bytes", "threshold < 2 & more"]


def view_of(text, lengths=None, threshold=2.0, entropies=True):
    """A view with patches of these lengths, over and over, and made-up entropies."""
    starts, at, number = [], 0, 0
    while at < len(text):
        starts.append(at)
        at += (lengths or [3, 1, 4])[number % len(lengths or [3, 1, 4])]
        number += 1
    values = np.linspace(0.5, 3.5, len(text), dtype=np.float32) if entropies else None
    levels = np.full_like(values, threshold) if entropies else None
    return PatchView(text, np.array(starts, int), values, levels, len(starts))


class Page(html.parser.HTMLParser):
    """Reads a page back: the bytes of each patch, what the pointer would show, what it loads."""

    def __init__(self, text):
        super().__init__()
        self.patches, self.listed, self.inside, self.names, self.links = [], [], [], [], []
        self.shown = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.links += [f"{k}={v}" for k, v in attributes if k in ("src", "href", "onload")]
        if tag == "b":
            self.patches.append(b"")
            self.listed.append(dict(attributes)["data-bytes"])
        if tag in ("b", "s", "u"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ("b", "s", "u"):
            assert self.inside.pop() == tag

    def handle_data(self, data):
        self.shown += data
        if "b" in self.inside and "u" not in self.inside:
            self.patches[-1] += bytes.fromhex(data) if "s" in self.inside else data.encode()


# Bytes, and characters of which patches cut some apart; what a parser of pages could change.
TEXTS = st.one_of(
    st.binary(max_size=60),
    st.text(st.sampled_from("a<&>\"'\n\r\t\0é漢\u202e\ufeff\x85|\\ "), max_size=40).map(str.encode),
)


@settings(max_examples=60)
@given(TEXTS, st.lists(st.integers(1, 9), min_size=1, max_size=4))
@example(b"\n</div><script>alert(1)</script>&lt;\r\n\xc3", [2])
@example(b"\n</div><script>alert(1)</script>&lt;\r\n\xc3", [99])
def test_the_text_can_be_read_back_from_the_page(text, lengths):
    view = view_of(text, lengths)
    page = pictures.html_page(view, "a<b>.txt", FACTS)
    found = Page(page)
    assert found.patches == view.patches and b"".join(found.patches) == text
    assert "script" not in found.names and not found.links
    assert "Patches of a<b>.txt" in found.shown and FACTS[1] in found.shown
    # What a parser would change or drop, and what turns the direction of the rest, is escaped.
    assert not re.search("[\0\r\x0b\x0c\x7f-\x9f\u202e]", page)


def test_the_pointer_shows_every_value_of_a_patch():
    view = view_of(b'a"\nb' + b"." * 80, [2, 2, 80])
    found = Page(pictures.html_page(view, "text", FACTS))
    assert found.listed[0].splitlines() == [
        "patch 0, length 2",
        "0  61 a  0.500",
        f'1  22 "  {view.entropies[1]:.3f}',
    ]
    second = found.listed[1].splitlines()
    assert second[:2] == ["patch 1, length 2", f"2  0a    {view.entropies[2]:.3f}"]
    third = found.listed[2].splitlines()
    assert len(third) == 50 and third[1].startswith("4  2e .") and third[-1] == "and 32 more"
    without = pictures.html_page(view_of(b"ab", entropies=False), "text", FACTS)
    assert Page(without).listed == ["patch 0, length 2\n0  61 a\n1  62 b"]


def test_the_page_has_the_histogram_loads_nothing_and_knows_dark_rooms():
    page = pictures.html_page(view_of(b"abcdefg\n", [1, 1, 4, 2]), "text", FACTS)
    rows = re.findall(r"<td>([\d+]+)</td>.*?width:([\d.]+)%.*?<td>(\d+)</td><td>(.*?)</td>", page)
    assert rows == [
        ("1", "100.0", "2", "50.0%"),
        ("2", "50.0", "1", "25.0%"),
        ("3", "0.0", "0", "0.0%"),
        ("4", "50.0", "1", "25.0%"),
    ]
    assert "prefers-color-scheme: dark" in page and "color-scheme: light dark" in page
    assert "default-src 'none'" in page and not re.search(r"https?:|url\(|@import", page)
    assert "<u>↵</u>\n" in page


@given(st.binary(max_size=50))
def test_the_terminal_shows_patches_in_turns(text):
    view = view_of(text)
    coloured = pictures.terminal(view, colour=True)
    pieces = re.findall(r"\x1b\[30;4([63])m(.*?)\x1b\[0m", coloured.replace("↵\x1b[0m\n", "↵\n"))
    # Lines go on in the colour of their patch, which is then switched on again.
    bare = re.sub(r"\x1b\[[\d;]*m", "", coloured).replace("↵\n", "\n")
    assert bare == "".join(map(printable, view.patches))
    if b"\n" not in text:
        assert [colour for colour, _ in pieces] == ["63"[n % 2] for n in range(len(view.patches))]
        assert [shown for _, shown in pieces] == list(map(printable, view.patches))
    assert "\x1b[0m\n" in coloured or b"\n" not in text
    plain = pictures.terminal(view, colour=False)
    assert plain == "|".join(map(printable, view.patches)) and "\x1b" not in plain


def test_histograms_count_every_patch():
    lengths = Counter({1: 3, 4: 6, 9: 1, 10: 1, 300: 1})
    rows = histogram(lengths)
    assert [name for name, _ in rows[:4]] == ["1", "2", "3", "4"]
    assert rows[8] == ("9-10", 2) and rows[-1] == ("129+", 1)
    assert sum(count for _, count in rows) == 12
    assert histogram(Counter({12: 2}))[-1] == ("11-12", 2)
    assert histogram(Counter({256: 2}))[-1] == ("129+", 2)
    assert histogram(Counter()) == [] == pictures.histogram_lines(Counter())
    lines = pictures.histogram_lines(lengths)
    assert lines[0].split() == ["1", "#" * 20, "3", "25.0%"]
    assert lines[1].split() == ["2", "0", "0.0%"]
    assert lines[3].split() == ["4", "#" * 40, "6", "50.0%"]


# ---- PNG


@pytest.fixture
def draw():
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'bltjax[plots]'")
    return lambda view: pictures.figure(view, "a$b.txt", ["some $facts"])


def lines_of(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_the_curve_goes_over_rows_with_threshold_and_patches(draw):
    view = view_of(bytes(range(48, 123)) * 2, threshold=1.25)  # 150 bytes: a row of 80, one of 70
    first, second, bars = draw(view).axes
    for axes, start, stop in ((first, 0, 80), (second, 80, 150)):
        lines = lines_of(axes)
        np.testing.assert_array_equal(lines["entropy"][:, 0], np.arange(start, stop))
        np.testing.assert_array_equal(lines["entropy"][:, 1], view.entropies[start:stop])
        assert set(lines["threshold"][:, 1]) == {1.25}
        assert lines["threshold"][[0, -1], 0].tolist() == [start - 0.5, stop - 0.5]
        (edges,) = [c for c in axes.collections if c.get_label() == "patch starts"]
        drawn = [segment[0, 0] + 0.5 for segment in edges.get_segments()]
        assert drawn == [s for s in view.starts if start <= s < stop]
        labels = [tick.get_text() for tick in axes.get_xticklabels()]
        assert labels == list(map(chr, view.text[start:stop]))
        assert axes.get_xlim() == (start - 0.5, start + 79.5)
    counts = Counter(view.lengths.tolist())
    assert [bar.get_height() for bar in bars.patches] == [counts[n] for n in range(1, 5)]


def test_rules_without_threshold_or_entropies_have_no_such_line(draw):
    view = view_of(b"some text")
    axes, _ = draw(view._replace(levels=None)).axes
    assert set(lines_of(axes)) == {"entropy"} and len(axes.collections) == 1
    axes, _ = draw(view_of(b"some text", entropies=False)).axes
    assert not lines_of(axes) and len(axes.collections[0].get_segments()) == len(view.starts)


def test_long_texts_are_cut_and_the_title_says_so(draw, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_ROWS", 2)
    figure = draw(view_of(b"x" * 200))
    assert len(figure.axes) == 3
    assert "first 160 bytes are drawn, 40 more are left out" in figure.get_suptitle()
    assert "left out" not in draw(view_of(b"x" * 160)).get_suptitle()


@pytest.mark.filterwarnings("ignore:Glyph")  # the font that is there draws a box
@pytest.mark.parametrize("name", ["a.txt", "n" * 250, "漢字" * 80])
@pytest.mark.parametrize("size", [0, 60, 300])
def test_titles_and_legend_lie_over_nothing(draw, monkeypatch, name, size):
    monkeypatch.setattr(pictures, "MAX_ROWS", 2)
    figure = pictures.figure(view_of(b"x" * size), name, ["some long fact"] * 12)
    assert not collisions(figure)


def test_every_byte_has_a_label(draw):
    text = "a é漢\n$".encode() + b"\xff\0"
    labels = [tick.get_text() for tick in draw(view_of(text)).axes[0].get_xticklabels()]
    assert labels == ["a", "␣", "é", "", "e6", "bc", "a2", "↵", "$", "ff", "00"]


@pytest.mark.parametrize("text", [b"", b"$a$ \xff\0 text\n" * 9])
def test_the_png_is_a_picture(draw, text):
    file = io.BytesIO()
    draw(view_of(text)).savefig(file, format="png")
    data = file.getvalue()
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000
    assert width == 1600 and 400 <= height <= 1000
