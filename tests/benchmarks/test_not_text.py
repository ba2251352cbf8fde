"""The study of bytes that are no text: its files, what their bytes are, other coders, its page."""

import io
import struct

import jax
import numpy as np
import pytest

import bltjax
from benchmarks.studies import (
    not_text,
    raw_baselines,
    raw_corpus,
    raw_drawn,
    raw_parts,
    raw_pictures,
    study,
)
from benchmarks.studies.points import account, run_config
from bltjax.config import DataConfig, PatchingConfig, SourceConfig
from bltjax.data.records import store
from bltjax.data.sources.units import is_held_out
from bltjax.evaluation.patches.view import look
from bltjax.evaluation.score import score_documents
from bltjax.patching.boundaries import patch_starts
from bltjax.vocabulary import encode
from tests import directories

SAMPLES = np.random.default_rng(0).integers(-3000, 3000, 4000).astype(np.int16)
PIXELS = np.random.default_rng(1).integers(0, 256, (100, 120, 3)).astype(np.uint8)
MIDI = raw_drawn.midi(raw_drawn.score(0, 64))


def test_what_is_drawn_is_drawn_again(tmp_path):
    made = [
        raw_corpus.make(
            tmp_path / name, raw_corpus.DRAWN, ["wav16", "wav8", "ppm", "midi"], 150_000
        )
        for name in "ab"
    ]
    assert made[0] == made[1]
    for kind, about in made[0].items():
        files = [
            {path.name: path.read_bytes() for path in (tmp_path / name / kind).iterdir()}
            for name in "ab"
        ]
        assert files[0] == files[1] and len(set(files[0].values())) == about["files"] > 1
        assert about["origin"] == "drawn" and about["bytes"] == sum(map(len, files[0].values()))
    # The same sounds, in half the bytes.
    assert set(names(tmp_path / "a/wav16")) == set(names(tmp_path / "a/wav8"))
    assert made[0]["wav8"]["bytes"] == pytest.approx(made[0]["wav16"]["bytes"] / 2, rel=0.01)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def wad(*lumps: bytes) -> bytes:
    starts = [12 + sum(map(len, lumps[:i])) for i in range(len(lumps))]
    entries = [
        struct.pack("<ii8s", start, len(lump), b"D_E1M1")
        for start, lump in zip(starts, lumps, strict=True)
    ]
    end = 12 + sum(map(len, lumps))
    return b"IWAD" + struct.pack("<ii", len(lumps), end) + b"".join(lumps) + b"".join(entries)


def test_files_of_a_directory_are_found_by_what_they_hold(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = io.BytesIO()
    image.fromarray(np.kron(PIXELS, np.ones((4, 4, 1), np.uint8))).save(picture, "PNG")
    root = tmp_path / "files"
    elf = b"\x7fELF" + bytes(range(256)) * 8
    for name, data in {
        "a.wav": raw_corpus.wav(SAMPLES, 8000),
        "silence.wav": raw_corpus.wav(np.zeros(9000, np.int16), 8000),
        "deep/game.wad": wad(b"x" * 40, MIDI),
        "again.mid": MIDI,
        "photo.png": picture.getvalue(),
        "program": elf,
        "broken.wav": b"RIFF....WAVE",
        "text.txt": b"text " * 1000,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    found = raw_corpus.gather(root, dict.fromkeys(raw_corpus.KINDS, 10**6))
    files = {kind: [data for _, data in own] for kind, own in found.items()}
    assert files["wav16"] == [raw_corpus.wav(SAMPLES, 8000)]  # no silence
    assert files["wav8"] == [raw_corpus.wav(raw_corpus.rounded(SAMPLES), 8000)]
    assert files["midi"] == [MIDI]  # once, though it is there twice
    assert files["elf"] == [elf]
    assert files["ppm"] == [
        raw_corpus.ppm(np.asarray(image.fromarray(PIXELS).resize((240, 200), 0)))
    ]
    # Of a size that is wanted; drawn by the hash of the name, not by its order.
    assert raw_corpus.gather(root, dict(wav16=0, midi=1))["wav16"] == []


def test_sounds_are_read_and_rounded():
    samples, rate = raw_corpus.pcm(raw_corpus.wav(SAMPLES, 11025))
    assert rate == 11025 and (samples[:, 0] == SAMPLES).all()
    small = raw_corpus.rounded(np.int16([-32768, -129, 0, 127, 128, 32767]))
    assert small.tolist() == [0, 127, 128, 128, 129, 255]
    back, _ = raw_corpus.pcm(raw_corpus.wav(small, 8000))
    assert back.dtype == np.uint8 and back[:, 0].tolist() == small.tolist()
    assert raw_corpus.pcm(b"RIFF....WAVE") is None


def test_scores_are_files_that_other_programs_read():
    notes = raw_drawn.score(3, 64)
    assert notes == raw_drawn.score(3, 64) and notes != raw_drawn.score(4, 64)
    found = raw_parts.parts("midi", raw_drawn.midi(notes))
    count = {name: int((found == name).sum()) for name in set(found.tolist())}
    assert count["pitch"] == count["loudness"] == 2 * len(notes)  # on and off
    assert count["header"] == 22 and count["status"] == 2 * len(notes) + 2


@pytest.mark.parametrize("height", [96, 100, 1000])
@pytest.mark.parametrize("width", [96, 150])
def test_static_patches_of_three_bytes_are_pixels(width, height):
    data = raw_corpus.ppm(np.zeros((height, width, 3), np.uint8))
    starts = patch_starts(PatchingConfig(rule="static", patch_size=3), encode(data), None)
    found = raw_parts.parts("ppm", data)
    assert len(data) - 3 * width * height == (found == "header").sum()
    at = starts[1 : len(data) + 1] & (found != "header")
    assert set(found[at]) == {"red"} and at.sum() == width * height


def test_parts_of_sounds():
    data = raw_corpus.wav(SAMPLES, 8000)
    found = raw_parts.parts("wav16", data)
    assert (found == "header").sum() == 44
    low = np.frombuffer(data, np.uint8)[found == "low byte"]
    assert (low == (SAMPLES & 0xFF)).all()


def test_parts_of_a_midi_file_with_running_status():
    track = bytes.fromhex(
        "00 903c40 8100 3e40 00 b00740 00 c005 00 f0 02 1234 00 ff0301 41 00 ff2f00"
    )
    data = (
        b"MThd"
        + struct.pack(">IHHH", 6, 0, 1, 96)
        + b"MTrk"
        + struct.pack(">I", len(track))
        + track
    )
    found = raw_parts.parts("midi", data)[22:].tolist()
    short = dict(t="time", s="status", p="pitch", l="loudness", c="controller", m="meta")
    assert found == [short[c] for c in "tsplttpltscctsctsmmmtsmmmtsmm"]


def test_parts_of_a_program():
    table = 64 + 40
    text, names = b"\x90" * 16, b"\0.text\0.bss\0.shstrtab\0"
    head = (
        b"\x7fELF\x02\x01"
        + bytes(10)
        + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 4, 3)
    )

    def entry(name, kind, first, size):
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, first, size, 0, 0, 0, 0)

    entries = (
        entry(0, 0, 0, 0)
        + entry(1, 1, 64, 16)
        + entry(7, 8, 64, 10**6)
        + entry(12, 3, 80, len(names))
    )
    data = (head + text + names.ljust(24, b"\0")) + entries
    assert raw_parts.sections(data)[1:] == [
        (".text", 64, 16),
        (".bss", 64, 0),
        (".shstrtab", 80, len(names)),
    ]
    found = raw_parts.parts("elf", data)
    assert set(found[64:80]) == {"code"} and set(found[80 : 80 + len(names)]) == {"names"}
    assert set(found[:64]) == {"other"}
    assert raw_parts.sections(data[:50]) == [] and set(raw_parts.parts("elf", b"\x7fELF")) == {
        "other"
    }


def test_the_split_is_by_file_and_has_both_sides():
    for count in (2, 6, 20, 200):
        sizes = {f"{i}.wav": 1000 + i for i in range(count)}
        seed = not_text.split_seed(sizes)
        held = [n for n in sizes if is_held_out(n, not_text.HELD_OUT, seed)]
        assert 1 <= len(held) < count
        share = sum(sizes[n] for n in held) / sum(sizes.values())
        assert 0.1 < share < (0.6 if count == 2 else 0.2)


def test_other_coders():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 30_000).astype(np.uint8).tobytes()
    found = raw_baselines.measured("elf", [noise[:20_000]], [noise[20_000:]])
    assert found["xz"] > 8 and found["order_0"] == pytest.approx(8, abs=0.1)
    assert "flac" not in found and "png" not in found
    again = raw_baselines.measured("elf", [noise[:20_000]], [noise[5_000:15_000]])
    assert again["xz_trained"] < 0.3 < 8 < again["xz"]  # it has seen them
    assert raw_baselines.conditional_entropy(b"abcabd" * 500, 2) == pytest.approx(1 / 3, abs=0.01)
    smooth = np.tile(np.arange(120, dtype=np.uint8), (100, 1))[..., None].repeat(3, axis=2)
    pytest.importorskip("PIL")
    assert raw_baselines.png_bytes(raw_corpus.ppm(smooth)) < 2000


def test_flac_of_sixteen_and_of_eight_bits():
    soundfile = pytest.importorskip("soundfile", reason="pip install 'bltjax[sound]'")
    for samples in (SAMPLES, raw_corpus.rounded(SAMPLES)):
        data = raw_corpus.wav(samples, 8000)
        assert 0.5 * len(data) < raw_baselines.flac_bytes(data) < len(data)
    assert soundfile.available_subtypes("FLAC")


def test_a_coder_that_is_not_there_has_no_column(monkeypatch):
    monkeypatch.setattr(raw_baselines.importlib.util, "find_spec", lambda name: None)
    data = raw_corpus.wav(SAMPLES, 8000)
    assert "flac" not in raw_baselines.measured("wav16", [data], [data])


@pytest.mark.parametrize("size", study.SIZES)
def test_points_of_a_kind_read_equally_much(size, tmp_path):
    given = study.Settings(tmp_path, tmp_path / "out", "", ["*"], size, 1, True)
    planned = not_text.plan(given, not_text.chosen_kinds(["wav*", "ppm", "elf"]), {})
    assert [p.name for p in planned] == [
        *("wav16-entropy", "wav16-static", "wav8-entropy", "wav8-static"),
        *("ppm-entropy", "ppm-static", "elf-entropy"),
    ]
    sizes = {account(p).num_bytes for p in planned}
    assert max(sizes) == pytest.approx(min(sizes), rel=0.01)
    for point in planned:
        config = run_config(point)
        patch = raw_corpus.KINDS[point.about["kind"]].patch
        assert patch in (config.patching.patch_size, config.patching.target_patch_bytes)
    # Other settings are other points.
    changed = not_text.changed_settings(["blt_training.optimizer.learning_rate=1e-3"])
    (other,) = not_text.plan(given, ["elf"], changed)
    assert other.name.startswith("elf-entropy-") and other.name != "elf-entropy"
    assert run_config(other).blt_training.optimizer.learning_rate == 1e-3


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"--sources=mp3 match none of wav16, wav8, ppm, midi, elf"
    ):
        not_text.chosen_kinds(["mp3"])
    with pytest.raises(ValueError, match="--set='rate' must be NAME=VALUE"):
        not_text.changed_settings(["rate"])
    given = study.Settings(tmp_path, tmp_path / "out", "", ["*"], "laptop", 1, False)
    (tmp_path / "corpus.json").write_text('{"made_of": ["laptop", "drawn"], "kinds": {}}')
    with pytest.raises(ValueError, match="give another --workdir"):
        not_text.prepare(given, "/sounds", [])


def test_bytes_cost_what_the_scorer_says(tmp_path):
    """Also where a file goes on in rows that do not see each other."""
    model = bltjax.load(directories.hub(tmp_path / "hf_A", "hf_A_1b_like"))
    data = np.random.default_rng(0).integers(0, 256, 1500).astype(np.uint8).tobytes()
    found = raw_parts.costs(model, data)
    with jax.set_mesh(model.mesh):
        (score,) = score_documents(model._scoring(), [data], row_bytes=raw_parts.WINDOW)
    # Packed rows cut the patch that reaches over their border elsewhere.
    assert found.bits.sum() / len(data) == pytest.approx(score.bits_per_byte, rel=1e-4)
    assert score.num_patches - found.starts.sum() in (1, 2)  # that of BOS, and one at EOS
    (seen,) = look(model, [data])
    assert np.array_equal(np.flatnonzero(found.starts), seen.starts)
    assert np.allclose(found.entropies * np.log(2), seen.entropies)


def test_patches_are_drawn_and_parts_told(tmp_path, monkeypatch):
    """All of a study but its training, of drawn files, with a model that has learned nothing."""
    pytest.importorskip("matplotlib")
    given = study.Settings(tmp_path, tmp_path / "out", "", ["*"], "laptop", 1, False)
    monkeypatch.setattr(raw_drawn, "WIDTH", 120)
    monkeypatch.setattr(raw_drawn, "HEIGHT", 20)
    kinds = raw_corpus.make(tmp_path / "files", raw_corpus.DRAWN, ["ppm", "midi"], 40_000)
    for kind in kinds:
        settings = not_text.records_of(given, kind)
        data = DataConfig(
            sources=tuple(SourceConfig(**source) for source in settings["data.sources"]),
            suffixes=settings["data.suffixes"],
            validation_fraction=settings["data.validation_fraction"],
            seed=settings["data.seed"],
        )
        store.build(tmp_path / kind / "entropy" / "records", data)
        files = [set(not_text.files_of(given, kind, part)) for part in not_text.PARTS]
        assert all(files) and not files[0] & files[1]
        assert len(files[0] | files[1]) == kinds[kind]["files"]

    measured = not_text.measure(given, kinds)
    assert [row["kind"] for row in measured] == list(kinds)
    assert all(row["xz"] < 8 and row["held_out"] < row["bytes"] for row in measured)
    monkeypatch.setattr(raw_baselines, "measured", None)  # what was measured is kept
    assert not_text.measure(given, kinds) == measured

    planned = [p for p in not_text.plan(given, list(kinds), {}) if p.about["patches"] == "entropy"]
    model = bltjax.load(directories.hub(tmp_path / "hf_A", "hf_A_1b_like"))
    monkeypatch.setattr(bltjax, "load", lambda path: model)
    monkeypatch.setattr(not_text, "is_finished", lambda point, directory: True)
    monkeypatch.setitem(not_text.LOOK_BYTES, "laptop", 1)  # one file
    (tmp_path / "points").mkdir()
    parts = not_text.look(given, planned)
    assert {row["part"] for row in parts if row["kind"] == "ppm"} == {
        *("header", "red", "green", "blue")
    }
    for row in parts:
        assert row["entropy_patch_bytes"] >= 1 and 0 < row["entropy_bits"] < 20
    for kind in kinds:
        assert (given.out / f"{kind}-entropy.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(bltjax, "load", None)
    assert not_text.look(given, planned) == parts


@pytest.mark.parametrize("kind", raw_corpus.KINDS)
@pytest.mark.parametrize("has_entropies", [True, False])
def test_patches_of_each_kind_are_drawn(tmp_path, kind, has_entropies):
    pytest.importorskip("matplotlib")
    files = raw_corpus.KINDS[kind].draw()
    data = next(files) if kind != "elf" else b"\x7fELF" + bytes(range(256)) * 4
    rng = np.random.default_rng(0)
    bits = rng.uniform(0, 8, len(data))
    entropies = bits[::-1] if has_entropies else None
    found = raw_parts.Costs(rng.random(len(data)) < 0.25, entropies, bits)
    raw_pictures.draw(tmp_path / "patches.png", kind, data, found)
    assert (tmp_path / "patches.png").read_bytes().startswith(b"\x89PNG")
