"""What cuDNN's kernels are given, with a dense softmax over those documents in their place.

The kernels need a GPU: that they agree is checked by benchmarks/accelerator_check.py where one is.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo as of_jax

from bltjax import sharding
from bltjax.model.transformer import rematerialised
from bltjax.ops.kernels import cudnn_attention as kernel
from bltjax.ops.kernels.cudnn_attention import cudnn_attention, packed_documents
from tests.ops.reference import (
    assert_all_close,
    attention_inputs,
    dense_attention,
    visible,
    with_gradients,
)


def entries(lengths, offsets, elements, positions):
    """Of each of the positions of all rows: its entry, its place in it; -1 where in none.

    offsets are in elements of an array, of which a position has `elements`.
    """
    starts = offsets.reshape(-1)[: lengths.size, None] // elements
    at = jnp.arange(positions)[None]
    inside = (at >= starts) & (at < starts + lengths.reshape(-1, 1))
    entry = jnp.where(inside.any(0), jnp.argmax(inside, axis=0), -1)
    return entry, at[0] - starts[entry, 0]


def fake_kernels(name, q, k, window, most, results, num_heads_first):
    """`_kernel_call` as the documentation of cuDNN's packed layout has it; NaN elsewhere."""
    batch, length, heads, width = q.shape
    groups, positions = k.shape[2], q.shape[0] * q.shape[1]

    def scores(q, k, documents):
        q_lengths, k_lengths, q_offsets, k_offsets = documents
        own, place = entries(q_lengths, q_offsets, heads * width, positions)
        theirs, before = entries(k_lengths, k_offsets, groups * width, positions)
        apart = place[:, None] - before[None, :]
        seen = (own[:, None] == theirs[None, :]) & (own[:, None] >= 0) & (apart >= 0)
        seen &= apart < (window or positions)
        found = jnp.einsum("nhd,mhd->hnm", q, k) * width**-0.5
        return jnp.where(seen[None], found, -jnp.inf), own, place

    def flat(x):
        x = x.reshape(positions, *x.shape[2:]).astype(jnp.float32)
        return jnp.repeat(x, heads // x.shape[1], axis=1)

    def heads_first(x, like):
        x = x.reshape(positions, like.shape[1], -1, width).sum(2)
        return x.reshape(batch, length, -1, width).swapaxes(1, 2).astype(like.dtype)

    def forward(q, k, v, *documents):
        found, own, place = scores(flat(q), flat(k), documents)
        out = jnp.einsum("hnm,mhd->nhd", jax.nn.softmax(found), flat(v))
        sums = jnp.full((batch * most, heads, length), jnp.nan)
        entry = jnp.where(own < 0, batch * most, own)
        sums = sums.at[entry, :, place].set(jax.nn.logsumexp(found, -1).T, mode="drop")
        return heads_first(out, results[0]), sums, jnp.zeros(0, jnp.uint8)

    def backward(q, k, v, sums, gradient, out, *documents):
        found, own, place = scores(flat(q), flat(k), documents)
        weights = jnp.exp(found - sums[own, :, place].T[..., None])
        gradient, common = flat(gradient), (flat(gradient) * flat(out)).sum(-1).T[..., None]
        d_weights = jnp.einsum("nhd,mhd->hnm", gradient, flat(v))
        d_scores = weights * (d_weights - common) * width**-0.5
        found = (
            jnp.einsum("hnm,mhd->nhd", d_scores, flat(k)),
            jnp.einsum("hnm,nhd->mhd", d_scores, flat(q)),
            jnp.einsum("hnm,nhd->mhd", weights, gradient),
        )
        found = (heads_first(x, like) for x, like in zip(found, results, strict=True))
        return *found, jnp.zeros(0, jnp.uint8)

    return forward if name == kernel._FORWARD else backward


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(kernel, "_kernel_call", fake_kernels)


def attention(window, most):
    return lambda q, k, v, segments: cudnn_attention(
        q, k, v, segments, window, packed_documents(segments, most)
    )


@pytest.mark.usefixtures("on_cpu")
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.one_of(st.none(), st.integers(1, 50)),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_any_shape(batch, length, heads, window, num_documents, seed):
    """Some rows have more documents than 4, of which the tiles take care."""
    given = attention_inputs(np.random.default_rng(seed), batch, length, *heads, num_documents)
    q, k, v, segments, cotangent = given
    found = with_gradients(attention(window, most=4))(*given)
    assert_all_close(found, dense_attention(q, k, v, visible(segments, window), cotangent))


@pytest.mark.usefixtures("on_cpu")
def test_over_a_mesh(use_mesh):
    """Each device has its own documents, and the tiles where they are too many for it."""
    rng = np.random.default_rng(0)
    q, k, v, segments, cotangent = attention_inputs(rng, 8, 30, 4, 2, 1)
    segments[2:] = np.sort(rng.integers(0, 20, (6, 30)), axis=1)
    segments[4:] = np.arange(30) // 10
    with use_mesh(2, 2, 2):
        heads_split = sharding.spec("batch", None, "heads", None)
        placed = [jax.reshard(x, heads_split) for x in (q, k, v, cotangent)]
        placed.insert(3, sharding.shard_rows(segments))
        fits = jax.jit(lambda s: packed_documents(s, 4).fits)(placed[3])
        assert np.asarray(fits).tolist() == [True] * 2 + [False] * 2 + [True] * 4
        found = with_gradients(attention(12, most=4))(*placed)
        assert jax.typeof(found[0]).sharding.spec == heads_split
        assert_all_close(found, dense_attention(q, k, v, visible(segments, 12), cotangent))


BF16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
ROWS = BF16((2, 1024, 4, 64)), BF16((2, 1024, 2, 64)), BF16((2, 1024, 2, 64))
IDS = jax.ShapeDtypeStruct((2, 1024), jnp.int32)


def kernel_calls(attention):
    """The calls of cuDNN in the program of a gradient, lowered for a GPU that is not there."""

    def loss(q, k, v, segments):
        return attention(q, k, v, segments).astype(jnp.float32).sum()

    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*ROWS, IDS)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return [line.strip() for line in text.splitlines() if "@__cudnn$" in line]


def described(call):
    """A call without the names of its operands: its description, and the rest."""
    call = re.sub(r"^%\w+(:\d+)? = ", "", call)
    before, description, after = re.split(r'backend_config = "(.*?)"', call)
    return json.loads(description.replace(r"\22", '"')), re.sub(r"\(%.*?\) ", "", before), after


@pytest.mark.parametrize("window", [None, 512])
def test_the_call_is_that_of_jax(window, monkeypatch):
    """JAX's own function, whose checks ask for a GPU, describes the kernels to XLA alike."""
    monkeypatch.setattr(of_jax, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(of_jax, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(of_jax, "is_cuda_compute_capability_equal", lambda _: False)

    def theirs(q, k, v, segments):
        lengths, offsets = jnp.zeros((2, 16), jnp.int32), jnp.zeros((2, 17), jnp.int32)
        return of_jax.dot_product_attention(
            q,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=offsets,
            kv_offsets=offsets,
            scale=64**-0.5,
            mask_type=of_jax.MaskType.PADDING_CAUSAL,
            sliding_window_length=window,
        )

    ours = kernel_calls(functools.partial(cudnn_attention, window=window))
    assert [call.split("(")[0].split("@")[1] for call in ours] == [
        kernel._FORWARD,
        kernel._BACKWARD,
    ]
    assert list(map(described, ours)) == list(map(described, kernel_calls(theirs)))


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("dots", 1), ("full", 2)])
def test_rematerialisation(remat, forward):
    """`dots` keeps the result and the sums of softmaxes, `full` computes them again."""

    def attend(q, k, v, segments):
        packed = packed_documents(segments)
        layer = rematerialised(lambda q: cudnn_attention(q, k, v, segments, 64, packed) * 2, remat)
        return layer(q)

    names = [re.search(r"@(\S+?)\(", call)[1] for call in kernel_calls(attend)]
    assert names.count(kernel._FORWARD) == forward
    assert names.count(kernel._BACKWARD) == 1


def test_too_many_elements_to_count():
    rows = BF16((2**15, 8192, 4, 2))
    with pytest.raises(ValueError, match="attention='tiles'"):
        jax.eval_shape(
            cudnn_attention, rows, rows, rows, jax.ShapeDtypeStruct((2**15, 8192), jnp.int32)
        )
