"""Attention as a softmax under a dense mask, which every kernel must equal."""

import jax
import numpy as np


def dense_attention(q, k, v, mask, cotangent):
    """Masked softmax attention and its gradients in q, k and v, in float64.

    q [B, S, H, D], k and v [B, T, G, D], mask bool [B, S, T]. A query that sees nothing gives 0.
    """
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale, mask = q.shape[-1] ** -0.5, mask[:, None]
    scores = np.where(mask, np.einsum("bshd,bthd->bhst", q, k) * scale, -1e300)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    grad_weights = np.einsum("bshd,bthd->bhst", cotangent, v)
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdims=True)) * scale

    def heads_of_groups(x):
        return x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3)

    return (
        np.einsum("bhst,bthd->bshd", weights, v),
        np.einsum("bhst,bthd->bshd", grad_scores, k),
        heads_of_groups(np.einsum("bhst,bshd->bthd", grad_scores, q)),
        heads_of_groups(np.einsum("bhst,bshd->bthd", weights, cotangent)),
    )


def with_gradients(attention):
    """jitted (q, k, v, ids, cotangent) -> output and gradients in q, k and v."""

    @jax.jit
    def run(q, k, v, ids, cotangent):
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, ids), q, k, v)
        return out, *pullback(cotangent)

    return run


def assert_all_close(results, expected):
    """Within 2e-5 of the largest element (or of 1)."""
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(
            result, value.reshape(result.shape), atol=2e-5 * max(1, np.abs(value).max())
        )


def normal(rng, *shape, scale=1.0):
    return (scale * rng.normal(size=shape)).astype(np.float32)


def attention_inputs(rng, batch, length, heads, kv_heads, num_ids=5, width=8):
    """Draws q, k, v, segments, cotangent; num_ids: of documents, those of a row at most."""
    q, cotangent = normal(rng, 2, batch, length, heads, width, scale=3)
    k, v = normal(rng, 2, batch, length, kv_heads, width)
    segments = np.sort(rng.integers(-1, num_ids - 1, (batch, length)), axis=1)
    return q, k, v, segments.astype(np.int32), cotangent


def visible(segments, window):
    """Which positions [B, L, L] see which: model.md#masks, before them, near, in one document."""
    segments = np.asarray(segments)
    t, s = np.arange(segments.shape[1])[:, None], np.arange(segments.shape[1])[None, :]
    near = (s <= t) & (s > t - (window or segments.shape[1]))
    return near & (segments[:, :, None] == segments[:, None, :])
