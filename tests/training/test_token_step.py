"""Steps of the token model: what is counted of tokens, on one device and on several."""

import dataclasses

import jax
import numpy as np
import pytest

from bltjax import sharding
from bltjax.config import (
    HashConfig,
    OptimizerConfig,
    TokenModelConfig,
    TrainingConfig,
    TransformerConfig,
)
from bltjax.model import functional
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import start_state
from bltjax.training.step import make_eval_step, make_train_step
from bltjax.vocabulary import BYTE_OFFSET

B, L, V = 4, 16, 264
STACK = TransformerConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_multiple_of=8)
MODEL = TokenModelConfig(STACK, vocab_size=V)
TABLES = dataclasses.replace(MODEL, hash=HashConfig((2, 3), 4099), hash_dim=8)
LENGTHS = np.array([0] * BYTE_OFFSET + [1] * 256 + [2, 3, 5, 9], np.int32)


def host_batch():
    """Rows of two sources, with special ids, padding and long tokens among the targets."""
    rng = np.random.default_rng(0)
    ids = rng.choice([1, 2, 70, 71, 260, 261, 262, 263], (B, L + 1)).astype(np.int32)
    return dict(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        loss_mask=rng.random((B, L)) < 0.8,
        document_ids=np.zeros((B, L), np.int32),
        source_ids=rng.integers(0, 2, (B, L)).astype(np.int32),
    )


def random_params(model=MODEL):
    """The same on every mesh."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jax.device_put(rng.normal(0, 0.2, x.shape).astype(np.float32), x.sharding),
        sharding.concrete(functional.abstract_params(model)),
    )


def test_bits_per_byte_are_those_of_the_logits():
    batch, params = host_batch(), random_params()
    step = make_eval_step(MODEL, num_sources=2, byte_lengths=LENGTHS)
    sums = jax.device_get(step(params, sharding.put_batch(batch)))
    apply = jax.jit(functional.apply, static_argnums=0)
    logits = np.float64(apply(MODEL, params, batch["tokens"], batch["document_ids"]))
    nats, num_bytes, num_tokens = np.zeros(2), np.zeros(2), 0
    for b in range(B):
        for t in range(L):
            target, source = batch["targets"][b, t], batch["source_ids"][b, t]
            if not batch["loss_mask"][b, t] or target < BYTE_OFFSET:
                continue
            nats[source] += np.log(np.exp(logits[b, t]).sum()) - logits[b, t, target]
            num_bytes[source] += 1 if target < 260 else {260: 2, 261: 3, 262: 5, 263: 9}[target]
            num_tokens += 1
    np.testing.assert_allclose(sums["source_nats"], nats, rtol=1e-5)
    np.testing.assert_array_equal(sums["source_bytes"], num_bytes)
    np.testing.assert_allclose(sums["byte_nats"], nats.sum(), rtol=1e-5)
    assert sums["bytes"] == num_bytes.sum() > 2 * num_tokens and sums["tokens"] == num_tokens
    assert sums["targets"] == batch["loss_mask"].sum() > num_tokens  # EOS and BOS are trained


def metrics_on(use_mesh, sizes, parts, model=MODEL, **settings):
    config = TrainingConfig(
        steps=4,
        batch_size=B,
        accumulation_steps=parts,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, **settings),
    )
    with use_mesh(*sizes):
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = start_state(random_params(model), optimizer)
        step = make_train_step(model, config, optimizer, num_sources=2, byte_lengths=LENGTHS)
        found = []
        for _ in range(config.steps):
            state, metrics = step(state, sharding.put_batch(host_batch()))
            found.append(jax.device_get(metrics))
    return found


def test_meshes_and_parts_change_nothing(use_mesh):
    expected = metrics_on(use_mesh, (1, 1, 1), parts=1)
    found = metrics_on(use_mesh, (1, 2, 2), parts=2)
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.05  # it learns
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected
    )
    first = expected[0]
    assert first["mean_token_bytes"] > 2
    batch = host_batch()
    counted = LENGTHS[batch["targets"]] * batch["loss_mask"]
    assert first["bytes"] == counted.sum() == first["source_bytes"].sum()


@pytest.mark.long
def test_hash_tables_are_trained_alike_on_a_mesh(use_mesh):
    """The tables' rows and features lie on different devices of it."""
    expected = metrics_on(use_mesh, (1, 1, 1), 1, TABLES, hash_rate=2.0)
    found = metrics_on(use_mesh, (2, 2, 2), 1, TABLES, hash_rate=2.0)
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.05
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected
    )
    others = metrics_on(use_mesh, (1, 1, 1), 1, TABLES, hash_rate=0.0)
    assert others[0]["loss"] == expected[0]["loss"] and others[-1]["loss"] > expected[-1]["loss"]


@pytest.mark.long
@pytest.mark.parametrize("parts", [1, 2])
def test_updates_of_the_rows_that_are_read_train_tables_of_tokens_too(parts, use_mesh):
    """Every step has the same batch, so that no row misses an update."""
    dense = metrics_on(use_mesh, (1, 1, 1), parts, TABLES)
    touched = metrics_on(use_mesh, (1, 1, 1), parts, TABLES, hash_updates="touched")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), touched, dense
    )
