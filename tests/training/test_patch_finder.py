"""Patches found in the step are those of each document alone, stored and packed."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax import sharding
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    PatchingConfig,
    TrainingConfig,
    TransformerConfig,
)
from bltjax.model import functional
from bltjax.patching.boundaries import RULES, lengths_from_starts, limit_patch_length, patch_starts
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.patching.entropy import next_byte_entropy
from bltjax.patching.packed_rows import row_starts
from bltjax.training.patch_finder import make_patch_finder, patch_counts
from bltjax.training.state import start_state
from bltjax.training.step import make_eval_step, make_train_step
from bltjax.vocabulary import EOS_ID, PAD_ID, encode

pytestmark = pytest.mark.long  # one interpreter will do

B, L = 8, 24
MIDDLE = 0.5  # nats, where the entropies of the property test have their middle
LETTERS = [c.encode() for c in "ab1 .\n\u00e9\u5b57\U0001f600"] + [b"\xc3", b"\xa9"]
CONFIGS = {name: PatchingConfig(name, threshold=0.2, patch_size=3) for name in RULES} | {
    "entropy": PatchingConfig("entropy", threshold=MIDDLE),
    "bf16": PatchingConfig("entropy", threshold=MIDDLE, bf16_compat=True),
    "global_monotonic": PatchingConfig("global_monotonic", threshold=MIDDLE),
    "skip_at_3": PatchingConfig("global_monotonic", threshold=0.2, published_skip_at_3=True),
    "entropy, limited": PatchingConfig("entropy", threshold=0.8, max_patch_length=3),
    "falling, limited": PatchingConfig("falling", threshold=1.5, max_patch_length=4),
    "static, limited": PatchingConfig("static", patch_size=5, max_patch_length=2),
    "skip_at_3, limited": PatchingConfig(
        "global_monotonic", threshold=0.2, published_skip_at_3=True, max_patch_length=4
    ),
}


def stack(dim, **settings):
    return TransformerConfig(dim=dim, num_heads=2, ffn_multiple_of=8, **settings)


ENTROPY = EntropyModelConfig(stack(16, num_layers=2, window=6))
BLT = BLTConfig(
    local_encoder=stack(8, num_layers=1, window=6),
    global_transformer=stack(8, num_layers=1),
    local_decoder=stack(8, num_layers=1, window=6),
    cross_attention=CrossAttentionConfig(encoder=False, decoder=False),
    hash=HashConfig((3,), 97),
    pooling="max",
)


def pack(pieces):
    """tokens, document ids and entropies [L] of a row of (ids, entropies)."""
    tokens, document_ids = np.full(L, PAD_ID, np.int32), np.full(L, len(pieces), np.int32)
    entropies, end = np.full(L, 9.0, np.float32), 0
    for number, (ids, values) in enumerate(pieces):
        here = slice(end, end := end + len(ids))
        tokens[here], document_ids[here], entropies[here] = ids, number, values
    return tokens, document_ids, entropies


def lengths_with_tail(starts_of_pieces):
    """Patch lengths of a packed row whose pieces were patched one by one."""
    lengths = [lengths_from_starts(starts) for starts in starts_of_pieces if len(starts)]
    num_inputs = sum(len(starts) for starts in starts_of_pieces)
    return np.concatenate([*lengths, [L + 1 - num_inputs]]).tolist()


def piece_starts(patching, ids, entropies, begin, end):
    """Starts of ids[begin:end]: those of a document that begins where the row enters it.

    But what a rule does at the start of a document alone, it does not do there.
    """
    if not begin:
        return patch_starts(patching, ids, entropies)[:end]
    if RULES[patching.rule].num_forced == 2:
        return patch_starts(patching, ids[begin:end], entropies[begin:end])[:-1]
    unlimited = dataclasses.replace(patching, max_patch_length=None)
    starts = patch_starts(unlimited, ids, entropies)[begin:end]
    starts[:2] = True
    return limit_patch_length(starts, patching.max_patch_length or L)


@st.composite
def rows(draw):
    """Pieces of a row, (ids, entropies, begin, end): most are whole documents, and long enough."""
    pieces, room = [], L
    while room and (not pieces or draw(st.integers(0, 4))):
        size = draw(st.integers(2, 14))
        letters = st.sampled_from(LETTERS)
        text = b"".join(draw(st.lists(letters, min_size=size - 2, max_size=size - 2)))
        ids = encode(text[: size - 2])
        eighths = draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
        # Beyond what is forced or forbidden at a document's start, which the row cannot know.
        begin = draw(st.sampled_from([b for b in (0, 0, 0, 2, 3) if b < size]))
        end = draw(st.sampled_from([size, size, draw(st.integers(begin + 1, size))]))
        pieces.append((ids, np.array(eighths, np.float32) / 8, begin, min(end, begin + room)))
        room = max(room - (end - begin), 0)
    return pieces


find_row_starts = jax.jit(row_starts, static_argnums=0)


@settings(max_examples=80)
@given(rows())
def test_documents_of_a_row_are_patched_as_if_alone(pieces):
    row = pack([(ids[begin:end], entropies[begin:end]) for ids, entropies, begin, end in pieces])
    tokens, document_ids, entropies = (x[None] for x in row)
    for name, patching in CONFIGS.items():
        starts = np.asarray(find_row_starts(patching, tokens, entropies, document_ids))[0]
        expected = lengths_with_tail([piece_starts(patching, *piece) for piece in pieces])
        assert lengths_from_starts(starts).tolist() == expected, name


def test_rows_of_padding_are_one_patch():
    tokens, document_ids = jnp.full((1, L), PAD_ID), jnp.zeros((1, L), jnp.int32)
    starts = find_row_starts(PatchingConfig("byte"), tokens, None, document_ids)
    assert np.flatnonzero(starts).tolist() == [0]


class Corpus(NamedTuple):
    batch: dict  # of raw rows, on the host
    patch_lengths: np.ndarray  # of whole documents patched alone, with stored entropies
    patching: PatchingConfig


@functools.cache
def random_params(config):
    draw = np.random.default_rng(2).normal
    abstract = functional.abstract_params(config)
    return jax.tree.map(lambda x: draw(0, 0.4, x.shape).astype(np.float32), abstract)


def placed_params(config):
    where = sharding.concrete(functional.abstract_params(config))
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), random_params(config), where)


@functools.cache
def corpus(seed=0):
    """Rows of whole documents, and a threshold that no entropy is near."""
    random, documents = np.random.default_rng(seed), []
    for _ in range(B):
        room, row = L - random.integers(0, 3), []
        while room >= 2:
            row.append(encode(random.bytes(random.integers(0, room - 1))))
            room -= len(row[-1])
        documents.append(row)
    alone = [ids for row in documents for ids in row]
    tokens = np.stack([np.pad(ids, (0, L - len(ids))) for ids in alone])
    logits = jax.jit(functional.apply, static_argnums=0)(ENTROPY, random_params(ENTROPY), tokens)
    values = np.asarray(next_byte_entropy(logits))
    values = [row[: len(ids)] for row, ids in zip(values, alone, strict=True)]
    levels = np.sort(np.concatenate(values))
    middle = levels[len(levels) // 4 : -len(levels) // 4]
    widest = np.argmax(np.diff(middle))
    assert middle[widest + 1] - middle[widest] > 1e-3
    patching = PatchingConfig(threshold=float(middle[widest : widest + 2].mean()))
    values, packed, lengths = iter(values), [], []
    for row in documents:
        pieces = [(ids, next(values)) for ids in row]
        packed.append(pack(pieces)[:2])
        found = lengths_with_tail([patch_starts(patching, *piece)[:-1] for piece in pieces])
        lengths.append(np.pad(found, (0, L + 1 - len(found))))
    tokens, document_ids = map(np.stack, zip(*packed, strict=True))
    batch = dict(
        tokens=tokens,
        targets=np.pad(tokens[:, 1:], ((0, 0), (0, 1))),
        loss_mask=(tokens != PAD_ID) & (tokens != EOS_ID),
        document_ids=document_ids,
    )
    return Corpus(batch, np.stack(lengths).astype(np.int32), patching)


@functools.cache
def jitted_finder(patching, num_patches):
    return jax.jit(make_patch_finder(patching, ENTROPY, num_patches))


def find(finder, batch):
    batch = sharding.put_batch(batch)
    return finder(random_params(ENTROPY), batch["tokens"], batch["document_ids"])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1)], ids=str)
def test_buffers_are_those_of_stored_patches(sizes, use_mesh):
    """On any mesh: no document sees another."""
    batch, lengths, patching = corpus()
    with use_mesh(*sizes):
        found = find(jitted_finder(patching, L + 1), batch)
        assert found.lengths.sharding.is_fully_replicated == (sizes == (1, 1, 1))
    for ours, expected in zip(found, buffers_from_lengths(jnp.asarray(lengths), L), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_a_document_that_lacks_its_end_is_not_seen_by_the_next():
    tokens = np.random.default_rng(5).integers(4, 260, (B, L)).astype(np.int32)
    tokens[:, 6:] = tokens[0, 6:]
    document_ids = np.broadcast_to(np.arange(L, dtype=np.int32) >= 6, (B, L)).astype(np.int32)
    patching = corpus().patching
    found = find(jitted_finder(patching, L + 1), dict(tokens=tokens, document_ids=document_ids))
    starts = np.diff(np.asarray(found.encoder_ids)[:, 6:])
    assert 0 < starts.mean() < 1
    np.testing.assert_array_equal(starts, np.broadcast_to(starts[0], starts.shape))


def test_patches_beyond_the_last_column_are_counted():
    """By a rule that needs no entropies, and so no model."""
    batch = corpus().batch
    num_inputs = np.count_nonzero(batch["tokens"], axis=1)
    finder = make_patch_finder(PatchingConfig("byte"), None, 6)
    found = jax.jit(finder)(None, batch["tokens"], batch["document_ids"])
    np.testing.assert_array_equal(found.overflow, num_inputs + 1 - 6)
    np.testing.assert_array_equal(np.sum(found.lengths, axis=1), L + 1)
    counts = patch_counts(batch["tokens"], found)
    assert counts["inputs"] == counts["patches"] == num_inputs.sum()
    assert counts["overflow"] == np.sum(num_inputs + 1 - 6)


def test_an_entropy_rule_needs_a_model():
    with pytest.raises(ValueError, match="'monotonic' needs an entropy model"):
        make_patch_finder(PatchingConfig("monotonic"), None, 8)


def test_no_gradient_reaches_the_entropy_model():
    """It is zero, and nothing is computed for it."""
    batch, _, patching = corpus()
    finder = make_patch_finder(patching, ENTROPY, L + 1)

    def mean_start(params, scale):
        patches = finder(params, batch["tokens"], batch["document_ids"])
        return jnp.mean(patches.starts * scale)

    (gradient, of_scale) = jax.jit(jax.grad(mean_start, argnums=(0, 1)))(
        random_params(ENTROPY), 1.0
    )
    assert of_scale > 0
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))

    def products(function):
        return str(jax.make_jaxpr(function)(random_params(ENTROPY))).count("dot_general")

    forward = products(lambda params: mean_start(params, 1.0))
    assert forward > 0
    assert (
        products(lambda params: jax.jvp(lambda p: mean_start(p, 1.0), (params,), (params,)))
        == forward
    )


def test_steps_that_find_patches_equal_those_that_are_given_them():
    batch, lengths, patching = corpus()
    raw, packed = map(sharding.put_batch, (batch, dict(batch, patch_lengths=lengths)))
    expected = make_eval_step(BLT)(params := placed_params(BLT), packed)

    optimizer, frozen = optax.sgd(0.1), placed_params(ENTROPY)
    finder = make_patch_finder(patching, ENTROPY, L + 1)
    step = make_train_step(BLT, TrainingConfig(), optimizer, find_patches=finder)
    state = start_state(params, optimizer)
    state, metrics = step(state, raw, frozen)
    num_patches = np.count_nonzero(lengths) - B
    mean_patch = np.count_nonzero(batch["tokens"]) / num_patches
    np.testing.assert_allclose(metrics["mean_patch_bytes"], mean_patch, rtol=1e-6)
    assert metrics["overflow"] == 0
    loss = expected["nats"] / expected["targets"]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    # Other rows compile nothing.
    state, metrics = step(state, sharding.put_batch(corpus(seed=1).batch), frozen)
    assert step._cache_size() == 1 and np.isfinite(metrics["loss"])

    sums = jax.eval_shape(make_eval_step(BLT, find_patches=finder), state.params, raw, frozen)
    assert sums.keys() == expected.keys() | {"patches", "inputs", "overflow"}
