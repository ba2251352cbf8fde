"""All commands read the same documents, for every case of the table of formats and damage."""

import lzma
from types import SimpleNamespace

import pytest

from bltjax import cli
from bltjax.commands import evaluate, patches, score
from bltjax.config.data import DataConfig, SourceConfig
from bltjax.data.sources.units import Bad, list_units, read_unit
from bltjax.evaluation.patches import tables
from tests.commands.test_score import FakeModel
from tests.data.sources.test_formats_and_damage import CASES

UNSET = dict(
    kind="auto", field="", max_bytes=None, row_bytes=None, suites=[], samples=0, tasks=[],
    patch_use_rows=0, lines=False, show_patches=False, png=None, html=None, threshold=None,
    color="never",
)  # fmt: skip


class Seen(FakeModel):
    """What a command scored, in order."""

    def documents(self) -> list[bytes]:
        return [document for documents, _ in self.calls for document in documents]


def evaluated(path, monkeypatch, **flags):
    """(documents, result) of the command evaluate."""
    model = Seen()
    monkeypatch.setattr(cli, "open_model", lambda: model)
    result = evaluate.run(SimpleNamespace(**UNSET | dict(data=str(path)) | flags))
    return model.documents(), result


def scored(path, monkeypatch, **flags):
    documents, texts, bad = score.read_documents(
        SimpleNamespace(**UNSET | dict(input=str(path)) | flags)
    )
    return documents, score.unreadable(texts, bad)


def patched(path, monkeypatch, **flags):
    seen, look = [], tables.look

    def looked(model, documents, *rest):
        seen.extend(documents)
        return look(model, documents, *rest)

    monkeypatch.setattr(cli, "open_model", FakeModel)
    monkeypatch.setattr(tables, "look", looked)
    result = patches.run(SimpleNamespace(**UNSET | dict(input=str(path)) | flags))
    monkeypatch.setattr(tables, "look", look)
    return seen, result


@pytest.fixture(autouse=True)
def small_xz(monkeypatch):
    """xz for scale with a small dictionary, since one of 64 MB for each case takes seconds."""
    make = lzma.LZMACompressor
    monkeypatch.setattr(lzma, "LZMACompressor", lambda preset: make(preset=0))


COMMANDS = [evaluated, scored, patched]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", ["file", "folder", "glob"])
def test_commands_read_what_training_reads(command, form, tmp_path, monkeypatch, capsys):
    cases = CASES if form == "file" else CASES[::7]
    for number, case in enumerate(cases):
        path = tmp_path / str(number) / case.name
        path.parent.mkdir()
        path.write_bytes(case.data)
        given = {"file": path, "folder": path.parent, "glob": f"{path.parent}/*"}[form]
        if not any(case.texts) and (case.told or command is not scored):
            told = case.told or ("no bytes", "no document")
            try:
                documents, result = command(given, monkeypatch)
            except ValueError as error:
                assert any(word in str(error) for word in told), (case.name, error)
                assert "\n" not in str(error)
            else:  # an empty document has patches, but no bits per byte
                assert command is not evaluated and documents == case.texts, case.name
            continue
        documents, result = command(given, monkeypatch)
        assert documents == case.texts, case.name
        told = " ".join(result["unreadable"])
        assert bool(told) == bool(case.told), (case.name, told)
        assert all(word in told and case.name in told for word in case.told), (case.name, told)
    capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_bytes_are_read_where_they_are_asked_for(command, tmp_path, monkeypatch, capsys):
    for number, case in enumerate(CASES[::5]):
        path = tmp_path / str(number) / case.name
        path.parent.mkdir()
        path.write_bytes(case.data)
        if case.data:
            assert command(path, monkeypatch, kind="bytes")[0] == [case.data]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_home_directory(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_bytes(b"text")
    for path in ("~/d", "~/d/a.txt", "~/d/*.txt"):
        assert command(path, monkeypatch)[0] == [b"text"]


@pytest.mark.parametrize("command", COMMANDS)
def test_another_field(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "t", "n": 1}\n' * 5000)
    with pytest.raises(
        ValueError, match=r"none of the 5000 .*'body', 'n' \(5000 times\).*--field"
    ) as e:
        command(tmp_path, monkeypatch)
    assert len(str(e.value)) < 400
    assert command(tmp_path, monkeypatch, field="body")[0] == [b"t"] * 5000


@pytest.mark.parametrize("command", COMMANDS)
def test_max_bytes_is_an_even_share_of_each_source(command, tmp_path, monkeypatch, capsys):
    """Of all sources alike, whatever their order, size and format; the first bytes of each."""
    for name, text in {"a/1.txt": b"A" * 5000, "b/1.txt": b"B" * 30, "b/2.txt": b"b" * 30}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    (tmp_path / "c.jsonl").write_text('{"text": "CCCCCCCCCCCCCCCCCCCC"}\n' * 100)
    expected = [b"A" * 50, b"B" * 30, b"b" * 20, b"C" * 20, b"C" * 20, b"C" * 10]
    assert command(tmp_path, monkeypatch, max_bytes=150)[0] == expected
    assert command(tmp_path, monkeypatch, max_bytes=152)[0] == expected
    with pytest.raises(ValueError, match=r"--max_bytes=2 is less than a byte .* 3 sources"):
        command(tmp_path, monkeypatch, max_bytes=2)
    for name in ("a/1.txt", "c.jsonl"):  # one source is read from its beginning
        documents = command(tmp_path / name, monkeypatch, max_bytes=30)[0]
        assert sum(map(len, documents)) == 30


def test_training_reads_the_same(tmp_path):
    """The table is about one file at a time; here all are in one folder."""
    for number, case in enumerate(CASES):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / case.name).write_bytes(case.data)
    source, data = SourceConfig(path=str(tmp_path)), DataConfig(shard_bytes=5000)
    units = list_units(source, data)
    found = [record for unit in units for record in read_unit(unit, source, data)]
    texts = [record.data for record in found if not isinstance(record, Bad)]
    assert sorted(texts) == sorted(text for case in CASES for text in case.texts)


def test_an_empty_path_is_refused(monkeypatch):
    for command in (scored, patched):  # evaluate counts it as none
        with pytest.raises(ValueError, match="the path of the texts is empty"):
            command("", monkeypatch)
