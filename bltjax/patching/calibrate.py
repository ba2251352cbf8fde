"""Calibrates the entropy threshold to a wanted mean patch, and sizes rows for that mean.

The score that a rule compares with its threshold is counted in a histogram, once per corpus:
histograms of parts add up, and a threshold for any mean is read off the sum. Bins are right-closed
on a uniform grid, so the number of scores above a grid value is exact, and so is the mean patch
size at a threshold taken from the grid (all its values are float32 numbers).
"""

import math
from collections.abc import Callable

import numpy as np

from bltjax.patching.boundaries import RULES
from bltjax.patching.falling import STEPS_PER_NAT

CALIBRATED = {name: rule for name, rule in RULES.items() if rule.has_histogram}
# Shares of an 8B model's compute that go with bytes and with patches (paper eq. 13-17).
BYTE_COMPUTE, PATCH_COMPUTE = 0.26, 0.74
MAX_NATS = 8.0  # of 260 ids they are at most ln 260 = 5.56; files may come of other vocabularies
_OFFSET = int(MAX_NATS * STEPS_PER_NAT) + 2  # the bin of score 0; the lowest rise leaves one free
_BINS = 2 * _OFFSET + 1
_CHUNK = 1 << 18  # scores that are counted together
_MOST_STEPS, _NEAR = 2**30, 1e-3  # of a search: highest threshold, distance that will do
_LAST_LENGTH = 256  # of a length histogram: this and longer


class ScoreHistogram:
    """Counts the scores of the rules in CALIBRATED.

    Bin k of a rule counts scores in ((k - 1) / 4096, k / 4096] nats. Patches are those of whole
    documents, before any limit on their length.
    """

    def __init__(self):
        self.num_documents = 0
        self.num_positions = 0
        self._counts = {rule: np.zeros(_BINS, np.int64) for rule in CALIBRATED}
        # Scores that are not counted yet: to count few takes as long as to count many.
        self._waiting = {rule: [] for rule in CALIBRATED}
        self._num_waiting = 0

    def add(self, entropies: np.ndarray) -> None:
        """Counts one document's entropies [S], nats, float16 or float32.

        Entry i is the uncertainty after token i of BOS + bytes + EOS. Raises ValueError for an
        array of another form, and for values that no byte distribution has.
        """
        _check_entropies(entropies)
        self.num_documents += 1
        self.num_positions += len(entropies)
        # A start at s has the score of entry s - 1, and that of entry 0 is forced anyway.
        compared = entropies[1:-1]
        for first in range(0, len(compared), _CHUNK):
            # With the entry before, from which the first one rises.
            piece = compared[max(first - 1, 0) : first + _CHUNK].astype(np.float32)
            for name, rule in CALIBRATED.items():
                uncounted = 1 if first else rule.num_forced - 2
                ((score, _),) = rule.scores
                self._waiting[name].append(score(piece)[uncounted:])
            self._num_waiting += len(piece)
            if self._num_waiting >= _CHUNK:
                self._count()

    def merge(self, other: "ScoreHistogram", times: int = 1) -> None:
        """Adds the counts of another histogram, multiplied by `times`."""
        self.num_documents += times * other.num_documents
        self.num_positions += times * other.num_positions
        for rule in CALIBRATED:
            self._counts[rule] += times * other._counted(rule)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the histogram as arrays for `np.savez_compressed`, without its empty ends."""
        arrays = {
            "steps_per_nat": np.int64(STEPS_PER_NAT),
            "num_documents": np.int64(self.num_documents),
            "num_positions": np.int64(self.num_positions),
        }
        for rule in CALIBRATED:
            counts = self._counted(rule)
            used = np.flatnonzero(counts)
            first, stop = (used[0], used[-1] + 1) if used.size else (_OFFSET, _OFFSET)
            arrays[f"{rule}_first"] = np.int64(first - _OFFSET)
            arrays[f"{rule}_counts"] = counts[first:stop].copy()
        return arrays

    @classmethod
    def from_arrays(cls, arrays) -> "ScoreHistogram":
        """Returns the histogram of the mapping that `arrays` returned, or that `np.load` opened.

        Raises ValueError for arrays of another grid or that do not fit each other, and KeyError
        where one is missing.
        """
        histogram = cls()
        histogram.num_documents = int(arrays["num_documents"])
        histogram.num_positions = int(arrays["num_positions"])
        steps = int(arrays["steps_per_nat"])
        for rule in CALIBRATED:
            counts, first = arrays[f"{rule}_counts"], int(arrays[f"{rule}_first"]) + _OFFSET
            fits = first >= 0 and first + len(counts) <= _BINS
            if steps != STEPS_PER_NAT or not fits or counts.sum() > histogram.num_positions:
                raise ValueError(
                    f"histogram of {len(counts)} bins from {first - _OFFSET} on, {steps} a nat, "
                    f"over {histogram.num_positions} positions is damaged or of another version: "
                    "make it again from the entropies"
                )
            histogram._counts[rule][first : first + len(counts)] = counts
        return histogram

    def threshold(
        self, target_patch_bytes: float, rule: str = "entropy", tolerance: float = 0.1
    ) -> float:
        """Returns the threshold in nats whose mean patch size is nearest to the target.

        It is a multiple of 1 / 4096, and `mean_patch_bytes` there is exact. Among equally near ones
        it is the middle one: midway between neighbouring float16 numbers, entropies that were
        stored in float16 and those fresh from the model fall on the same side. See model.md#rules.

        Raises ValueError for another rule, without documents, for a target that no threshold
        attains, and if equal entropies (a constant entropy model, say) keep the nearest mean
        farther from the target than the fraction `tolerance`.
        """
        means, counts = self._means(rule), self._counted(rule)
        if not means[0] <= target_patch_bytes <= means[-1]:
            raise ValueError(
                f"target_patch_bytes is {target_patch_bytes}; on these documents a threshold "
                f"attains 1 to {means[-1]:.4g} bytes"
            )
        used = np.flatnonzero(counts)
        # Below the lowest score all are above.
        first, last = (used[0] - 1, used[-1]) if used.size else (_OFFSET, _OFFSET)
        distances = np.abs(means[first : last + 1] - target_patch_bytes)
        low = first + int(np.argmin(distances))
        high = min(int(np.searchsorted(means, means[low], side="right")) - 1, last)
        if distances[low - first] > tolerance * target_patch_bytes:
            raise ValueError(
                f"target_patch_bytes is {target_patch_bytes}, but so many entropies are equal that "
                f"the nearest mean is {means[low]:.4g}: use more documents or a better entropy "
                f"model, or raise tolerance above {tolerance}"
            )
        return ((low + high + 1) // 2 - _OFFSET) / STEPS_PER_NAT

    def mean_patch_bytes(self, threshold: float, rule: str = "entropy") -> float:
        """Returns positions / patches at the multiple of 1 / 4096 nearest to a threshold in nats.

        Raises ValueError for another rule and without documents.
        """
        means = self._means(rule)
        k = round(threshold * STEPS_PER_NAT) if math.isfinite(threshold) else threshold
        return float(means[int(np.clip(k + _OFFSET, 0, _BINS - 1))])

    def _means(self, rule: str) -> np.ndarray:
        """Positions / patches float64 [bins] at each threshold of the grid."""
        if rule not in CALIBRATED:
            raise ValueError(f"rule is {rule!r}; a threshold is calibrated for {list(CALIBRATED)}")
        if not self.num_documents:
            raise ValueError("there are no entropies to calibrate on: give at least one document")
        # Patches are all positions but those whose score is not above: forced starts have no score.
        return self.num_positions / (self.num_positions - np.cumsum(self._counted(rule)))

    def _counted(self, rule: str) -> np.ndarray:
        self._count()
        return self._counts[rule]

    def _count(self) -> None:
        for rule, waiting in self._waiting.items():
            if waiting:
                # Exact: the factor is a power of two.
                bins = np.ceil(np.concatenate(waiting) * np.float32(STEPS_PER_NAT))
                self._counts[rule] += np.bincount(bins.astype(np.int64) + _OFFSET, minlength=_BINS)
                waiting.clear()
        self._num_waiting = 0


def search_threshold(
    target_patch_bytes: float, mean_at: Callable[[float], float], tolerance: float = 0.1
) -> float:
    """Returns a threshold in nats, a multiple of 1 / 4096, with nearly the wanted mean patch.

    For rules without a histogram. mean_at: the mean patch at a threshold, which grows with it;
    the search ends where it is within a thousandth of the target. Raises ValueError for a target
    that no threshold attains to within the fraction `tolerance`.
    """
    found = {}

    def distance(steps: int) -> float:
        found[steps] = mean_at(steps / STEPS_PER_NAT) / target_patch_bytes - 1
        return found[steps]

    low, high = 0, STEPS_PER_NAT
    while distance(high) < 0 and high < _MOST_STEPS:
        low, high = high, 2 * high
    while high - low > 1 and min(map(abs, found.values())) > _NEAR:
        middle = (low + high) // 2
        low, high = (middle, high) if distance(middle) < 0 else (low, middle)
    best = min(found, key=lambda steps: abs(found[steps]))
    if abs(found[best]) > tolerance:
        nearest = target_patch_bytes * (1 + found[best])
        raise ValueError(
            f"target_patch_bytes is {target_patch_bytes}; on these documents the nearest mean of "
            f"a threshold is {nearest:.4g} bytes"
        )
    return best / STEPS_PER_NAT


def length_histogram(lengths: np.ndarray) -> np.ndarray:
    """Returns int64 [257], the number of patches of each length in bytes; entry 0 is unused.

    lengths: integers [P]. The last entry counts lengths of 256 and more. Raises ValueError for a
    length below 1.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and lengths.min() < 1:
        raise ValueError(f"a patch length is {lengths.min()}; leave unused patch columns out")
    return np.bincount(np.minimum(lengths, _LAST_LENGTH), minlength=_LAST_LENGTH + 1)


def describe_lengths(histogram: np.ndarray) -> dict[str, int]:
    """Percentiles p50, p90, p99 and the maximum of a `length_histogram`, in bytes.

    256 stands for 256 and more. Raises ValueError for a histogram without patches.
    """
    cumulative = np.cumsum(histogram)
    if not cumulative[-1]:
        raise ValueError("there are no patches to describe: give at least one document")
    return {
        name: int(np.searchsorted(cumulative, share * cumulative[-1]))
        for name, share in dict(p50=0.50, p90=0.90, p99=0.99, max=1.0).items()
    }


def row_patches_for(row_bytes: int, mean_patch_bytes: float) -> int:
    """Returns the patch columns P of rows of L bytes, so that both fill up together.

    One column is for the tail patch of the row. A multiple of 8 (128 from 1024 on), but never more
    than L: of the two next to the exact number the one whose padding costs less compute. Raises
    ValueError for fewer than 3 bytes or a mean below 1.
    """
    _check_row("row_bytes", row_bytes, mean_patch_bytes)
    exact = row_bytes / mean_patch_bytes

    def padding(columns: int) -> float:
        used = min(columns - 1, exact)
        return BYTE_COMPUTE * (1 - used / exact) + PATCH_COMPUTE * (1 - used / columns)

    above = _rounded_up(math.ceil(exact) + 1)
    choices = [above, above - _multiple(above)] if above - _multiple(above) >= 3 else [above]
    return min(min(choices, key=padding), row_bytes)


def row_bytes_for(row_patches: int, mean_patch_bytes: float) -> int:
    """Returns the bytes L of rows of P patch columns; the inverse of `row_patches_for`.

    Rounded up to a multiple of 8 (128 from 1024 on), at least P. Raises ValueError for fewer than
    3 columns or a mean below 1.
    """
    _check_row("row_patches", row_patches, mean_patch_bytes)
    return _rounded_up(max(math.ceil((row_patches - 1) * mean_patch_bytes), row_patches))


def _rounded_up(size: int) -> int:
    return -(-size // _multiple(size)) * _multiple(size)


def _multiple(size: int) -> int:
    return 128 if size >= 1024 else 8


def _check_row(name: str, size: int, mean: float) -> None:
    if size < 3:
        raise ValueError(f"{name}={size} must be at least 3: a split first patch and the tail")
    if not 1 <= mean < math.inf:
        raise ValueError(f"mean_patch_bytes={mean} must be a number of 1 or more")


def _check_entropies(entropies: np.ndarray) -> None:
    if np.ndim(entropies) != 1 or not len(entropies) or entropies.dtype.kind != "f":
        raise ValueError(
            f"entropies of shape {np.shape(entropies)} and type {np.asarray(entropies).dtype} must "
            "be a vector of floats: give those of one document at a time"
        )
    low, high = np.minimum.reduce(entropies), np.maximum.reduce(entropies)
    if not (low > -1 / STEPS_PER_NAT and high <= MAX_NATS):  # not so for NaN either
        raise ValueError(
            f"entropies range from {low} to {high} nats, possible are 0 to {MAX_NATS} (others "
            "are not finite or not nats): check the entropy model's logits"
        )
