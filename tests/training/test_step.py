"""Batches in parts, the loss on the softmax's sum, and updates that are left out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bltjax import sharding
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    OptimizerConfig,
    PatchingConfig,
    TrainingConfig,
    TransformerConfig,
)
from bltjax.model import functional
from bltjax.training.loss import loss_sums
from bltjax.training.optimizer import make_optimizer
from bltjax.training.patch_finder import make_patch_finder
from bltjax.training.state import Health, start_state
from bltjax.training.step import HEALTH_UPDATES, batch_sums, is_usual, make_train_step
from bltjax.vocabulary import encode

B, L, P = 16, 16, 17
Z = 2.0
BAD_BYTE = 101  # its embedding is infinite, where a test asks for that

STACK = TransformerConfig(dim=8, num_layers=1, num_heads=2, ffn_multiple_of=8)
ENTROPY = EntropyModelConfig(STACK)
BLT = BLTConfig(
    local_encoder=STACK,
    global_transformer=STACK,
    local_decoder=STACK,
    cross_attention=CrossAttentionConfig(encoder=False, decoder=False),
    hash=HashConfig((2,), 31),
    pooling="max",
)


def keep_gradients() -> optax.GradientTransformation:
    """Passes gradients on and leaves them in its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (grads, grads),
    )


def host_batch():
    """Rows of two sources that have from none to all of their targets trained."""
    tokens = np.random.default_rng(0).choice(encode(b"ab. ")[1:-1], (B, L + 1)).astype(np.int32)
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.arange(L) < np.arange(B)[:, None] * L / (B - 1),
        document_ids=np.zeros((B, L), np.int32),
        source_ids=np.tile(np.arange(L) > 7, (B, 1)).astype(np.int32),
    )


def steady_batch():
    """A single byte over and over: learned within a few updates."""
    same = np.full((B, L), 100, np.int32)
    return host_batch() | dict(tokens=same, targets=same, loss_mask=same > 0)


def bad_batch():
    """One BAD_BYTE in each row."""
    batch = steady_batch()
    return batch | dict(tokens=np.where(np.arange(L) == 3, BAD_BYTE, batch["tokens"]))


def random_state(config, optimizer, scale=0.4):
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jax.device_put(rng.normal(0, scale, x.shape).astype(np.float32), x.sharding),
        sharding.concrete(functional.abstract_params(config)),
    )
    return start_state(params, optimizer)


def state_with_bad_byte(optimizer):
    state = random_state(ENTROPY, optimizer)
    embeddings = state.params["tok_embeddings"]
    embeddings["weight"] = embeddings["weight"].at[BAD_BYTE].set(jnp.inf)
    return state


def close(ours, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), ours, expected
    )


def kept_gradients(config, parts, batch, finder=None):
    """Metrics and gradients of a step on the mesh that is set; of the second of two steps."""
    optimizer = keep_gradients()
    training = TrainingConfig(batch_size=B, accumulation_steps=parts)
    step = make_train_step(config, training, optimizer, finder, num_sources=2)
    batch = sharding.put_batch(batch)
    state, _ = step(random_state(config, optimizer), batch)
    state, metrics = step(random_state(config, optimizer), batch)
    assert step._cache_size() == 1
    return jax.device_get((metrics, state.opt_state))


def test_parts_give_what_the_whole_batch_gives(use_mesh):
    """The mean over all targets, though rows have from none to all of theirs."""
    raw = host_batch()
    finder = make_patch_finder(PatchingConfig("space"), None, P)
    found = jax.jit(finder)(None, raw["tokens"], raw["document_ids"])
    packed = raw | dict(patch_lengths=np.asarray(found.lengths))
    metrics, gradients = expected = kept_gradients(BLT, 1, packed)
    assert metrics["bytes"] == raw["loss_mask"].sum()
    assert 0 < metrics["patch_utilisation"] < 1 and metrics["source_bytes"].all()
    assert all(np.any(g) for g in jax.tree.leaves(gradients))
    results = [kept_gradients(BLT, 4, raw, finder)]
    with use_mesh(2, 2, 2):
        results.append(kept_gradients(BLT, 2, packed))
    for result in results:
        close(result, expected)
        for name in ("bytes", "source_bytes", "overflow", "byte_utilisation"):
            np.testing.assert_array_equal(result[0][name], metrics[name])


MOVES = re.compile(r"all-gather|all-to-all|collective-permute|reduce-scatter")


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 2)], ids=str)
def test_splitting_a_batch_moves_no_row(sizes, use_mesh):
    with use_mesh(*sizes):
        batch = host_batch()
        placed = sharding.put_batch(batch)
        split = jax.jit(sharding.micro_batches, static_argnums=1).lower(placed, 4).compile()
        assert not MOVES.search(split.as_text())
        parts = split(placed)
        for name, whole in batch.items():
            np.testing.assert_array_equal(parts[name], [whole[i::4] for i in range(4)])
            shards = {s.data.shape for s in parts[name].addressable_shards}
            assert shards == {(4, 1, *whole.shape[1:])}


@functools.cache
def expected_step():
    """(params, z_loss) -> (mean nats, mean squared log of the softmax's sum), gradients."""

    def loss(params, batch, z_loss):
        logits = functional.apply(ENTROPY, params, batch["tokens"], batch["document_ids"])
        log_sums = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.sum(logits * jax.nn.one_hot(batch["targets"], logits.shape[-1]), axis=-1)
        mask = batch["loss_mask"] / jnp.sum(batch["loss_mask"])
        nats, z = jnp.sum((log_sums - chosen) * mask), jnp.sum(log_sums**2 * mask)
        return nats + z_loss * z, (nats, z)

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def call(params, z_loss):
        gradients, found = gradient(params, sharding.put_batch(host_batch()), z_loss)
        return jax.device_get((found, gradients))

    return call


def test_chips_that_share_no_weights_exchange_only_sums(use_mesh):
    """Of gradients and of what is counted, whatever the parts."""
    with use_mesh(4, 1, 1):
        optimizer = keep_gradients()
        training = TrainingConfig(batch_size=B, accumulation_steps=2)
        step = make_train_step(ENTROPY, training, optimizer, num_sources=2)
        state, batch = random_state(ENTROPY, optimizer), sharding.put_batch(host_batch())
        step = step.lower(state, batch).compile()
        assert "all-reduce" in step.as_text() and not MOVES.search(step.as_text())
        state, metrics = step(state, batch)
        loss, gradients = jax.device_get((metrics["loss"], state.opt_state))
    (nats, _), expected = expected_step()(random_state(ENTROPY, optimizer).params, 0.0)
    close((loss, gradients), (nats, expected))


def test_z_loss_is_the_squared_log_of_the_softmax_sum():
    rng = np.random.default_rng(3)
    logits, targets = rng.normal(1, 2, (2, 5, 260)), rng.integers(0, 260, (2, 5))
    mask = rng.random((2, 5)) < 0.6
    log_sums = np.log(np.exp(logits).sum(-1))
    sums = loss_sums(logits.astype(np.float32), targets, mask, with_z=True)
    np.testing.assert_allclose(sums.pop("z"), np.sum(log_sums[mask] ** 2), rtol=1e-6)
    assert sums == loss_sums(logits.astype(np.float32), targets, mask)


def test_without_z_loss_nothing_of_it_is_computed():
    params, batch = functional.abstract_params(ENTROPY), host_batch()
    sums = functools.partial(batch_sums, ENTROPY)
    assert "z" not in jax.eval_shape(sums, params, batch)
    assert "z" in jax.eval_shape(functools.partial(sums, z_loss=Z), params, batch)


@functools.cache
def z_step():
    optimizer = optax.chain(keep_gradients(), optax.sgd(0.1))
    config = TrainingConfig(batch_size=B, z_loss=Z)
    return optimizer, make_train_step(ENTROPY, config, optimizer, num_sources=2)


def test_z_loss_moves_the_logits_and_is_not_reported():
    optimizer, step = z_step()
    batch, expected = sharding.put_batch(host_batch()), expected_step()
    state = random_state(ENTROPY, optimizer)
    (nats, z), gradients = expected(state.params, Z)
    for number in range(20):
        state, metrics = step(state, batch)
        if number == 0:
            close(jax.device_get((metrics["loss"], state.opt_state[0])), (nats, gradients))
            assert not any(name.startswith("z") for name in metrics)
    assert expected(state.params, Z)[0][1] < z - 0.5  # without it, it grows


def test_without_a_guard_what_is_not_finite_reaches_the_metrics():
    optimizer, step = z_step()
    state, metrics = step(state_with_bad_byte(optimizer), sharding.put_batch(bad_batch()))
    assert not np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert not np.isfinite(state.params["norm"]["weight"]).any()
    assert "skipped" not in metrics and state.health.updates == 1


@functools.cache
def guarded():
    settings = OptimizerConfig(learning_rate=0.05, schedule="constant", weight_decay=0.0)
    config = TrainingConfig(batch_size=B, skip_loss_above=2.0, optimizer=settings)
    optimizer = make_optimizer(settings, config.steps)
    return optimizer, make_train_step(ENTROPY, config, optimizer, num_sources=2)


def run(state, *host_batches):
    """The state after guarded steps, on the devices and on the host, and the metrics of each."""
    step, all_metrics = guarded()[1], []
    for batch in host_batches:
        state, metrics = step(state, sharding.put_batch(batch))
        all_metrics.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    return state, jax.device_get(state), all_metrics


def check_left_out(before, after):
    """Nothing that learns was touched, and a step and an update left out were counted."""
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert after.step == before.step + 1
    left_out = {f: getattr(before.health, f) + 1 for f in ("skipped", "skipped_in_a_row")}
    assert after.health == before.health._replace(**left_out)


def test_updates_that_are_not_finite_are_left_out():
    state = state_with_bad_byte(guarded()[0])
    start = jax.device_get(state)
    state, first, [metrics] = run(state, bad_batch())
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["grad_norm"])
    check_left_out(start, first)
    state, second, [metrics] = run(state, bad_batch())
    check_left_out(first, second)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 2
    state, third, [metrics] = run(state, steady_batch())
    assert third.step == 3 and third.health.updates == 1
    assert metrics["skipped"] == 2 and metrics["skipped_in_a_row"] == 0
    assert third.health.loss == metrics["loss"] and third.health.grad_norm == metrics["grad_norm"]
    moved = jax.tree.map(lambda a, b: np.any(a != b), third.params, second.params)
    assert all(jax.tree.leaves(moved))


def test_a_gradient_that_overflows_is_left_out_though_its_loss_is_finite():
    state = random_state(ENTROPY, guarded()[0], scale=1e9)
    before = jax.device_get(state)
    _, after, [metrics] = run(state, host_batch())
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    check_left_out(before, after)


def test_a_leap_of_the_loss_is_left_out_once_there_is_a_mean():
    made = [steady_batch()] * (HEALTH_UPDATES - 2)
    state, before, metrics = run(random_state(ENTROPY, guarded()[0]), *made, host_batch())
    assert metrics[-1]["loss"] > 2 * np.mean([m["loss"] for m in metrics[:-1]])
    assert before.health.updates == HEALTH_UPDATES - 1 and before.health.skipped == 0
    state, before, _ = run(state, *made)
    state, after, [metrics] = run(state, host_batch())
    assert metrics["loss"] > 2 * before.health.loss
    check_left_out(before, after)


def test_the_means_are_of_all_updates_at_first_and_then_forget():
    batches = [steady_batch(), host_batch()] * (HEALTH_UPDATES + 5)
    state, early, metrics = run(random_state(ENTROPY, guarded()[0]), *batches[:-10])
    _, late, more = run(state, *batches[-10:])
    assert early.health.updates == 2 * HEALTH_UPDATES
    for name in ("loss", "grad_norm"):
        mean = np.mean([m[name] for m in metrics])
        np.testing.assert_allclose(getattr(early.health, name), mean, rtol=1e-5)
        for m in more:
            mean += (m[name] - mean) / (2 * HEALTH_UPDATES)
        np.testing.assert_allclose(getattr(late.health, name), mean, rtol=1e-5)


@pytest.mark.parametrize("limit", ["skip_loss_above", "skip_norm_above"])
def test_either_limit_is_a_guard(limit):
    config, optimizer = TrainingConfig(**{limit: 2.0}), keep_gradients()
    arguments = random_state(ENTROPY, optimizer), sharding.put_batch(host_batch())
    step = make_train_step(ENTROPY, config, optimizer, num_sources=2)
    assert "skipped" in jax.eval_shape(step, *arguments)[1]


def health(updates, loss=2.0, grad_norm=1.0):
    return Health(*map(jnp.float32, (loss, grad_norm)), *map(jnp.int32, (updates, 0, 0)))


@pytest.mark.parametrize(
    "limits, updates, loss, grad_norm, expected",
    [
        ((3, 0), HEALTH_UPDATES, 6.0, 1e9, True),
        ((3, 0), HEALTH_UPDATES, 6.1, 1.0, False),
        ((3, 0), HEALTH_UPDATES - 1, 6.1, 1.0, True),
        ((0, 3), HEALTH_UPDATES, 1e9, 3.0, True),
        ((0, 3), HEALTH_UPDATES, 2.0, 3.1, False),
        ((0, 3), HEALTH_UPDATES - 1, 2.0, 3.1, True),
        ((0, 3), 0, np.nan, 1.0, False),
        ((3, 0), 0, 2.0, np.inf, False),
    ],
)
def test_what_is_usual(limits, updates, loss, grad_norm, expected):
    config = TrainingConfig(skip_loss_above=limits[0], skip_norm_above=limits[1])
    assert is_usual(config, health(updates), loss, grad_norm) == expected
