"""Muon against NumPy, and which parameters it is for."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bltjax import sharding
from bltjax.config import OptimizerConfig
from bltjax.config.training import MATRICES
from bltjax.model import functional
from bltjax.training.muon import COEFFICIENTS, Momenta, orthogonal, scale_by_muon
from bltjax.training.optimizer import is_matrix_of_layers, make_optimizer
from tests.training.test_optimizer import CONFIG, MODELS, TABLE, by_name, random_params, train

pytestmark = pytest.mark.long  # one interpreter will do

MUON = dataclasses.replace(CONFIG, matrices="muon")


@hypothesis.given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 999))
@hypothesis.settings(max_examples=40, deadline=None)
def test_singular_values_come_near_one(rows, columns, seed):
    """Directions stay as they are, whatever the size of the matrix."""
    rng = np.random.default_rng(seed)
    short = min(rows, columns)
    u, v = (np.linalg.qr(rng.normal(size=(n, short)))[0] for n in (rows, columns))
    x = 10.0 ** rng.uniform(-3, 3) * (u * rng.uniform(0.1, 1, short)) @ v.T
    inside = u.T @ np.asarray(orthogonal(jnp.float32(x))) @ v
    values = np.diag(inside)
    assert values.min() > 0.6 and values.max() < 1.3
    np.testing.assert_allclose(inside, np.diag(values), atol=2e-3)


def test_updates_are_those_of_numpy():
    """Nesterov momentum, orthogonal, with a root mean square of about 0.2; each layer alone."""

    def expected(gradients):
        momentum = np.zeros_like(gradients[0])
        for gradient in gradients:
            momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.95 * momentum + 0.05 * gradient
        a, b, c = COEFFICIENTS
        x = x / np.sqrt((x**2).sum())
        for _ in range(5):
            square = x.T @ x
            x = a * x + x @ (b * square + c * square @ square)
        return 0.2 * np.sqrt(max(x.shape)) * x

    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(3, 2, 24, 8)).astype(np.float32)  # steps, layers, out, in
    optimizer = scale_by_muon()
    state = optimizer.init(jnp.zeros(gradients.shape[1:]))
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(jnp.asarray(gradient), state)
    for layer in range(2):
        np.testing.assert_allclose(updates[layer], expected(gradients[:, layer]), atol=2e-5)
        # Of an orthogonal matrix sqrt(short / (short * long)), times sqrt(long).
        assert 0.15 < np.sqrt(np.mean(np.square(updates[layer]))) < 0.25


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_matrices_of_layers_and_no_others(model):
    for name, x in by_name(functional.abstract_params(model)).items():
        vectors = "norm" in name.split(".")[-2]
        tables = name == TABLE or "tok_embeddings" in name or ".output." in f".{name}"
        assert is_matrix_of_layers(name, x) == (not vectors and not tables), name


def test_other_parameters_learn_as_without_it():
    params = random_params()
    with_muon, _, state = train(make_optimizer(MUON, 10), params)
    plain, _, _ = train(make_optimizer(CONFIG, 10), params)
    matrices = [n for n, x in by_name(params).items() if is_matrix_of_layers(n, x)]
    assert 0 < len(matrices) < len(plain)
    for name in plain:
        assert (np.max(np.abs(with_muon[name] - plain[name])) > 1e-7) == (name in matrices), name
    held = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Momenta))
    (momenta,) = (x.momenta for x in held if isinstance(x, Momenta))
    sizes = sum(x.size for x in jax.tree.leaves(momenta))
    assert sizes == sum(by_name(params)[name].size for name in matrices)


@pytest.mark.parametrize(
    "settings", [dict(hash_moments="bfloat16"), dict(global_rate=0.0)], ids=str
)
def test_runs_without_it_keep_their_state(settings):
    """Checkpoints of such runs, also older ones, hold a state of these rules and no other."""
    config = dataclasses.replace(CONFIG, **settings)
    state = make_optimizer(config, 10).init(random_params())
    (rules,) = [x for x in jax.tree.leaves(state, is_leaf=is_partition) if is_partition(x)]
    assert rules.inner_states.keys() == {"adam", "hash", "frozen"}


def is_partition(state) -> bool:
    return hasattr(state, "inner_states")


def test_chips_that_share_a_matrix_make_the_same_update(use_mesh):
    gradients = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
    found = []
    of_layers = sharding.spec(None, "ffn", "embed")
    for mesh, spec in (((1, 1, 1), PartitionSpec()), ((2, 2, 2), of_layers)):
        with use_mesh(*mesh):
            optimizer = scale_by_muon()
            gradient = jax.device_put(gradients, spec)
            updates, state = jax.jit(optimizer.update)(gradient, optimizer.init(gradient))
            for x in (updates, state.momenta):
                assert x.sharding.is_equivalent_to(gradient.sharding, 3)
            found.append(np.asarray(updates))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_the_setting_is_checked():
    assert MATRICES[0] == OptimizerConfig().matrices == "adam"
    (problem,) = OptimizerConfig(matrices="sgd").problems("o")
    assert problem.startswith("o.matrices='sgd' must be one of")


def test_frozen_matrices_stay():
    frozen = dataclasses.replace(MUON, global_rate=0.0)
    params = random_params()
    _, after, _ = train(make_optimizer(frozen, 10), params, config=frozen)
    for name, x in by_name(params).items():
        moved = np.max(np.abs(after[name] - x)) > 0
        assert moved == (not name.startswith("global")), name
