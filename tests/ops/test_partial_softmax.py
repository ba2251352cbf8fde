"""Softmax in parts against the softmax of everything."""

import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.ops import partial_softmax

QUERIES, SCORES, WIDTH = 3, 12, 4


def mean_in_numpy(scores, visible, values):
    weights = np.exp(scores.astype(np.float64)) * visible
    return weights @ values / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


@pytest.mark.parametrize("merged", [False, True])
def test_parts_give_the_softmax_of_all(merged):
    """Query 0 sees nothing at all, and query 1 nothing in the first part: scores there are high."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 5, (QUERIES, SCORES)).astype(np.float32)
    scores[1, :4] += 200
    values = rng.normal(size=(SCORES, WIDTH)).astype(np.float32)
    visible = rng.random((QUERIES, SCORES)) < 0.7
    visible[0], visible[1, :4] = False, False
    nothing = partial_softmax.empty(jnp.zeros((QUERIES, WIDTH)))
    sums = nothing
    for part in (slice(0, 4), slice(4, 5), slice(5, SCORES)):

        def read(weights, part=part):
            return weights @ values[part]

        start = nothing if merged else sums
        found = partial_softmax.add(start, scores[:, part], read, visible[:, part])
        sums = partial_softmax.merge(sums, found) if merged else found
    found = np.asarray(partial_softmax.mean(sums))
    np.testing.assert_allclose(found, mean_in_numpy(scores, visible, values), rtol=0, atol=2e-6)
    assert not found[0].any() and found[1:].all()
