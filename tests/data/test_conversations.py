"""Conversations: turns as bytes, which bytes are learned, and the way through files and rows."""

import json

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from bltjax.config.chat import ROLES, ChatConfig
from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data import conversations
from bltjax.data.batches.lanes import Lane, Layout
from bltjax.data.batches.order import InOrder
from bltjax.data.batches.packing import OpenDocument, Packer
from bltjax.data.records import store as records
from bltjax.data.records.store import Documents
from bltjax.data.sources.readers import Bad, Document
from bltjax.data.sources.units import list_units, read_unit
from bltjax.vocabulary import encode

BYTES, TEXT = ChatConfig(), ChatConfig(template="text")
CHATS = pytest.mark.parametrize("chat", [BYTES, TEXT], ids=["bytes", "text"])
TALK = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="Ünö?"),
    dict(role="assistant", content="Dös."),
    dict(role="user", content="More"),
    dict(role="assistant", content=""),
]


def test_turns_lie_between_bytes_that_no_utf8_has():
    data = conversations.to_bytes(TALK, BYTES)
    expected = "\udcf8Be brief.\udcfb\udcf9Ünö?\udcfb\udcfaDös.\udcfb\udcf9More\udcfb\udcfa\udcfb"
    assert data == expected.encode("utf-8", "surrogateescape")
    begun = conversations.to_bytes(TALK[:2], BYTES, answer=True)
    assert data.startswith(begun) and begun.endswith(b"\xfb\xfa")
    for byte in b"\xf8\xf9\xfa\xfb":
        with pytest.raises(UnicodeDecodeError):
            bytes([byte]).decode()


def test_turns_of_the_text_template():
    data = conversations.to_bytes(TALK[1:3], TEXT)
    assert data.decode() == "<<user>>\nÜnö?<<end>>\n<<assistant>>\nDös.<<end>>\n"


contents = st.text(st.characters(codec="utf-8"), max_size=12)
talks = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), contents), max_size=6)


@CHATS
@hypothesis.given(first=contents, rest=talks)
def test_learned_are_the_answers_and_the_ends_of_their_turns(chat, first, rest):
    turns = [("user", first), *rest]
    messages = [dict(role=role, content=content) for role, content in turns]
    expected = []
    for role, content in turns:
        answer = role == "assistant"
        expected += [False] * len(chat.delimiter(role))
        expected += [answer] * len(content.encode() + chat.delimiter("end"))
    data = conversations.to_bytes(messages, chat)
    assert conversations.learned(data, chat).tolist() == expected


@CHATS
def test_a_part_of_a_conversation_is_told_by_itself(chat):
    """The end may be missing, as where a document was cut."""
    data = conversations.to_bytes(TALK, chat)
    whole = conversations.learned(data, chat)
    opening = chat.delimiter("assistant")
    for stop in range(data.find(opening) + len(opening), len(data)):
        part = data[:stop]
        if any(part.endswith(opening[:n]) for n in range(1, len(opening))):
            continue
        np.testing.assert_array_equal(conversations.learned(part, chat), whole[:stop])


@pytest.mark.parametrize(
    "messages, said",
    [
        ([], "messages must be a list of dicts with role and content, at least one"),
        ("hello", "messages must be a list"),
        (["hello"], r"messages\[0\] has no role"),
        ([dict(content="x")], r"messages\[0\] has no role"),
        ([dict(role="tool", content="x")], r"messages\[0\] has the role 'tool': it must be one of"),
        ([dict(role="user", content=None)], r"messages\[0\] has no text as its content"),
        ([dict(role="user", content=[dict(type="image")])], r"messages\[0\] has no text"),
        ([dict(role="assistant", content="x")], "an assistant turn comes first"),
        ([TALK[0], dict(role="assistant", content="x")], "an assistant turn comes first"),
        ([dict(role="user", content=b"a\xfbb")], r"messages\[0\] holds b'\\xfb', which is a delim"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, said):
    with pytest.raises(ValueError, match=said):
        conversations.to_bytes(messages, BYTES)


def test_delimiters_within_a_content_are_refused():
    held = [dict(role="user", content="say <<end>>\n"), TALK[2]]
    with pytest.raises(ValueError, match=r"messages\[0\] holds b'<<end>>\\n'"):
        conversations.to_bytes(held, TEXT)
    assert conversations.to_bytes(held, BYTES)


@pytest.mark.parametrize(
    "record, expected",
    [
        (dict(messages=TALK[1:3]), TALK[1:3]),
        (dict(prompt="Ünö?", completion="Dös."), TALK[1:3]),
        (dict(prompt=TALK[:2], completion=TALK[2:3]), TALK[:3]),
        (dict(messages=[TALK[1] | dict(content=[dict(text="Ünö?")]), TALK[2]]), TALK[1:3]),
    ],
)
def test_records_of_either_kind(record, expected):
    assert conversations.of_record(record, BYTES) == conversations.to_bytes(expected, BYTES)


@pytest.mark.parametrize(
    "record, said",
    [
        (dict(text="x"), "no field 'messages', nor 'prompt' and 'completion': it has 'text'"),
        (dict(prompt="x"), "nor 'prompt' and 'completion'"),
        (dict(messages=TALK[:2]), "no turn of the assistant: there is nothing to learn"),
    ],
)
def test_records_without_an_answer_are_bad(record, said):
    with pytest.raises(ValueError, match=said):
        conversations.of_record(record, BYTES)


def test_delimiters_are_checked():
    assert ChatConfig(template="jinja").problems("chat")[0].startswith("chat.template='jinja' must")
    (problem,) = ChatConfig(user="<<end>>\n\n").problems("chat")
    assert "is a part of another" in problem
    (problem,) = ChatConfig(end="").problems("chat")
    assert "may be empty" in problem
    assert {*ROLES, "end"} < set(ChatConfig.__dataclass_fields__)


def write_files(directory):
    """The same conversations as JSON lines and as Parquet, one of them bad."""
    rows = [dict(id=str(i), messages=[TALK[1], TALK[2] | dict(content=str(i))]) for i in range(6)]
    rows[3]["messages"] = rows[3]["messages"][:1]
    (directory / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    moved = [row | dict(id="p" + row["id"]) for row in rows]
    pq.write_table(pa.Table.from_pylist(moved), directory / "b.parquet")
    (directory / "c.txt").write_text("left out")


def test_files_of_conversations(tmp_path):
    write_files(tmp_path)
    source = SourceConfig(path=str(tmp_path), kind="chat")
    found = [
        x
        for unit in list_units(source, DataConfig())
        for x in read_unit(unit, source, DataConfig())
    ]
    documents = {x.name: x.data for x in found if isinstance(x, Document)}
    assert sorted(documents) == ["0", "1", "2", "4", "5", "p0", "p1", "p2", "p4", "p5"]
    assert documents["2"] == conversations.to_bytes([TALK[1], TALK[2] | dict(content="2")], BYTES)
    assert documents["p2"] == documents["2"]
    bad = [x for x in found if isinstance(x, Bad)]
    assert len(bad) == 2 and all("nothing to learn" in x.reason for x in bad)


def test_records_know_which_sources_are_conversations(tmp_path):
    (tmp_path / "chat").mkdir()
    (tmp_path / "text").mkdir()
    write_files(tmp_path / "chat")
    (tmp_path / "text" / "a.txt").write_text("plain")
    sources = (
        SourceConfig(name="text", path=str(tmp_path / "text")),
        SourceConfig(name="chat", path=str(tmp_path / "chat"), kind="chat"),
    )
    data = DataConfig(sources=sources, chat=TEXT, validation_fraction=1e-9)
    built = records.build(tmp_path / "records", data)
    assert built.chat == (None, TEXT) == records.open_store(tmp_path / "records").chat
    layout = Layout(row_bytes=64, pool=1, chat=built.chat)
    order = InOrder([Documents(built.shards(name)) for name in built.sources])
    masked = {bool(row.loss_mask.all()) for row in Lane(order, layout, 0, 1)}
    assert masked == {False}
    plain = records.build(tmp_path / "plain", DataConfig(sources=sources[:1]))
    assert plain.chat == ()


@hypothesis.given(
    talks=st.lists(st.lists(contents, min_size=2, max_size=6), min_size=1, max_size=5),
    row_bytes=st.integers(8, 40),
    patches=st.booleans(),
)
def test_rows_learn_what_documents_say(talks, row_bytes, patches):
    """Also where a conversation is longer than a row, or begins in the middle of one."""
    opened, expected = [], 0
    for i, talk in enumerate(talks):
        messages = [
            dict(role=("user", "assistant")[n % 2], content=content)
            for n, content in enumerate(talk)
        ]
        data = conversations.to_bytes(messages, BYTES)
        learned = np.pad(conversations.learned(data, BYTES), 1)
        ids = encode(data)
        ends = np.arange(1, len(ids) + 1) if patches else None
        opened.append(OpenDocument(ids, ends, index=i, learned=learned))
        expected += int(learned.sum())
    packer = Packer(row_bytes, row_bytes if patches else 0, pool=2)
    stream, found = iter(opened), 0
    while (row := packer.next_row(stream)) is not None:
        found += int(row.loss_mask.sum())
        # A target is learned where it is an answer's: told by the documents themselves.
        assert (row.targets[row.loss_mask] >= 4).all()
    assert found == expected
