"""What the studies make of results: files, fits, pictures and pages."""

import json
from pathlib import Path

import pytest

from benchmarks.studies import (
    ablations,
    blocks,
    fixed_inference,
    languages,
    multilingual,
    not_text,
    pages,
    recipe,
    robustness,
    scaling,
)
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.evaluation.noise import KINDS, WHERE
from tests.figures import collisions

reason = "pictures need pip install 'bltjax[plots]'"
Figure = pytest.importorskip("matplotlib.figure", reason=reason).Figure


def row(family, level, bits, **more):
    cost = dict(training_flops=1e12 * 2**level, training_bytes=1e6 * 2**level, patch_bytes=4.0)
    cost |= dict(flops_per_byte=1e6, entropy_model_flops_per_byte=0.0, parameters=10)
    cost |= dict(parameters_without_hash_tables=5, median_source=bits - 0.5)
    return (
        dict(name=f"{family}-{level}", family=family, level=level, bits_per_byte=bits) | cost | more
    )


def check_page(out, *pictures):
    page = (out / "README.md").read_text()
    for name in pictures:
        assert f"]({name})" in page and (out / name).read_bytes().startswith(b"\x89PNG")
    return page


def test_results_survive_a_file(tmp_path):
    rows = [dict(a=1, b=0.25), dict(a=2, c="x y")]
    pages.write_csv(tmp_path / "r.csv", rows)
    assert pages.read_csv(tmp_path / "r.csv") == [
        dict(a=1, b=0.25, c=None),
        dict(a=2, b=None, c="x y"),
    ]


def test_the_page_of_scaling(tmp_path):
    rows = [row("BPE", level, 2 * 0.9**level) for level in range(3)]
    rows += [row("bytes", 0, bits, name=f"bytes-{bits}") for bits in (2.0, 2.2, 2.4)]
    found = scaling.summary(rows)
    assert found["bytes"][0]["bits_per_byte"] == pytest.approx(2.2)
    assert found["bytes"][0]["deviation"] == pytest.approx(0.2)
    assert found["BPE"][0]["deviation"] is None  # of a single seed it is not known
    assert scaling.slope(found["BPE"]) == pytest.approx(-0.152, abs=1e-3)  # log 0.9 / log 2
    assert scaling.slope(found["bytes"]) is None
    pages.write_csv(tmp_path / "results.csv", rows)
    scaling.report(pages.read_csv(tmp_path / "results.csv"), tmp_path)
    page = check_page(tmp_path, "curves.png")
    assert "At level 0, from best to worst: BPE 2.0000, bytes 2.2000." in page
    assert "| bytes | 0 | 3 | 0.2000 | 2.2000 | 1.7000 |" in page


def test_the_page_of_fixed_inference(tmp_path):
    rows = [
        row(family, 0, bits, name=f"{family}-0-{megabytes}MB", training_bytes=megabytes * 1e6)
        for family, megabytes, bits in (
            ("BPE", 1, 2.0),
            ("BPE", 2, 1.5),
            ("BPE with tables", 1, 1.7),
            ("BPE with tables", 2, 1.6),
            ("BLT entropy 4", 1, 1.9),
            ("BLT entropy 4", 2, 1.4),
            ("bytes with tables", 2, 1.8),
        )
    ]
    fixed_inference.report(rows, tmp_path)
    page = check_page(tmp_path, "curves-0.png")
    assert (
        "BLT entropy 4: -0.1000 at 1e+06 bytes, -0.1000 at 2e+06 bytes beside BPE; it is better in "
        "2 of 2." in page
    )
    assert (
        "BLT entropy 4: +0.2000 at 1e+06 bytes, -0.2000 at 2e+06 bytes beside BPE with tables; it "
        "is better in 1 of 2." in page
    )
    # Compared after as much text, not by rank.
    assert "bytes with tables: +0.3000 at 2e+06 bytes beside BPE; it is better in 0 of 1." in page


def test_the_page_of_ablations(tmp_path):
    rows = [
        row("", 0, bits, group=group, change=change)
        for group, change, bits in (
            ("baseline", "baseline", 2.0),
            ("patching", "space", 2.1),
            ("patching", "static 4", 2.3),
        )
    ]
    ablations.report(rows, tmp_path)
    page = check_page(tmp_path, "changes.png")
    assert "Patching, from best to worst: baseline 2.0000, space 2.1000, static 4 2.3000." in page
    assert "+0.3000" in page
    with pytest.raises(ValueError, match="the baseline has not finished"):
        ablations.report(rows[1:], tmp_path)


def test_the_page_of_blocks(tmp_path):
    rows = [
        row("", 0, bits, group=group, change=change)
        | dict(block_loss=2.5, block_loss_deviation=0.1, stood=stood, bytes_per_call=5.0)
        | dict(step_flops_per_byte=3e6)
        for group, change, bits, stood in (
            (blocks.PLAIN, blocks.PLAIN, 2.0, None),
            (blocks.BASELINE, blocks.BASELINE, 2.05, 0.4),
            ("size", "16 bytes", 2.25, 0.125),
        )
    ]
    blocks.report(rows, tmp_path)
    page = check_page(tmp_path, "changes.png")
    assert "| size | 16 bytes | 2.2500 | +0.2500 | 2.500 | 0.100 | 12.5% | 5.00 | 3.00 |" in page
    with pytest.raises(ValueError, match="first two points have not finished"):
        blocks.report(rows[1:], tmp_path)


def test_late_losses_are_those_of_the_last_quarter(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics("blt").parent.mkdir()
    lines = [dict(step=step, block_loss=step / 10) for step in range(10, 101, 10)]
    run.metrics("blt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = blocks.late_losses(run)
    assert found["block_loss"] == pytest.approx(9) and found["block_loss_deviation"] == 1


def test_the_page_of_the_recipe(tmp_path):
    rows = [
        row("", 0, bits, group=group, change=change, patch_use=use)
        for group, change, bits, use in (
            ("recipe", "recipe", 2.0, 0.2),
            ("decay", "0.1", 2.1, 0.1),
            ("decay", "1", 1.9, 0.05),
        )
    ]
    rows += [
        row("", 0, bits, group="widths", change="", patch_use=0.1, width=width, rate=rate)
        for width, rate, bits in ((64, 0.01, 2.0), (64, 0.02, 1.8), (32, 0.01, 2.2))
    ]
    recipe.report(rows, tmp_path)
    page = check_page(tmp_path, "changes.png", "use.png", "widths.png")
    best = "1 1.9000 (use 0.050), recipe 2.0000 (use 0.200), 0.1 2.1000 (use 0.100)"
    assert f"Decay, from best to worst: {best}." in page
    assert "The best of these rates is 0.01 at width 32, 0.02 at width 64." in page
    with pytest.raises(ValueError, match="the recipe has not finished"):
        recipe.report(rows[1:], tmp_path)


def test_the_page_of_languages(tmp_path):
    languages = [
        dict(
            language=language,
            BLT_bits_per_byte=blt,
            BPE_bits_per_byte=2.0,
            BPE_marks_bits_per_byte=1.5,
            BLT_patch_bytes=4.5,
            BPE_token_bytes=3.0,
            BPE_marks_token_bytes=3.5,
        )
        for language, blt in (("de", 1.9), ("th", 1.0), ("en", 2.1))
    ]
    rows = [row("BLT", 0, 1.7), row("BPE", 0, 2.0), row("BPE_marks", 0, 1.5)]
    multilingual.report(rows, languages, tmp_path)
    page = check_page(tmp_path, "bits.png", "sizes.png")
    assert "ahead of BPE in 2 of 3 languages: by 1.0000 bits per byte in th" in page
    assert "ahead of BPE marks in 1 of 3 languages: by 0.5000 bits per byte in th" in page


def test_the_page_of_patches_by_language(tmp_path):
    sizes = dict(entropy=(112.0, 1.4), falling=(4.6, 3.5))
    found = [
        dict(language=language)
        | {f"{rule}: patch_bytes": sizes[rule][i] for rule in sizes}
        | {f"{rule}: bits_per_byte": 2.0 + i for rule in sizes}
        for i, language in enumerate(("el", "zh"))
    ]
    languages.report([row(rule, 0, 2.0) for rule in sizes], found, tmp_path)
    page = check_page(tmp_path, "sizes.png", "bits.png")
    assert "Entropy: patches of 1.40 (zh) to 112.00 bytes (el), 2.5000 bits per byte" in page
    assert "| el | 112.000 | 4.600 | 2.000 | 2.000 |" in page
    assert "| entropy | 2 | 1.400 | zh |" in page and "| falling | 0 | 3.500 | zh |" in page


def test_the_page_of_robustness(tmp_path):
    choice = {robustness.ACCURACY: 0.5}
    noise = dict(
        clean={robustness.ACCURACY: 0.9, "chance": 0.25},
        noisy={kind: dict.fromkeys(WHERE, choice) for kind in KINDS},
        mean=choice,
        bits_per_byte=dict.fromkeys(["clean", *KINDS], 2.0),
    )
    spelled = dict(spelling=dict(exact_match=0.99, bits_per_byte=0.1))
    found = {}
    for family in ("BLT", "BPE"):
        found[f"{family}-0"] = dict(noise=noise, tasks=spelled)
        found[f"{family}-1"] = dict(tasks=spelled)
    rows = [row(name.split("-")[0], int(name[-1]), 2.0, mixture="plain") for name in found]
    robustness.report(rows, found, tmp_path)
    page = check_page(tmp_path, "noise.png", "bits.png", "spelling.png")
    assert "| clean | 0.900 | 2.000 | 0.900 | 2.000 |" in page
    assert "| chance | 0.250 |  | 0.250 |  |" in page
    assert page.count("| spelling | 0.000 | 0.990 | 0.100 | 0.990 | 0.100 |") == 2


def test_the_page_of_bytes_that_are_no_text(tmp_path):
    rows = [
        row("", 0, bits, kind=kind, patches=patches)
        for kind, patches, bits in (
            ("wav16", "entropy", 5.5),
            ("wav16", "static", 5.25),
            ("elf", "entropy", 2.5),
        )
    ]
    kinds = [
        dict(kind="wav16", origin="debian", files=9, order_2=6.0, xz=6.25, flac=5.0),
        dict(kind="elf", origin="this machine's", files=3, order_2=2.75, xz=2.0),
    ]
    parts = [dict(kind="wav16", part="low byte", bytes=10, entropy_bits=7.5, static_bits=7.4)]
    for name, own in (("results", rows), ("kinds", kinds), ("parts", parts)):
        pages.write_csv(tmp_path / f"{name}.csv", own)
    read = [pages.read_csv(tmp_path / f"{name}.csv") for name in ("results", "kinds", "parts")]
    not_text.report(*read, tmp_path)
    page = check_page(tmp_path, "bits.png")
    assert (
        "* wav16: FLAC 5.00, BLT static 5.25, BLT entropy 5.50, order-2 n-grams 6.00, xz 6.25."
        in page
    )
    assert "\n* elf: xz 2.00, BLT entropy 2.50, order-2 n-grams 2.75." in page
    assert "| wav16 | low byte |" in page and "](wav16-static.png)" in page


def test_what_is_kept_is_what_the_studies_make(tmp_path, monkeypatch):
    """The pages follow from the results beside them; legends of their pictures hide nothing."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    studies = ablations, blocks, fixed_inference, languages, multilingual, robustness, scaling
    for study in studies:
        kept = Path(study.__file__).parent / "results" / study.__name__.rpartition(".")[2]
        rows, more = pages.read_csv(kept / "results.csv"), []
        if study in (languages, multilingual):
            more = [pages.read_csv(kept / "languages.csv")]
        if study is robustness:
            more = [json.loads((kept / "robustness.json").read_text())]
        study.report(rows, *more, tmp_path)
        assert (tmp_path / "README.md").read_text() == (kept / "README.md").read_text()
    assert len(figures) == 12
    for figure in figures:
        assert not collisions(figure)
