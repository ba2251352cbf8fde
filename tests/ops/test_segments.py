"""Documents of rows in the forms that kernels take, against loops over positions."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.ops import segments as ops

ROWS = st.tuples(st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**32 - 1))


def draw(batch, length, seed):
    """Ids that never decrease, from any number on, with few or many documents."""
    rng = np.random.default_rng(seed)
    steps = rng.random((batch, length)) < rng.choice([0, 0.1, 0.5, 1])
    first = rng.integers(-(2**31), 2**31 - 1 - length, (batch, 1))
    return (first + np.cumsum(steps, axis=1)).astype(np.int32)


@given(ROWS, st.one_of(st.none(), st.integers(1, 40)))
@settings(max_examples=100)
def test_first_keys(rows, window):
    segments = draw(*rows)
    found = jax.jit(ops.key_starts, static_argnums=1)(segments, window)
    for row, starts in zip(segments, np.asarray(found), strict=True):
        for t, start in enumerate(starts):
            nearest = 0 if window is None else max(0, t - window + 1)
            assert start == min(s for s in range(nearest, t + 1) if row[s] == row[t])


@given(ROWS, st.integers(1, 6))
@settings(max_examples=100)
def test_documents(rows, most):
    segments = draw(*rows)
    batch, length = segments.shape
    lengths, offsets, fits = jax.jit(ops.documents, static_argnums=1)(segments, most)
    assert lengths.shape == (batch, most) and offsets.shape == (batch, most + 1)
    cuts = [np.flatnonzero(np.diff(row)) + 1 for row in segments]
    sizes = np.concatenate([np.diff([0, *cut, length]) for cut in cuts])
    assert (np.asarray(fits) == (len(sizes) <= batch * most)).all()
    if fits.all():
        rest = batch * most - len(sizes)
        np.testing.assert_array_equal(np.ravel(lengths), [*sizes, *[0] * rest])
        begins = np.cumsum([0, *sizes])  # the last one is the end of all rows
        expected = [*begins, *[batch * length] * (rest + batch - 1)]
        np.testing.assert_array_equal(np.ravel(offsets), expected)
