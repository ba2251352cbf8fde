"""Which parameter learns how fast, what is held of it, and where on the mesh."""

import dataclasses
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
    TransformerConfig,
)
from bltjax.config.training import MOMENTS
from bltjax.model import functional, hash_tables
from bltjax.model.lora import overlaid
from bltjax.training.optimizer import (
    decays,
    learning,
    learning_rate,
    make_optimizer,
    part_of,
)

pytestmark = pytest.mark.long  # one interpreter will do

ROWS, FEATURES = 509, 16  # 509 is a number that no other dimension has
STACK = TransformerConfig(dim=16, num_heads=2, window=6, ffn_multiple_of=16)
BLT = BLTConfig(
    local_encoder=STACK,
    global_transformer=TransformerConfig(dim=24, num_heads=2, ffn_multiple_of=16),
    local_decoder=STACK,
    cross_attention=CrossAttentionConfig(num_heads=2),
    hash=HashConfig((2, 3), ROWS),
)
ENTROPY = EntropyModelConfig(STACK)
MODELS = {
    "blt": BLT,
    "plain": dataclasses.replace(
        BLT,
        hash=HashConfig(()),
        cross_attention=CrossAttentionConfig(encoder=False, decoder=False),
        always_project=True,
    ),
    "entropy": ENTROPY,
}
TABLE = "encoder_hash_tok_embedding.weight"
CONFIG = OptimizerConfig(learning_rate=0.01, warmup_steps=2)


def some_params():
    """Abstract parameters of every part and kind, few enough to compile fast."""
    params = functional.abstract_params(BLT)
    decoder, blocks = params["local_decoder"], params["global_transformer"]["layers"]
    return {
        "encoder_hash_tok_embedding": params["encoder_hash_tok_embedding"],
        "local_encoder": {"tok_embeddings": params["local_encoder"]["tok_embeddings"]},
        "global_transformer": {"layers": {"feed_forward": blocks["feed_forward"]}},
        "local_decoder": {"norm": decoder["norm"], "output": decoder["output"]},
    }


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.device_put(rng.normal(0, 0.25, x.shape).astype(np.float32), x.sharding),
        sharding.concrete(some_params()),
    )


def by_name(tree):
    return {named(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def named(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def train(optimizer, params, steps=3, config=CONFIG):
    """(updates of the last step by name, parameters by name, state) with random gradients.

    config: tells which parameters learn.
    """
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(learning(config, random_params(step + 1)), state, params)
        params = overlaid(params, optax.apply_updates(learning(config, params), updates))
    return by_name(updates), by_name(params), state


@functools.cache
def trained_by_default(config=CONFIG):
    return train(make_optimizer(config, 10), random_params())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_parameter_has_its_part_and_its_decay(model):
    kept = OptimizerConfig(decay_norms=False, decay_embeddings=False, decay_hash_tables=False)
    for name, x in by_name(functional.abstract_params(model)).items():
        first = name.split(".")[0]
        if model is ENTROPY:
            assert part_of(name) == "entropy"
        elif "token_embedding_projection" in name:
            assert part_of(name) == "local"
        else:
            assert part_of(name) == ("hash" if "hash" in name else first.split("_")[0])
        is_vector = x.ndim == 1 + ("layers" in name)  # layers are stacked
        is_table = name == TABLE or name.endswith("tok_embeddings.weight")
        assert decays(kept, name) == (not is_vector and not is_table), name
        assert decays(OptimizerConfig(), name)


def test_a_new_part_of_the_model_is_not_forgotten():
    params = {"memory": {"weight": jnp.ones(3)}}
    optimizer = make_optimizer(OptimizerConfig(), 10)
    with pytest.raises(ValueError, match=r"memory\.weight is of no known part.*add it to PARTS"):
        optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(global_rate=-0.1), r"o\.global_rate=-0\.1 must be at least 0"),
        (dict(local_rate=float("nan")), r"o\.local_rate=nan"),
        (dict(hash_rate=float("inf")), r"o\.hash_rate=inf"),
        (dict(hash_moments="int8"), r"o\.hash_moments='int8' must be one of"),
        (dict(hash_moments="bfloat16", beta2=0.999), r"o\.beta2=0\.999 .* choose at most 0\.98"),
        (dict(hash_moments="factored", beta2=0.999, global_rate=0.0), None),
    ],
    ids=str,
)
def test_settings_by_part(settings, problem):
    found = OptimizerConfig(**settings).problems("o")
    assert len(found) == (problem is not None)
    assert not problem or re.search(problem, found[0])


def test_the_defaults_are_plain_adamw_bit_for_bit():
    plain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            lambda step: learning_rate(CONFIG, step, 10),
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
        ),
    )
    expected = train(plain, random_params())
    assert jax.tree.structure(trained_by_default()) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, trained_by_default(), expected)


def test_each_part_learns_at_its_rate():
    rates = dict(global_rate=0.5, local_rate=2.0, hash_rate=0.25)
    optimizer = make_optimizer(dataclasses.replace(CONFIG, weight_decay=0, **rates), 10)
    plain = make_optimizer(dataclasses.replace(CONFIG, weight_decay=0), 10)
    expected, updates = (train(o, random_params())[0] for o in (plain, optimizer))
    for name, update in updates.items():
        rate = rates[f"{part_of(name)}_rate"]
        np.testing.assert_allclose(update, rate * expected[name], rtol=1e-5)


@pytest.mark.parametrize("part", ["global", "local", "hash"])
def test_a_rate_of_0_freezes_exactly_and_holds_nothing(part):
    before = random_params()
    unclipped = dataclasses.replace(CONFIG, clip_norm=1e9)  # frozen gradients do not count
    config = dataclasses.replace(unclipped, **{f"{part}_rate": 0.0})
    _, after, state = train(make_optimizer(config, 10), before, config=config)
    num_learning = 0
    for name, x in by_name(before).items():
        if part_of(name) == part:
            np.testing.assert_array_equal(after[name], x)
        else:
            num_learning += x.size
            expected = trained_by_default(unclipped)[1][name]
            np.testing.assert_allclose(after[name], expected, atol=1e-6)
    held = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert held == 2 * num_learning


@pytest.mark.parametrize("group", ["norms", "embeddings", "hash_tables"])
def test_a_group_without_decay(group):
    """Without gradients only decay moves a parameter."""
    params = random_params()
    config = dataclasses.replace(CONFIG, schedule="constant", **{f"decay_{group}": False})
    optimizer = make_optimizer(config, 10)
    none = jax.tree.map(jnp.zeros_like, params)
    updates = by_name(jax.jit(optimizer.update)(none, optimizer.init(params), params)[0])
    sample = dict(
        norms="local_decoder.norm.weight",
        embeddings="local_encoder.tok_embeddings.weight",
        hash_tables=TABLE,
    )
    for kind, name in sample.items():
        expected = 0 if kind == group else -0.01 * 0.1 * by_name(params)[name]
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1)], ids=str)
@pytest.mark.parametrize("moments", MOMENTS)
def test_the_state_keeps_its_type_on_every_mesh(moments, sizes, use_mesh):
    """So a donated state comes back into the compiled step, which gathered no hash table."""
    with use_mesh(*sizes):
        optimizer = make_optimizer(OptimizerConfig(hash_moments=moments), 10)
        abstract = some_params()
        planned = jax.eval_shape(optimizer.init, abstract)
        moment_specs = {
            (x.shape, x.sharding.spec) for x in jax.tree.leaves(planned) if x.size > ROWS * FEATURES
        }
        assert moment_specs <= {(x.shape, x.sharding.spec) for x in jax.tree.leaves(abstract)}
        _, updated = jax.eval_shape(optimizer.update, abstract, planned, abstract)
        # Scalars come out of eval_shape of init without a sharding, which `concrete` adds.
        planned, updated = sharding.concrete((planned, updated))
        assert jax.tree.map(jax.typeof, updated) == jax.tree.map(jax.typeof, planned)

        params = random_params()
        state = jax.jit(optimizer.init)(params)
        step = jax.jit(optimizer.update, donate_argnums=1)
        text = step.lower(params, state, params).compile().as_text()
        assert not re.findall(rf"= .*\b{ROWS}\b.* all-gather", text)
        for _ in range(2):
            updates, state = step(params, state, params)
        assert step._cache_size() == 1
        placed = by_name(updates)[TABLE].sharding
        assert placed.is_equivalent_to(by_name(params)[TABLE].sharding, 3)


@pytest.mark.parametrize(
    "moments, expected", [*zip(MOMENTS, [8, 4, 4 / FEATURES + 4 / ROWS], strict=True)]
)
def test_bytes_held_of_a_hash_parameter(moments, expected):
    optimizer = make_optimizer(OptimizerConfig(hash_moments=moments), 10)
    abstract = functional.abstract_params(BLT)

    def held(params):
        state = jax.eval_shape(optimizer.init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    others = dict(abstract)
    tables = {"encoder_hash_tok_embedding": others.pop("encoder_hash_tok_embedding")}
    count = 2 * ROWS * FEATURES
    # Beyond the moments there are counters and a placeholder.
    assert held(tables) == pytest.approx(expected * count, abs=20)
    assert held(others) == pytest.approx(8 * sum(x.size for x in jax.tree.leaves(others)), abs=20)


def table_optimizer(moments, **settings):
    """A rate of 1, nothing clipped, no decay."""
    plain = dict(learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=1e9)
    return make_optimizer(OptimizerConfig(hash_moments=moments, **plain, **settings), 10)


def test_bfloat16_moments_are_rounded_between_steps_only():
    full, lean = (table_optimizer(moments) for moments in ("float32", "bfloat16"))
    params = random_params()
    state, lean_state = full.init(params), lean.init(params)
    update, lean_update = jax.jit(full.update), jax.jit(lean.update)
    for step in range(3):
        expected, state = update(random_params(step), state, params)
        updates, lean_state = lean_update(random_params(step), lean_state, params)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
        jax.tree.map(close, updates, expected)
        state = jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(jnp.bfloat16).astype(x.dtype) if TABLE in named(path) else x,
            state,
        )


def test_factored_moments_of_a_product_are_exact():
    """Where squared gradients are rows times features, a factored moment is the whole one."""
    rng = np.random.default_rng(0)
    rows, features = rng.uniform(0.1, 1, (2, 50, 1)), rng.uniform(0.1, 1, (2, 1, 8))
    grads = {"encoder_hash_tok_embedding": {"weight": jnp.float32(rows * features)}}
    factored, whole = (table_optimizer(m, beta1=0.0) for m in ("factored", "float32"))
    state, whole_state = factored.init(grads), whole.init(grads)
    update, whole_update = jax.jit(factored.update), jax.jit(whole.update)
    for scale in (1.0, 0.3, 2.0):
        scaled = jax.tree.map(lambda g, scale=scale: scale * g, grads)
        updates, state = update(scaled, state, grads)
        expected, whole_state = whole_update(scaled, whole_state, grads)
        np.testing.assert_allclose(by_name(updates)[TABLE], by_name(expected)[TABLE], rtol=2e-5)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-25])
def test_factored_a_row_seen_late_does_not_leap(epsilon):
    """Idle rows stay, and neither a late row nor one in odd features moves beyond the bound."""
    optimizer = table_optimizer("factored", epsilon=epsilon)
    grads = np.zeros((1, 40, 8), np.float32)
    grads[0, :4, 0] = 100.0  # the features' moments come from other rows
    late = grads.copy()
    late[0, 9, 1:] = 1e-3
    late[0, 10, 0] = 1e-3

    def tree(x):
        return {"encoder_hash_tok_embedding": {"weight": jnp.asarray(x)}}

    params, update = tree(0 * grads), jax.jit(optimizer.update)
    state = optimizer.init(params)
    for _ in range(60):
        _, state = update(tree(grads), state, params)
    moved = by_name(update(tree(late), state, params)[0])[TABLE][0]
    size = np.sqrt(np.mean(np.square(moved), axis=-1))
    assert 0.5 < size[9] <= 1.001 * (1 - 0.95) ** -0.5
    assert size[10] > 0.1
    assert not size[11:].any()


@functools.cache
def losses(moments):
    """Of 40 steps of logistic regression on the sum of hash rows, rare rows among them."""
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, (40, 256)), 200) - 1
    labels = jnp.asarray(rng.integers(0, 8, 200)[ids])
    ids = jnp.asarray(np.stack([ids, ids * 7 % 199], axis=-1), jnp.int32)
    params = {
        "encoder_hash_tok_embedding": {"weight": rng.normal(0, 0.25, (2, 200, 16))},
        "local_decoder": {"output": {"weight": rng.normal(0, 0.25, (16, 8))}},
    }
    params = jax.tree.map(jnp.float32, params)
    config = OptimizerConfig(learning_rate=0.03, warmup_steps=5, hash_moments=moments)
    optimizer = make_optimizer(config, 40)

    def loss_fn(params, ids, labels):
        tables = params["encoder_hash_tok_embedding"]["weight"]
        embedded = hash_tables.lookup_sum(tables, ids[None], jnp.float32)[0]
        logits = embedded @ params["local_decoder"]["output"]["weight"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(
        lambda params: jax.lax.scan(step, (params, optimizer.init(params)), (ids, labels))
    )
    return np.asarray(run(params)[1])


@pytest.mark.parametrize("moments", ["bfloat16", "factored"])
def test_lean_moments_learn_as_well(moments):
    full, lean = losses("float32"), losses(moments)
    assert full[0] > 2.0 and full[-5:].mean() < 0.5
    assert lean[-5:].mean() < 1.1 * full[-5:].mean()
