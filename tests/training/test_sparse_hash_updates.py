"""Updates of the rows of hash tables that a batch reads, against dense ones and against NumPy."""

import dataclasses
import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from bltjax import sharding
from bltjax.checkpoints.training_state import Checkpoints
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    HashConfig,
    OptimizerConfig,
    PatchingConfig,
    RunConfig,
    TokenModelConfig,
    TrainingConfig,
    TransformerConfig,
)
from bltjax.data.batches.lanes import Layout
from bltjax.data.batches.order import Shuffled
from bltjax.data.sources.units import Document
from bltjax.ops.hashing import ngram_hash_ids
from bltjax.sharding import check_hash_updates
from bltjax.training import sparse_hash_updates
from bltjax.training.loop import InStep, TrainingData, train
from bltjax.training.optimizer import HASH_TABLES, learning_rate, make_optimizer
from bltjax.training.patch_finder import make_patch_finder
from bltjax.training.state import abstract_state, create_state, start_state
from bltjax.training.step import make_train_step
from bltjax.vocabulary import BYTE_OFFSET

pytestmark = pytest.mark.long  # one interpreter will do

B, L, P, ROWS, DIM = 4, 16, 6, 997, 8
STACK = TransformerConfig(dim=DIM, num_layers=1, num_heads=2, window=8, ffn_multiple_of=8)
MODEL = BLTConfig(
    local_encoder=STACK,
    global_transformer=dataclasses.replace(STACK, dim=16, window=None),
    local_decoder=STACK,
    cross_attention=CrossAttentionConfig(encoder=False, decoder=False),
    hash=HashConfig((2, 3), ROWS),
    pooling="max",
)
TOKENS = TokenModelConfig(STACK, hash=HashConfig((2, 3), ROWS))
FEW = dataclasses.replace(MODEL, hash=HashConfig((2, 3), 5))  # rows: any batch reads all of them
OPTIMIZER = OptimizerConfig(learning_rate=0.02, warmup_steps=3, clip_norm=0.3)
STEPS = 40


def training(updates, **settings) -> TrainingConfig:
    of_optimizer = {k: settings.pop(k) for k in list(settings) if hasattr(OPTIMIZER, k)}
    optimizer = dataclasses.replace(OPTIMIZER, hash_updates=updates, **of_optimizer)
    return TrainingConfig(steps=STEPS, batch_size=B, optimizer=optimizer, **settings)


# One step compiled for most tests; 1e3 holds nothing off but what is not finite.
GUARDED = training("touched", skip_loss_above=1e3)


def host_batch(number: int, letters=26) -> dict:
    rng = np.random.default_rng(number)
    tokens = rng.integers(97, 97 + letters, (B, L + 1)).astype(np.int32) + BYTE_OFFSET
    lengths = np.full((B, P), 3, np.int32)
    lengths[:, 0] = 1 + L - 3 * (P - 1)
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=rng.random((B, L)) < 0.8,
        document_ids=np.zeros((B, L), np.int32),
        patch_lengths=lengths,
    )


@functools.cache
def compiled(model, config):
    optimizer = make_optimizer(config.optimizer, config.steps)
    return optimizer, make_train_step(model, config, optimizer)


def fresh(model, config):
    return create_state(model, compiled(model, config)[0], seed=0)


def run(model, config, batches, state=None):
    """The state after steps, on the host, and the metrics of each."""
    step, metrics = compiled(model, config)[1], []
    state = fresh(model, config) if state is None else state
    for batch in batches:
        state, found = step(state, sharding.put_batch(batch))
        metrics.append(jax.device_get(found))
    assert step._cache_size() <= 1
    return state, metrics


def table(state) -> dict:
    """What a state holds of the tables, on the host."""
    held = {}
    sparse_hash_updates._map_tables(lambda kind, x: held.setdefault(kind, np.asarray(x)), state)
    return held


def close(found, expected, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol), found, expected
    )


def read(batch, model=MODEL):
    """bool [T, rows]: which rows the n-grams of a batch name."""
    ids = np.asarray(ngram_hash_ids(batch["tokens"], (2, 3), 1, model.hash.vocab))
    found = np.zeros((2, model.hash.vocab), bool)
    for t in range(2):
        found[t, ids[..., t]] = True
    return found


def test_rows_are_named_once_and_every_ngram_finds_its_own():
    tokens = host_batch(0, letters=4)["tokens"]
    tables = np.arange(2 * ROWS, dtype=np.float32).reshape(2, ROWS, 1)
    ids, places = jax.device_get(sparse_hash_updates.find_rows(MODEL, jnp.asarray(tokens), tables))
    named = ids[ids < 2 * ROWS]
    assert ids.shape == (B * L * 2,) and len(set(ids)) == len(ids)
    hashed = np.asarray(ngram_hash_ids(tokens, (2, 3), 1, ROWS)) + np.array([0, ROWS])
    np.testing.assert_array_equal(ids[places], hashed)
    assert set(named) == set(hashed.ravel()) and len(named) < len(ids)


@pytest.mark.slow
def test_where_every_batch_reads_all_rows_it_is_the_dense_update():
    """Also where the batch goes through in parts."""
    batches = [host_batch(n) for n in range(4)]
    assert all(read(batch, FEW).all() for batch in batches)
    dense, expected = run(FEW, training("dense"), batches)
    touched, metrics = run(FEW, training("touched", accumulation_steps=2), batches)
    close(metrics, expected, 1e-5)
    close(touched.params, dense.params)
    close(touched.opt_state[1:], dense.opt_state)
    np.testing.assert_array_equal(table(touched)["counts"], 4)


def test_a_step_updates_the_rows_read_and_no_other():
    batch = host_batch(0, letters=3)
    start, rows = table(fresh(MODEL, GUARDED)), read(batch)
    dense, [expected] = run(MODEL, training("dense"), [batch])
    touched, [metrics] = run(MODEL, GUARDED, [batch])
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    after, dense = table(touched), table(dense)
    for kind, there in start.items():
        np.testing.assert_array_equal(after[kind][~rows], there[~rows])
        if kind != "counts":
            close(after[kind][rows], dense[kind][rows])
            assert kind == "params" or np.all(np.any(after[kind][rows] != 0, axis=-1))
    np.testing.assert_array_equal(after["counts"], rows)


def missed_by_numpy(o: OptimizerConfig, weight, mu, nu, had, number):
    """Dense updates number `had` and later of tables with gradient 0, one by one."""
    for n in range(had, had + number):
        mu, nu = o.beta1 * mu, o.beta2 * nu
        scaled = np.sqrt(nu / (1 - o.beta2 ** (n + 1))) + o.epsilon
        direction = mu / (1 - o.beta1 ** (n + 1)) / scaled
        decay = o.weight_decay * weight if o.decay_hash_tables else 0
        rate = o.hash_rate * float(learning_rate(o, n, STEPS))
        weight = weight - rate * (direction + decay)
    return dict(params=weight, mu=mu, nu=nu)


@pytest.mark.parametrize(
    "settings, had, number, share",
    [
        ({}, 20, 0, 0),
        ({}, 2, 1, 4e-6),
        (dict(schedule="constant", decay_hash_tables=False, hash_rate=0.5), 200, 300, 4e-6),
        (dict(schedule="constant"), 200, 300, 4e-6),
        ({}, 10, 25, 0.01),  # the rate falls from 0.9 to nearly none
        (dict(hash_moments="bfloat16"), 10, 1, 4e-6),
    ],
    ids=str,
)
def test_missed_updates_are_made_up(settings, had, number, share):
    """share: by how much of the way that a row went it may be elsewhere."""
    config = training("touched", **settings)
    rng, optimizer = np.random.default_rng(0), make_optimizer(config.optimizer, STEPS)
    shape = 2, 7, DIM
    held = dict(params=rng.normal(0, 0.3, shape), mu=rng.normal(0, 1e-2, shape))
    held |= dict(nu=rng.uniform(1e-5, 1e-4, shape), counts=np.full(shape[:2], had))
    state = start_state({HASH_TABLES: {"weight": jnp.zeros(shape)}}, optimizer)
    state = sparse_hash_updates._map_tables(lambda kind, x: jnp.asarray(held[kind], x.dtype), state)
    state = state._replace(health=state.health._replace(updates=jnp.int32(had + number)))
    before = {kind: np.float64(x) for kind, x in table(state).items()}
    found = table(sparse_hash_updates.finish_missed_updates(config, state))
    del before["counts"]
    expected = missed_by_numpy(config.optimizer, *before.values(), had, number)
    way = np.abs(expected["params"] - before["params"]).max()
    for kind, value in expected.items():
        off = share * (way if kind == "params" else np.abs(value).max())
        off = max(off, 4e-3 * np.abs(value).max()) if found[kind].dtype == jnp.bfloat16 else off
        np.testing.assert_allclose(np.float64(found[kind]), value, rtol=1e-6, atol=off + 1e-12)
    np.testing.assert_array_equal(found["counts"], had + number)
    assert number == 0 or way > 1e-3


def test_training_ends_about_where_dense_updates_end():
    batches = [host_batch(n) for n in range(STEPS)]
    start = table(fresh(MODEL, GUARDED))["params"]
    dense, expected = run(MODEL, training("dense"), batches)
    touched, metrics = run(MODEL, GUARDED, batches)
    losses, dense_losses = ([m["loss"] for m in found] for found in (metrics, expected))
    np.testing.assert_allclose(losses, dense_losses, rtol=0, atol=1e-3)
    dense, behind = table(dense)["params"], table(touched)
    assert behind["counts"].min() == 0 and np.median(behind["counts"]) < STEPS - 3
    found = table(sparse_hash_updates.finish_missed_updates(GUARDED, touched))["params"]
    way = np.abs(dense - start).mean()
    assert np.abs(found - dense).mean() < 0.02 * way < np.abs(behind["params"] - dense).mean()


def test_an_update_left_out_changes_no_bit():
    batches = [host_batch(n) for n in range(2)]
    state, _ = run(MODEL, GUARDED, batches)
    bytes_ = state.params["local_encoder"]["tok_embeddings"]
    bytes_["weight"] = bytes_["weight"].at[BYTE_OFFSET + 100].set(jnp.inf)
    before = jax.device_get(state)
    assert (read(batches[0]) & ~read(batches[1])).any()  # rows to catch up
    state, [metrics] = run(MODEL, GUARDED, [batches[0]], state)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), before.opt_state)


def test_no_program_computes_anything_of_a_tables_size():
    """Whole tables are only written into, in place; barriers leave them where they are."""
    model = dataclasses.replace(MODEL, hash=HashConfig((2, 3), 50_021))
    optimizer, step = compiled(model, GUARDED)
    state = sharding.concrete(abstract_state(model, optimizer))
    traced = step.trace(state, sharding.put_batch(host_batch(0)))
    tables = state.params[HASH_TABLES]["weight"]
    large = {name for name, size in sizes_of(traced.jaxpr.jaxpr) if size >= tables.size}
    assert large == {"reshape", "scatter", "optimization_barrier"}
    memory = traced.lower().compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= held > 3 * 4 * tables.size
    assert memory.temp_size_in_bytes < 4 * tables.size


def sizes_of(jaxpr):
    """(primitive, number of entries) of everything that a program computes."""
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        for one in inner:
            yield from sizes_of(one)
        if not inner:
            yield from ((equation.primitive.name, v.aval.size) for v in equation.outvars)


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path):
    """And with whole tables that have had every update."""
    documents = [Document("", np.random.default_rng(n).bytes(40)) for n in range(20)]
    data = TrainingData(Shuffled([documents], 0), Layout(L), ("text",), 0)
    config = training("touched", row_bytes=L, checkpoint_every=3, keep_checkpoints=2)
    config = dataclasses.replace(config, steps=5)
    in_step = InStep(make_patch_finder(PatchingConfig("space"), None, P), None)
    whole = jax.device_get(train("blt", MODEL, config, data, tmp_path, in_step).params)
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    again = train("blt", MODEL, config, data, tmp_path, in_step)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), whole)
    optimizer = make_optimizer(config.optimizer, config.steps)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    saved = checkpoints.restore(abstract_state(MODEL, optimizer))
    checkpoints.close()
    assert saved.step == 5
    np.testing.assert_array_equal(table(saved.state)["counts"], 5)


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(hash_updates="some"), r"o\.hash_updates='some' must be one of"),
        (dict(hash_moments="factored"), r"hash_moments='factored' holds .* choose 'bfloat16'"),
        (dict(beta1=0.98), r"o\.beta1=0\.98 squared must be below o\.beta2=0\.95"),
        (dict(hash_moments="bfloat16", hash_rate=0.0), None),
    ],
    ids=str,
)
def test_settings(settings, problem):
    found = OptimizerConfig(**dict(hash_updates="touched") | settings).problems("o")
    assert len(found) == (problem is not None)
    assert not found or re.search(problem, found[0])


def test_many_devices_are_refused(use_mesh):
    config = dataclasses.replace(RunConfig(), blt_training=training("touched"))
    check_hash_updates(config, jax.sharding.get_mesh())
    with use_mesh(1, 1, 2), pytest.raises(ValueError, match="'touched' is for one device, and"):
        check_hash_updates(config, jax.sharding.get_mesh())
    entropy_alone = dataclasses.replace(config, stages=("entropy_model",))
    with use_mesh(1, 1, 2):
        check_hash_updates(entropy_alone, jax.sharding.get_mesh())


def test_of_a_token_model_too(use_mesh):
    config = dataclasses.replace(
        RunConfig(), stages=("token_model",), token_model=TOKENS, token_training=training("touched")
    )
    with (
        use_mesh(1, 1, 2),
        pytest.raises(ValueError, match=r"token_training\.optimizer\.hash_upda"),
    ):
        check_hash_updates(config, jax.sharding.get_mesh())


def test_a_model_without_tables_trains_as_ever():
    plain = dataclasses.replace(MODEL, hash=HashConfig(()))
    batch, config = sharding.put_batch(host_batch(0)), training("touched")
    optimizer, step = compiled(plain, config)
    state, _ = jax.eval_shape(step, abstract_state(plain, optimizer), batch)
    state = jax.eval_shape(
        functools.partial(sparse_hash_updates.apply_missed_updates, config), state
    )
    shapes = jax.tree.map(jnp.shape, (state.params, state.opt_state[1:]))
    dense = abstract_state(plain, compiled(plain, training("dense"))[0])
    assert shapes == jax.tree.map(jnp.shape, (dense.params, dense.opt_state))
