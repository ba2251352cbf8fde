"""What a run reads of its records: shares, shards, thresholds, and refusals."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import RunConfig, from_config_dict
from bltjax.data.records import store as records
from bltjax.patching.calibrate import ScoreHistogram
from bltjax.recipe import corpus, entropies
from bltjax.recipe.checks import check_sources, check_stages
from bltjax.recipe.corpus_report import corpus_report
from tests.configs.tiny import get_config


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two sources, 40 and 10 documents, in shards of about 1000 bytes, without entropies."""
    root, random = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    for name, number in (("large", 40), ("small", 10)):
        (root / name).mkdir()
        for i in range(number):
            (root / name / f"{i}.txt").write_bytes(random.bytes(300))
    return records.build(root / "records", config(root).data)


def config(root, weights=(0.0, 0.0), **changes) -> RunConfig:
    settings = get_config()
    settings.data.shard_bytes = 1000
    settings.data.sources = tuple(
        dict(name=name, path=str(root / name), weight=weight)
        for name, weight in zip(("large", "small"), weights, strict=True)
    )
    return dataclasses.replace(from_config_dict(RunConfig, settings), **changes)


def reading(store, tmp_path, *stages, weights=(0.0, 0.0), **data) -> RunConfig:
    """A run of some stages on finished records."""
    settings = get_config()
    settings.data.records = str(store.directory)
    if any(weights):
        names = zip(("large", "small"), weights, strict=True)
        settings.data.sources = tuple(dict(name=n, weight=w) for n, w in names)
    for name, value in data.items():
        settings.patching[name] = value
    settings.stages = stages
    return from_config_dict(RunConfig, settings)


def with_entropies(store, of=("large", "small"), scales=(1.0, 1.0)):
    random = np.random.default_rng(1)
    for shard in store.all_shards:
        if shard.source in of:
            scale = scales[store.sources.index(shard.source)]
            documents = records.Documents([shard])
            sizes = [len(documents[i].data) + 2 for i in range(len(documents))]
            values = (random.random(n).astype(np.float16) * np.float16(scale) for n in sizes)
            records.write_entropies(shard, values)


@pytest.fixture
def fresh(tmp_path, store):
    """A copy of the records, to be written to."""
    shutil.copytree(store.directory, tmp_path / "records")
    return records.open_store(tmp_path / "records")


def test_shares_are_weights_or_sizes(store, tmp_path):
    sizes = {name: sum(s.num_bytes for s in store.shards(name)) for name in store.sources}
    by_size = corpus.shares(reading(store, tmp_path, "blt"), store)
    assert by_size == {name: size / sum(sizes.values()) for name, size in sizes.items()}
    weighted = corpus.shares(reading(store, tmp_path, "blt", weights=(1.0, 3.0)), store)
    assert weighted == dict(large=0.25, small=0.75)
    weighted = corpus.shares(reading(store, tmp_path, "blt", weights=(0.1, 0.3)), store)
    assert weighted == pytest.approx(dict(large=0.25, small=0.75))


def test_selected_shards_hold_each_sources_share(store, tmp_path):
    run = reading(store, tmp_path, "blt", weights=(1.0, 1.0))
    chosen = corpus.select(run, store, 4000)
    assert chosen == corpus.select(run, store, 4000) != store.shards()
    for source in store.sources:
        size = sum(s.num_bytes for s in chosen if s.source == source)
        assert size >= 2000 or [s for s in chosen if s.source == source] == store.shards(source)
        assert size < 2000 + 1500
    assert corpus.select(run, store, 10**9) == [s for s in store.shards() if s.documents]


def test_thresholds_count_sources_as_they_are_mixed(fresh, tmp_path):
    with_entropies(fresh, scales=(1.0, 2.0))
    found = {}
    for weights in ((1.0, 1.0), (1.0, 1e-3), (1e-3, 1.0)):
        run = reading(fresh, tmp_path, "blt", weights=weights)
        found[weights] = entropies.histogram(run, fresh, fresh.shards()).threshold(4.5)
    alone = {}
    for (source, _), histogram in records.score_histogram(fresh.shards()).items():
        alone.setdefault(source, ScoreHistogram()).merge(histogram)
    assert found[1.0, 1e-3] == pytest.approx(alone["large"].threshold(4.5), abs=0.01)
    assert found[1e-3, 1.0] == pytest.approx(alone["small"].threshold(4.5), abs=0.01)
    assert found[1.0, 1e-3] < found[1.0, 1.0] < found[1e-3, 1.0]


def test_the_first_threshold_of_a_working_directory_stays(fresh, tmp_path):
    with_entropies(fresh)
    run = reading(fresh, tmp_path, "blt")
    first = entropies.find_patches(run, RunDirectory(tmp_path), fresh, everything=True)
    assert first.mean_patch_bytes == pytest.approx(4.5, rel=0.02) and first.compilations == 0
    (tmp_path / "patching.json").write_text(json.dumps(dict(threshold=0.5)))
    again = entropies.find_patches(run, RunDirectory(tmp_path), fresh)
    assert again.patching.threshold == 0.5 and again.mean_patch_bytes < 2.2


def test_a_falling_threshold_gives_the_wanted_mean_and_even_sources(fresh, tmp_path):
    """One of them six times as hard as the other; each counts by its share of the mixture."""
    with_entropies(fresh, scales=(0.5, 3.0))
    apart = {}
    for rule in ("entropy", "falling"):
        run = reading(fresh, tmp_path, "blt", weights=(1.0, 2.0), rule=rule)
        (tmp_path / rule).mkdir()
        found = entropies.find_patches(run, RunDirectory(tmp_path / rule), fresh, everything=True)
        assert found.mean_patch_bytes == pytest.approx(4.5, rel=0.02)
        assert entropies.blt_layout(run, found).row_patches
        lengths = entropies.sample_lengths(found.patching, fresh.shards())
        means = {name: own.mean() for name, own in lengths.items()}
        assert 1 / (1 / means["large"] + 2 / means["small"]) == pytest.approx(1.5, rel=0.02)
        apart[rule] = means["large"] / means["small"]
    assert apart["entropy"] > 20 and 1 < apart["falling"] < 4
    report = corpus_report(run, fresh, found)
    told = {name: source["mean_patch_bytes"] for name, source in report["sources"].items()}
    assert told == means and report["threshold"] == found.patching.threshold


@pytest.mark.parametrize("in_step", [False, True])
def test_rows_of_preprocess_are_those_of_training(fresh, tmp_path, capsys, monkeypatch, in_step):
    """Though the threshold is that of the whole corpus, and the steps read a part of it."""
    with_entropies(fresh, scales=(1.0, 0.2))
    monkeypatch.setattr(entropies, "CALIBRATION_BYTES", 1000)
    run = reading(fresh, tmp_path, "blt", in_step=in_step)
    training = dataclasses.replace(run.blt_training, steps=2, batch_size=1, row_bytes=800)
    run = dataclasses.replace(run, blt_training=training)
    told = [
        entropies.find_patches(run, RunDirectory(tmp_path), fresh, everything=everything)
        for everything in (True, False)
    ]
    assert told[0].mean_patch_bytes == pytest.approx(4.5, rel=0.02)
    assert told[0].row_mean == told[1].row_mean == told[1].mean_patch_bytes != 4.5
    assert entropies.blt_layout(run, told[0]) == entropies.blt_layout(run, told[1])
    columns = [entropies.in_step_patches(run, patched, 800) for patched in told]
    assert columns[0] == columns[1]
    size, mean = sum(s.num_bytes for s in told[1].train), f"{told[1].row_mean:.2f}"
    preprocess, train = capsys.readouterr().out.splitlines()
    assert f"; {mean} in the {size} bytes that the steps read, which rows are sized" in preprocess
    assert f"patches: {mean} bytes" in train and f"before, in the {size} bytes that" in train


def test_records_with_entropies_need_no_model(fresh, tmp_path):
    run = reading(fresh, tmp_path, "blt", "evaluate")
    with pytest.raises(ValueError, match="need a trained entropy_model"):
        check_stages(run, RunDirectory(tmp_path))
    with pytest.raises(ValueError, match=r"there is no entropy model in .* --entropy_model=DIR"):
        entropies.find_patches(run, RunDirectory(tmp_path), fresh)
    with_entropies(fresh)
    check_stages(run, RunDirectory(tmp_path))
    with pytest.raises(ValueError, match="need a trained entropy_model"):
        check_stages(reading(fresh, tmp_path, "blt", "sample"), RunDirectory(tmp_path))


def test_entropies_of_two_models_are_not_mixed(fresh, tmp_path):
    with_entropies(fresh, of=("large",))
    with pytest.raises(ValueError, match=r"came with entropies and those of \['small'\] did not"):
        corpus.open_corpus(reading(fresh, tmp_path, "blt"), RunDirectory(tmp_path))
    with_entropies(fresh, of=("small",))
    corpus.open_corpus(reading(fresh, tmp_path, "blt"), RunDirectory(tmp_path))
    refused = "of a model that this run does not have"
    for stages, changes in ((("blt",), dict(in_step=True)), (("blt", "sample"), {})):
        with pytest.raises(ValueError, match=refused):
            corpus.open_corpus(reading(fresh, tmp_path, *stages, **changes), RunDirectory(tmp_path))
    (tmp_path / "entropy_model" / "weights").mkdir(parents=True)
    with pytest.raises(ValueError, match=refused):
        corpus.open_corpus(reading(fresh, tmp_path, "blt"), RunDirectory(tmp_path))
    records.claim_entropies(fresh, dict(some="model"))
    with pytest.raises(ValueError, match="have the entropies of a model already"):
        check_sources(reading(fresh, tmp_path, "entropy_model", "blt"), RunDirectory(tmp_path))


def test_a_model_in_training_gives_no_entropies(fresh, tmp_path):
    (tmp_path / "entropy_model" / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(ValueError, match="only a part of its training"):
        entropies.find_patches(reading(fresh, tmp_path, "blt"), RunDirectory(tmp_path), fresh)


def test_means_of_other_rules_are_those_of_the_mixture(store, tmp_path):
    changes = dict(rule="static", patch_size=6)
    run = reading(store, tmp_path, "blt", weights=(1.0, 2.0), **changes)
    patched = entropies.find_patches(run, RunDirectory(tmp_path), store)
    assert patched.mean_patch_bytes == pytest.approx(302 / 52, rel=0.01)  # 1, 5, 6, ..., 6, 2


def test_a_part_without_text_is_told_where_it_is_needed(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "only.txt").write_text("one document")
    settings = get_config()
    settings.data.root, settings.stages = str(tmp_path / "one"), ("entropy_model", "evaluate")
    run = from_config_dict(RunConfig, settings)
    with pytest.raises(ValueError, match=r"have no text for (train|validation): .* new --workdir"):
        corpus.open_corpus(run, RunDirectory(tmp_path))


@pytest.mark.parametrize("in_step", [False, True])
def test_rows_follow_from_the_mean_patch(in_step):
    settings = get_config()
    settings.patching.in_step = in_step
    settings.blt_training.row_bytes, settings.blt_training.row_patches = 0, 512
    run = from_config_dict(RunConfig, settings)
    patched = entropies.Patched(run.patching, 4.5, np.ones(1), [], [], 0)
    layout = entropies.blt_layout(run, patched)
    assert layout.row_bytes == 2304 and layout.row_patches == (0 if in_step else 512)
    assert entropies.in_step_patches(run, patched, layout.row_bytes) == 512
    given = dataclasses.replace(run.blt_training, row_bytes=4096, row_patches=0)
    run = dataclasses.replace(run, blt_training=given)
    assert entropies.blt_layout(run, patched).row_patches == (0 if in_step else 912)
    assert 912 < entropies.in_step_patches(run, patched, 4096) <= 1152


def test_sources_without_a_document_are_told_with_the_fields_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "t"}\n' * 30)
    settings = get_config()
    settings.data.root = str(tmp_path)
    run, directory = from_config_dict(RunConfig, settings), RunDirectory(tmp_path / "run")
    message = r"none of the 30 records .*'body' \(30 times\).*data.text_fields"
    with pytest.raises(ValueError, match=message):
        check_sources(run, directory)  # before anything is written
    assert not directory.path.exists()
    message = r"none of the 20 records .*'body' \(20 times\).*; then delete that directory"
    with pytest.raises(ValueError, match=message):
        corpus.open_corpus(run, directory)
    settings.data.text_fields = ("body",)
    check_sources(from_config_dict(RunConfig, settings), RunDirectory(tmp_path / "other"))
