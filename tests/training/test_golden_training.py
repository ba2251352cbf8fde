"""The published training run: gradients, losses, norms, learning rates, final weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bltjax import sharding
from bltjax.config import OptimizerConfig, TrainingConfig
from bltjax.model import functional
from bltjax.patching.boundaries import document_segments
from bltjax.patching.buffers import buffers_from_lengths
from bltjax.training.loss import LN2
from bltjax.training.optimizer import make_optimizer, schedule_multiplier
from bltjax.training.state import start_state
from bltjax.training.step import make_train_step
from tests import golden

RUN = "meta_train_A"


def keep_gradients() -> optax.GradientTransformation:
    """Passes gradients on and leaves them in its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (grads, grads),
    )


@functools.cache
def run():
    """Golden arrays, and our state after each of the steps with the metrics of each."""
    settings = json.loads((golden.GOLDEN / f"{RUN}.config.json").read_text())
    published = settings["optim"]
    optimizer = OptimizerConfig(
        learning_rate=published["lr"],
        schedule=published["scheduler"],
        warmup_steps=published["warmup"],
        min_ratio=published["lr_min_ratio"],
        cycle_length=published["cycle_length"],
        cosine_theta=published["cosine_theta"],
        decay_fraction=published["decay_fraction"],
        exp_factor=published["exp_factor"],
        beta1=published["beta1"],
        beta2=published["beta2"],
        epsilon=published["epsilon"],
        weight_decay=published["weight_decay"],
        clip_norm=published["clip"],
    )
    steps = settings["n_steps"]
    transformation = optax.chain(keep_gradients(), make_optimizer(optimizer, steps))

    name, expected = settings["init"].removesuffix(".safetensors"), golden.arrays(RUN)
    config = golden.blt_config(name)
    tokens = jnp.asarray(expected["x"])
    batch = sharding.put_batch(
        dict(
            tokens=tokens,
            targets=expected["y"],
            loss_mask=expected["mask"],
            patch_lengths=expected["patch_lengths"],
            document_ids=document_segments(tokens),
        )
    )
    params = jax.tree.map(jnp.asarray, golden.params(name))
    state = start_state(params, transformation)
    train_step = make_train_step(
        config, TrainingConfig(steps=steps, optimizer=optimizer), transformation
    )
    all_metrics, first_gradients = [], None
    for _ in expected["losses"]:
        state, metrics = train_step(state, batch)
        all_metrics.append(jax.device_get(metrics))
        if first_gradients is None:
            first_gradients = jax.device_get(state.opt_state[0])
    metrics = {key: np.array([m[key] for m in all_metrics]) for key in all_metrics[0]}
    return expected, metrics, first_gradients, state


def named(expected, prefix):
    """The golden arrays `prefix/<published name>`, nested as our parameters are."""
    return golden.nest(
        {
            key.removeprefix(prefix + "/"): value
            for key, value in expected.items()
            if key.startswith(prefix + "/")
        }
    )


def test_first_logits():
    expected, name = golden.arrays(RUN), golden.MODELS[0]
    patches = buffers_from_lengths(jnp.asarray(expected["patch_lengths"]), expected["x"].shape[1])
    logits = jax.jit(functools.partial(functional.apply, golden.blt_config(name)))(
        golden.params(name), expected["x"], patches
    )
    np.testing.assert_allclose(logits, expected["logits0"], rtol=0, atol=1e-5)


@pytest.mark.long
def test_every_first_gradient():
    expected, _, gradients, _ = run()
    published = named(expected, "grad0")
    assert jax.tree.structure(gradients) == jax.tree.structure(published)

    def close(path, ours, theirs):
        np.testing.assert_allclose(
            ours,
            theirs,
            rtol=1e-4,
            atol=1e-5 * np.abs(theirs).max(),
            err_msg=jax.tree_util.keystr(path),
        )
        assert np.abs(theirs).max() > 0

    jax.tree_util.tree_map_with_path(close, gradients, published)


@pytest.mark.parametrize(
    "ours, theirs",
    [("loss", "losses"), ("learning_rate", "lrs"), ("grad_norm", "grad_norms_preclip")],
)
def test_every_step(ours, theirs):
    expected, metrics, _, _ = run()
    np.testing.assert_allclose(metrics[ours], expected[theirs], rtol=1e-4, atol=1e-9)


def test_bits_per_byte():
    """Published: BOS and EOS targets count as bytes, so it is the loss in bits. Ours: raw bytes."""
    expected, metrics, _, _ = run()
    np.testing.assert_allclose(metrics["loss"] / LN2, expected["bpb"], rtol=1e-4)
    logits, targets = expected["logits0"].astype(np.float64), expected["y"]
    raw = expected["mask"] & (targets >= 4)
    assert raw.sum() < expected["mask"].sum()
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bits = -np.log2(np.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(metrics["bits_per_byte"][0], bits[raw].mean(), rtol=1e-5)
    assert (metrics["bytes"] == raw.sum()).all()


def test_final_weights():
    expected, _, _, state = run()
    ours = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    published = named(expected, "final_sum")
    stacked = jax.tree.map(lambda sums: sums.ndim == 2, published)

    def close(path, weight, sums, layers):
        axes = tuple(range(1 if layers else 0, weight.ndim))
        squares = (weight**2).sum(axes)
        np.testing.assert_allclose(
            squares, sums[..., 1], rtol=1e-4, err_msg=jax.tree_util.keystr(path)
        )
        # A sum of n weights that cancel is only as good as n errors of the weights' size.
        size = np.sqrt(squares * weight.size)
        assert (np.abs(weight.sum(axes) - sums[..., 0]) <= 1e-4 * size).all(), path

    jax.tree_util.tree_map_with_path(close, ours, published, stacked)
    assert int(state.step) == len(expected["losses"])


@pytest.mark.parametrize(
    "step, multiplier",
    [(0, 0.0), (1000, 0.5), (2000, 1.0), (60_000, 0.86187913), (121_000, 0.505), (239_999, 0.01)],
)
def test_published_schedule(step, multiplier):
    """model.md#optimizer, the released settings."""
    config = OptimizerConfig(warmup_steps=2000, min_ratio=0.01)
    np.testing.assert_allclose(schedule_multiplier(config, step, 240_000), multiplier, rtol=1e-5)


def oracle(c, s, n):
    """model.md#optimizer in plain Python, with the wsd schedule decaying over its own length."""
    if c.schedule == "constant":
        return 1.0
    if s < c.warmup_steps:
        return s / c.warmup_steps
    m, u = c.min_ratio, (s - c.warmup_steps) / (n - c.warmup_steps)
    if c.schedule == "cosine":
        sign = -1 if int(s / (n * c.cycle_length)) % 2 else 1
        return m + 0.5 * (1 - m) * (sign * np.cos(np.pi * u**c.cosine_theta / c.cycle_length) + 1)
    if c.schedule == "linear":
        return u * m + 1 - u
    if c.schedule == "inv_sqrt":
        return max((c.warmup_steps / s) ** c.exp_factor, m)
    decay = int(n * c.decay_fraction)
    v = max(0, s - (n - decay)) / decay
    return 1 / (v / m + 1 - v)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(schedule="cosine", warmup_steps=10),
        OptimizerConfig(schedule="cosine", warmup_steps=7, cycle_length=0.5, cosine_theta=2.0),
        OptimizerConfig(schedule="linear", warmup_steps=10, min_ratio=0.1),
        OptimizerConfig(schedule="inv_sqrt", warmup_steps=10, exp_factor=0.3, min_ratio=0.4),
        OptimizerConfig(schedule="wsd", warmup_steps=10, min_ratio=0.1, decay_fraction=0.2),
        OptimizerConfig(schedule="constant", warmup_steps=10),
    ],
    ids=lambda config: config.schedule,
)
def test_schedules(config):
    num_steps = 100
    steps = jnp.arange(num_steps)
    ours = np.asarray(jax.jit(lambda s: schedule_multiplier(config, s, num_steps))(steps))
    expected = [oracle(config, s, num_steps) for s in range(num_steps)]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert (ours >= 0).all() and ours.max() <= 1 + 1e-6
    if config.schedule != "constant":
        assert ours[0] == 0  # the first step changes nothing, as published
        assert ours[config.warmup_steps] == pytest.approx(1)
        if config.cycle_length == 1:
            assert (np.diff(ours[config.warmup_steps :]) <= 1e-6).all()


def test_schedule_stays_down_after_the_last_step():
    """At s = n the published cosine jumps back to 1 (model.md#optimizer)."""
    config = OptimizerConfig(warmup_steps=10)
    last = schedule_multiplier(config, 99, 100)
    assert schedule_multiplier(config, 100, 100) == schedule_multiplier(config, 500, 100) == last


@pytest.mark.parametrize("schedule", ["cosine", "linear", "inv_sqrt", "wsd"])
def test_no_warmup(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_steps=0)
    values = np.asarray(schedule_multiplier(config, jnp.arange(20), 20))
    assert np.isfinite(values).all() and (values >= 0).all()
