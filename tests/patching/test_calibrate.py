"""Calibrated thresholds reach the wanted patch size as nearly as the corpus allows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.patching import boundaries, calibrate

RULES = {"entropy": boundaries.entropy_starts, "monotonic": boundaries.monotonic_starts}


def corpus(seed=0, num_documents=40, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.gamma(2, 0.5, rng.integers(1, 200)).astype(dtype) for _ in range(num_documents)]


def mean_at(threshold, entropies, rule):
    return calibrate.mean_patch_bytes(RULES[rule](row, threshold)[:-1] for row in entropies)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", [1.0, 1.5, 4.5, 8.0, 20.0])
def test_hits_the_target(rule, target):
    entropies = corpus()
    threshold = calibrate.calibrate_threshold(entropies, target, rule)
    # One patch more or less moves the mean by this much; distinct entropies allow every count.
    num_positions = sum(map(len, entropies))
    step = target**2 / num_positions
    assert abs(mean_at(threshold, entropies, rule) - target) <= step


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=12),
        min_size=1,
        max_size=4,
    ),
    share=st.floats(0, 1),
    rule=st.sampled_from(list(RULES)),
)
def test_no_threshold_is_nearer(rows, share, rule):
    """With ties, against every threshold that could make a difference."""
    entropies = [np.array(row, np.float32) for row in rows]
    means = [mean_at(threshold, entropies, rule) for threshold in np.arange(-4, 4, 0.125)]
    target = 1 + share * (max(means) - 1)
    threshold = calibrate.calibrate_threshold(entropies, target, rule, tolerance=np.inf)
    nearest = min(abs(mean - target) for mean in means)
    assert abs(mean_at(threshold, entropies, rule) - target) <= nearest + 1e-9


def test_float16_entropies_calibrate_as_they_are_compared():
    entropies = corpus(dtype=np.float16)
    threshold = calibrate.calibrate_threshold(entropies, 4.5)
    assert mean_at(threshold, entropies, "entropy") == pytest.approx(4.5, rel=0.01)


@pytest.mark.parametrize("target", [0.9, 1000.0, float("nan")])
def test_unreachable_targets_name_the_range(target):
    entropies = [np.linspace(0, 1, 10), np.linspace(0, 2, 30)]
    assert mean_at(np.inf, entropies, "entropy") == 10
    with pytest.raises(ValueError, match=f"is {target}; .* attains 1 to 10 bytes"):
        calibrate.calibrate_threshold(entropies, target)


def test_equal_entropies_are_an_error():
    with pytest.raises(ValueError, match="entropies are equal that the nearest mean is 1"):
        calibrate.calibrate_threshold([np.ones(100)], 4.5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="rule is 'space'"):
        calibrate.calibrate_threshold([np.ones(9)], 4.5, "space")
    with pytest.raises(ValueError, match="at least one document"):
        calibrate.calibrate_threshold([], 4.5)
    with pytest.raises(ValueError, match="not finite"):
        calibrate.calibrate_threshold([np.full(9, np.nan)], 1.5)


def test_mean_patch_bytes():
    starts = [np.array([True, True, False, False]), np.array([True, True])]
    assert calibrate.mean_patch_bytes(starts) == 1.5
    with pytest.raises(ValueError, match="no patches"):
        calibrate.mean_patch_bytes([])
