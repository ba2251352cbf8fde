"""The entropy threshold that gives patches of a wanted mean size on a corpus."""

from collections.abc import Iterable, Sequence

import numpy as np

# Positions 0 and 1 always start a patch; under the monotonic rule 2 does too. Spec 2.3, 2.4.
_FORCED_STARTS = {"entropy": 2, "monotonic": 3}


def calibrate_threshold(
    entropies: Sequence[np.ndarray],
    target_patch_bytes: float,
    rule: str = "entropy",
    tolerance: float = 0.1,
) -> float:
    """Returns the threshold in nats whose mean patch size is nearest to the target. Spec 2.3, 2.4.

    entropies: one array [S] per document, nats, where entry i is the uncertainty after token i of
    BOS + bytes + EOS. Patches are those of whole documents, before any limit on their length, and
    the mean is over patches: all positions / all patches. rule: "entropy" or "monotonic".

    The result is exact: the patch count changes only at the values found in the corpus, and all of
    them are tried. Raises ValueError for another rule, for entropies that are not finite, for a
    target that no threshold attains, and if equal entropies (a constant entropy model, say) keep
    the nearest mean farther from the target than the fraction `tolerance`.
    """
    if rule not in _FORCED_STARTS:
        raise ValueError(f"rule is {rule!r}; a threshold is calibrated for {list(_FORCED_STARTS)}")
    num_forced = _FORCED_STARTS[rule]
    num_positions = sum(len(row) for row in entropies)
    forced = sum(min(len(row), num_forced) for row in entropies)
    scores = np.concatenate(
        [np.zeros(0, np.float32)] + [_scores(row, rule)[num_forced - 1 :] for row in entropies]
    )
    _check(scores, num_positions, forced, target_patch_bytes)

    values, counts = np.unique(scores, return_counts=True)
    # A start needs a score above the threshold. Just below the lowest value all scores are above.
    thresholds = np.append(values, values[:1] - 1) if values.size else np.zeros(1, np.float32)
    above = np.append(scores.size - np.cumsum(counts), scores.size)
    means = num_positions / (forced + above)
    nearest = np.argmin(np.abs(means - target_patch_bytes))
    if abs(means[nearest] - target_patch_bytes) > tolerance * target_patch_bytes:
        raise ValueError(
            f"target_patch_bytes is {target_patch_bytes}, but so many entropies are equal that the "
            f"nearest mean is {means[nearest]:.4g}: use more documents or a better entropy model, "
            f"or raise tolerance above {tolerance}"
        )
    return float(thresholds[nearest])


def mean_patch_bytes(starts: Iterable[np.ndarray]) -> float:
    """Returns positions / patches over the documents, from bool starts [S'] of each.

    Raises ValueError where there is no patch at all.
    """
    num_positions = num_patches = 0
    for row in starts:
        num_positions += row.size
        num_patches += int(row.sum())
    if not num_patches:
        raise ValueError("there are no patches to take the mean of: no documents, or no starts")
    return num_positions / num_patches


def _scores(entropies: np.ndarray, rule: str) -> np.ndarray:
    """Returns float32 [S-1], what the rule compares with the threshold for a start at 1..S-1."""
    scores = np.asarray(entropies, np.float32)[:-1]
    return np.diff(scores, prepend=scores[:1]) if rule == "monotonic" else scores


def _check(scores: np.ndarray, num_positions: int, forced: int, target: float) -> None:
    if not num_positions:
        raise ValueError("there are no entropies to calibrate on: give at least one document")
    if not np.isfinite(scores).all():
        raise ValueError("some entropies are not finite: check the entropy model's logits")
    largest = num_positions / forced
    if not 1 <= target <= largest:
        raise ValueError(
            f"target_patch_bytes is {target}; on these documents a threshold attains 1 to "
            f"{largest:.4g} bytes"
        )
