"""Histograms of scores give the patches that the rules cut, whatever parts they are counted in."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.config import PatchingConfig
from bltjax.patching import boundaries, calibrate
from bltjax.patching.boundaries import patch_starts
from bltjax.patching.calibrate import CALIBRATED, ScoreHistogram

RULES = sorted(CALIBRATED)
# Between neighbours on the grid, on it, and with many ties.
VALUES = st.one_of(
    st.sampled_from([0.0, 2**-12, 0.25, 0.5, 1.0, 3.0, np.log(260)]),
    st.floats(-(2**-20), 5.5625, width=32),
)
DOCUMENTS = st.lists(st.lists(VALUES, min_size=1, max_size=12), min_size=1, max_size=5)


def correlated(num_documents, dtype=np.float32, seed=0):
    """Documents whose entropies wander, as those of text do."""
    rng = np.random.default_rng(seed)
    noise = [np.cumsum(rng.normal(size=n)) for n in rng.integers(1, 400, num_documents)]
    return [(2.5 + 2.4 * np.sin(walk)).astype(dtype) for walk in noise]


def histogram(documents):
    result = ScoreHistogram()
    for entropies in documents:
        result.add(entropies)
    return result


def brute_force_mean(documents, threshold, rule):
    config = PatchingConfig(rule=rule, threshold=threshold, target_patch_bytes=None)
    starts = [patch_starts(config, np.zeros(len(h), np.int32), h)[: len(h)] for h in documents]
    return sum(row.size for row in starts) / sum(int(row.sum()) for row in starts)


def assert_equal(one, other):
    one, other = one.arrays(), other.arrays()
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@settings(max_examples=60)
@given(documents=DOCUMENTS, rule=st.sampled_from(RULES), step=st.integers(-24000, 24000))
def test_means_are_those_of_the_patches(dtype, documents, rule, step):
    documents = [np.array(row, dtype) for row in documents]
    found = histogram(documents)
    assert found.num_documents == len(documents)
    assert found.num_positions == sum(map(len, documents))
    rises = np.diff(np.concatenate(documents).astype(np.float32))
    on_grid = np.floor(rises[:5] * 4096) / 4096
    for threshold in (step / 4096, 0.25, 0.0, -0.25, np.inf, -np.inf, *on_grid):
        expected = brute_force_mean(documents, threshold, rule)
        assert found.mean_patch_bytes(threshold, rule) == expected
    assert found.mean_patch_bytes(0.25 + 1e-9) == found.mean_patch_bytes(0.25)


@settings(max_examples=60)
@given(documents=DOCUMENTS, rule=st.sampled_from(RULES), share=st.floats(0, 1))
def test_no_threshold_of_the_grid_is_nearer(documents, rule, share):
    documents = [np.round(np.array(row, np.float32), 1) for row in documents]
    found = histogram(documents)
    scores = np.concatenate([np.append(h, np.diff(h)) for h in documents])
    below = np.floor(scores * 4096) / 4096
    candidates = np.unique(np.concatenate([below, below + 1 / 4096, below - 1 / 4096]))
    means = [brute_force_mean(documents, threshold, rule) for threshold in candidates]
    target = 1 + share * (max(means) - 1)
    threshold = found.threshold(target, rule, tolerance=np.inf)
    assert threshold * 4096 == round(threshold * 4096)
    nearest = min(abs(mean - target) for mean in means)
    assert abs(brute_force_mean(documents, threshold, rule) - target) <= nearest + 1e-9


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", [1.5, 4.5, 8.0])
def test_half_of_the_documents_calibrate_the_other_half(target, rule, dtype):
    documents = correlated(1200, dtype)
    half, other = documents[::2], documents[1::2]
    threshold = histogram(half).threshold(target, rule)
    assert brute_force_mean(half, threshold, rule) == pytest.approx(target, rel=0.005)
    assert brute_force_mean(other, threshold, rule) == pytest.approx(target, rel=0.02)


def test_stored_and_fresh_entropies_give_the_same_patches():
    """Thresholds lie midway between float16 numbers, where rounding to them turns."""
    fresh = np.random.default_rng(0).uniform(0.5, 5, 200_000).astype(np.float32)
    stored = fresh.astype(np.float16)
    threshold = histogram([stored]).threshold(3.0)
    assert 0 < np.mean(stored > threshold) < 1
    np.testing.assert_array_equal(fresh > threshold, stored > threshold)


@settings(max_examples=30)
@given(documents=DOCUMENTS, cut=st.integers(0, 5))
def test_merged_is_added_and_saved_is_loaded(documents, cut):
    documents = [np.array(row, np.float32) for row in documents]
    merged = histogram(documents[:cut])
    merged.merge(histogram(documents[cut:]))
    assert_equal(merged, histogram(documents))
    file = io.BytesIO()
    np.savez_compressed(file, **merged.arrays())
    file.seek(0)
    loaded = ScoreHistogram.from_arrays(np.load(file))
    assert_equal(loaded, merged)
    loaded.add(np.ones(9, np.float32))  # it goes on counting
    assert loaded.num_positions == merged.num_positions + 9
    assert loaded.arrays()["entropy_counts"].sum() == merged.arrays()["entropy_counts"].sum() + 7


def test_long_documents_are_counted_in_pieces(monkeypatch):
    documents = correlated(12)
    whole = histogram(documents)
    for chunk in (1, 2, 3, 50):
        monkeypatch.setattr(calibrate, "_CHUNK", chunk)
        assert_equal(histogram(documents), whole)


def test_short_documents_are_counted_together(monkeypatch):
    counted, count = [], ScoreHistogram._count
    monkeypatch.setattr(ScoreHistogram, "_count", lambda self: (counted.append(self), count(self)))
    monkeypatch.setattr(calibrate, "_CHUNK", 1000)
    histogram([np.ones(52, np.float32)] * 100)
    assert len(counted) == 5


def test_files_are_small():
    assert sum(a.nbytes for a in ScoreHistogram().arrays().values()) < 100
    arrays = histogram([np.full(100, 2.0, np.float32)]).arrays()
    assert arrays["entropy_counts"].tolist() == [98] and arrays["entropy_first"] == 2 * 4096


def test_documents_may_change_after_they_were_added():
    entropies = np.linspace(0, 5, 50, dtype=np.float32)
    found, expected = histogram([entropies]), histogram([entropies.copy()])
    expected.arrays()
    entropies[:] = 0
    assert_equal(found, expected)


@pytest.mark.parametrize("target", [0.9, 1000.0, float("nan")])
def test_unreachable_targets_name_the_range(target):
    documents = [np.linspace(0, 1, 10), np.linspace(0, 2, 30)]
    assert brute_force_mean(documents, np.inf, "entropy") == 10
    with pytest.raises(ValueError, match=f"is {target}; .* attains 1 to 10 bytes"):
        histogram(documents).threshold(target)


def test_equal_entropies_are_an_error():
    found = histogram([np.ones(100)])
    with pytest.raises(ValueError, match=r"entropies are equal that the nearest mean is 1: .* 0.1"):
        found.threshold(4.5)
    assert found.threshold(1.05) == 1 - 1 / 4096
    assert found.threshold(50.0) == 1


def test_documents_of_forced_starts_only_have_one_mean():
    found = histogram([np.ones(2, np.float32), np.ones(1, np.float32)])
    assert found.threshold(1.0) == 0
    assert found.mean_patch_bytes(5.0) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.01, 8.1])
def test_impossible_entropies_are_refused(value):
    found = ScoreHistogram()
    with pytest.raises(ValueError, match=r"entropies range from .* check the entropy model"):
        found.add(np.array([1, value, 1], np.float32))
    assert found.num_documents == found.num_positions == 0


def test_bad_arguments():
    for rule in boundaries.RULES.keys() - CALIBRATED:
        with pytest.raises(ValueError, match=f"rule is '{rule}'; .* calibrated for .*'monotonic'"):
            histogram([np.ones(9)]).threshold(4.5, rule)
    for unready in (ScoreHistogram().threshold, ScoreHistogram().mean_patch_bytes):
        with pytest.raises(ValueError, match="at least one document"):
            unready(4.5)
    for wrong in (np.ones((2, 9)), np.ones(0), np.ones(9, int)):
        with pytest.raises(ValueError, match="must be a vector of floats"):
            ScoreHistogram().add(wrong)


def test_foreign_histograms_are_refused():
    arrays = histogram([np.ones(9)]).arrays()
    for name, value in dict(steps_per_nat=1024, entropy_first=10**6, num_positions=3).items():
        with pytest.raises(ValueError, match=r"histogram of .* make it again from the entropies"):
            ScoreHistogram.from_arrays(arrays | {name: value})


@settings(max_examples=20, deadline=None)
@given(target=st.floats(1.2, 20), seed=st.integers(0, 99))
def test_a_rule_without_a_histogram_is_searched(target, seed):
    documents = [h.astype(np.float32) for h in correlated(60, np.float16, seed)]

    def mean_at(threshold):
        return brute_force_mean(documents, threshold, "falling")

    threshold = calibrate.search_threshold(target, mean_at)
    assert threshold * 4096 == round(threshold * 4096)
    assert mean_at(threshold) == pytest.approx(target, rel=0.05)


def test_a_search_is_short_and_ends_at_what_no_threshold_attains():
    asked = []

    def mean_at(threshold):
        asked.append(threshold)
        return min(1 + threshold, 3.0)

    assert calibrate.search_threshold(2.5, mean_at) == pytest.approx(1.5, abs=2.5e-3)
    assert len(asked) < 15
    with pytest.raises(ValueError, match=r"target_patch_bytes is 4\.5; .* is 3 bytes"):
        calibrate.search_threshold(4.5, mean_at)
    assert len(asked) < 100


def test_lengths_are_counted_and_described():
    found = calibrate.length_histogram(np.array([1, 1, 3, 255, 256, 9000], np.int32))
    assert found.dtype == np.int64 and found.shape == (257,)
    assert {n: found[n] for n in np.flatnonzero(found)} == {1: 2, 3: 1, 255: 1, 256: 2}
    assert calibrate.describe_lengths(found) == dict(p50=3, p90=256, p99=256, max=256)
    counts = calibrate.length_histogram(np.arange(1, 101))
    assert calibrate.describe_lengths(counts) == dict(p50=50, p90=90, p99=99, max=100)
    with pytest.raises(ValueError, match="length is 0"):
        calibrate.length_histogram(np.array([2, 0]))
    with pytest.raises(ValueError, match="no patches"):
        calibrate.describe_lengths(calibrate.length_histogram([]))


@given(size=st.integers(3, 200_000), mean=st.floats(1, 100))
def test_row_budgets_fit_each_other(size, mean):
    for row_bytes, row_patches in (
        (size, calibrate.row_patches_for(size, mean)),
        (calibrate.row_bytes_for(size, mean), size),
    ):
        assert row_patches <= row_bytes
        step = 128 if max(row_patches, row_bytes) >= 1024 else 8
        # The budget that was asked for has room for what the other one holds, and little more.
        assert abs((row_patches - 1) * mean - row_bytes) <= (step + 2) * mean
    row_bytes, row_patches = (
        calibrate.row_bytes_for(size, mean),
        calibrate.row_patches_for(size, mean),
    )
    assert row_bytes % (128 if row_bytes >= 1024 else 8) == 0
    assert row_patches in (size, row_patches // 8 * 8)
    assert row_patches < 1024 or row_patches in (size, row_patches // 128 * 128)
    again = calibrate.row_patches_for(row_bytes, mean)
    assert abs(again - size) <= 128 / mean + 130


def test_row_budgets_of_usual_sizes():
    assert calibrate.row_patches_for(4096, 4.5) == 912  # 911 patches fill the row, and the tail
    assert calibrate.row_bytes_for(912, 4.5) == 4224
    assert calibrate.row_patches_for(8192, 4.5) == 1792  # unused patches cost more than bytes
    assert calibrate.row_bytes_for(1024, 6.0) == 6144
    # Room for 8 patches of 4.5 bytes, and the tail; no fewer bytes than patches.
    assert calibrate.row_patches_for(36, 4.5) == 8 and calibrate.row_bytes_for(9, 4.5) == 40
    assert calibrate.row_patches_for(20, 1.0) == 16 and calibrate.row_bytes_for(9, 1.0) == 16


def test_bad_budgets():
    for convert in (calibrate.row_bytes_for, calibrate.row_patches_for):
        with pytest.raises(ValueError, match="=2 must be at least 3"):
            convert(2, 4.5)
        for mean in (0.5, np.inf, np.nan):
            with pytest.raises(ValueError, match=f"mean_patch_bytes={mean}"):
                convert(512, mean)
