"""Initial weights, parameter counts, rematerialisation, precision, and one compilation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import sharding
from bltjax.config import (
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    InitConfig,
    OptimizerConfig,
    PatchingConfig,
    TrainingConfig,
    TransformerConfig,
)
from bltjax.model import functional
from bltjax.model.parameters import Embedding
from bltjax.patching.boundaries import patch_starts
from bltjax.patching.buffers import buffers_from_starts
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import create_state
from bltjax.training.step import batch_sums, make_train_step
from bltjax.vocabulary import encode

space_starts = functools.partial(patch_starts, PatchingConfig("space"))

B, L, P = 4, 24, 12
TEXT = __doc__ * 20


def stack(dim, layers, heads=2, **settings):
    return TransformerConfig(dim=dim, num_layers=layers, num_heads=heads, **settings)


TINY = BLTConfig(
    local_encoder=stack(8, 1, window=6, ffn_multiple_of=8),
    global_transformer=stack(16, 2, ffn_multiple_of=8),
    local_decoder=stack(8, 2, window=6, ffn_multiple_of=8),
    cross_attention=CrossAttentionConfig(num_heads=2),
    hash=HashConfig((3, 4), 97),
)


def released(local, num_encoder, local_heads, dim, num_global, num_heads, num_decoder, k):
    """Those of model.md#sizes."""
    return BLTConfig(
        local_encoder=stack(local, num_encoder, local_heads, window=512),
        global_transformer=stack(dim, num_global, num_heads),
        local_decoder=stack(local, num_decoder, local_heads, window=512),
        cross_attention=CrossAttentionConfig(k=k, num_heads=local_heads),
    )


BLT_1B = released(1024, 1, 16, 2048, 25, 16, 9, 2)
BLT_7B = released(1280, 1, 20, 4096, 32, 32, 6, 4)
ENTROPY_100M = EntropyModelConfig(stack(768, 14, 12, window=512, rope_theta=1e4))


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "config, total, tables",
    [
        (BLT_1B, 4_533_879_808, 3_072_012_288),
        (BLT_7B, 10_553_570_560, 3_840_015_360),
        (ENTROPY_100M, 99_512_064, 0),
    ],
    ids=["1b", "7b", "entropy"],
)
def test_released_parameter_counts(config, total, tables):
    """Those of model.md#sizes, without a single weight in memory."""
    params = functional.abstract_params(config)
    unused = 0 if config is ENTROPY_100M else (501_760 - 500_002) * 6 * config.local_encoder.dim
    assert count(params) - unused == total
    assert count(params.get("encoder_hash_tok_embedding", {})) - unused == tables
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def test_released_parts():
    params = functional.abstract_params(BLT_1B)
    assert {name: count(part) for name, part in params.items()} == {
        "local_encoder": 19_406_848,
        "global_transformer": 1_284_608_000,
        "local_decoder": 157_852_672,
        "encoder_hash_tok_embedding": 6 * 501_760 * 1024,  # of 500,002 rows as published
    }
    assert params["global_transformer"].keys() == {"layers"}  # widths agree: no projection
    assert "token_embedding_projection" in functional.abstract_params(BLT_7B)["global_transformer"]


def expected_stds(config):
    """model.md#initial-weights: sigma of every matrix, [layers] for stacked ones, by path."""
    local, glob = config.local_encoder, config.global_transformer
    expected = {
        "encoder_hash_tok_embedding.weight": local.dim**-0.5,
        "global_transformer.token_embedding_projection.weight": config.patch_width**-0.5,
        "local_encoder.patch_embedding_projection.weight": local.dim**-0.5,
        "local_decoder.patch_embedding_projection.weight": glob.dim**-0.5,
        "local_encoder.tok_embeddings.weight": local.dim**-0.5,
        "local_decoder.output.weight": local.dim**-0.5,
    }

    def factor(index, num_layers, dim):
        return {
            "current_depth": np.sqrt(2 * (index + 1)),
            "dim_ratio": dim / 4096,
            "disabled": 1.0,
            "global_depth": np.sqrt(2 * (num_layers + 1)),
        }[config.init.std_factor]

    for name in ("local_encoder", "global_transformer", "local_decoder"):
        part = getattr(config, name)
        f = np.array([factor(i, part.num_layers, part.dim) for i in range(part.num_layers)])
        stds = dict.fromkeys(
            (
                "attention.wq",
                "attention.wk",
                "attention.wv",
                "attention.wo",
                "feed_forward.w1",
                "feed_forward.w3",
            ),
            part.dim ** (-0.5) / f,
        )
        stds["feed_forward.w2"] = part.ffn_dim**-0.5 / f
        if name == "global_transformer" and config.init.base_std is not None:
            stds = {n: np.full_like(f, config.init.base_std) for n in stds}
        expected |= {f"{name}.layers.{n}.weight": std for n, std in stds.items()}
        if name != "global_transformer":
            cross = f if name == "local_decoder" else f[:1]
            expected |= {
                f"{name}.cross_attn_layers.{w}.weight": local.dim**-0.5 / cross
                for w in ("wq", "wk", "wv", "wo")
            }
    return expected


@pytest.mark.parametrize(
    "init",
    [InitConfig("current_depth"), InitConfig("global_depth", base_std=0.07)],
    ids=["current_depth", "global_depth, base_std"],
)
def test_initial_weights(init):
    """Truncated normals (std 0.98658 sigma), norms 1, depth factors (model.md#initial-weights)."""
    config = BLTConfig(
        local_encoder=stack(64, 2, window=6),
        global_transformer=stack(96, 3),
        local_decoder=stack(64, 2, window=6),
        hash=HashConfig((3, 4), 97),
        init=init,
    )
    expected = expected_stds(config)
    leaves = jax.tree_util.tree_leaves_with_path(functional.init(config, jax.random.key(0)))
    matrices = {}
    for path, weight in leaves:
        name = ".".join(key.key for key in path)
        if "norm" in name:
            assert (weight == 1).all(), name
        else:
            matrices[name] = np.asarray(weight, np.float64)
    assert matrices.keys() == expected.keys()
    for name, weight in matrices.items():
        layers = weight if np.ndim(expected[name]) else weight[None]
        for layer, sigma in zip(layers, np.atleast_1d(expected[name]), strict=True):
            scaled = layer / sigma
            assert abs(scaled.std() - 0.98658) < 0.04, name  # 4096 numbers or more: 3.5 sigma
            assert abs(scaled.mean()) < 0.06, name
            assert 2.8 < np.abs(scaled).max() <= 3 + 1e-5, name
    first, second = (matrices["global_transformer.layers.attention.wq.weight"][i] for i in (0, 1))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05  # layers are not copies


def random_batch(rng):
    starts = rng.random((B, L + 1)) < rng.uniform(0.05, 0.9)
    starts[:, :2] = True
    return batch_of(rng.integers(0, 260, (B, L + 1)), starts)


def text_batch(rng):
    ids = encode(TEXT)
    tokens = np.stack([ids[i : i + L + 1] for i in rng.integers(0, len(ids) - L - 1, B)])
    return batch_of(tokens, space_starts(tokens[:, :-1]))


to_buffers = jax.jit(buffers_from_starts, static_argnums=1)


def batch_of(tokens, starts):
    return sharding.put_batch(
        dict(
            tokens=tokens[:, :-1].astype(np.int32),
            targets=tokens[:, 1:].astype(np.int32),
            loss_mask=tokens[:, 1:] > 0,
            document_ids=np.zeros((B, L), np.int32),
            patch_lengths=np.asarray(to_buffers(starts, P).lengths),
        )
    )


@functools.cache
def loss_and_gradients(remat="none", compute_dtype="float32"):
    config = dataclasses.replace(TINY, remat=remat, compute_dtype=compute_dtype)
    params = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(1).normal(0, 0.3, x.shape), jnp.float32),
        functional.abstract_params(config),
    )
    batch = random_batch(np.random.default_rng(0))

    def loss(params):
        return batch_sums(config, params, batch)["nats"] / B / L

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


@pytest.mark.long
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(remat):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        loss_and_gradients(remat),
        loss_and_gradients(),
    )


@pytest.mark.long
def test_bfloat16_compute_is_close_and_parameters_stay_float32():
    (loss, gradients), (expected, expected_gradients) = (
        loss_and_gradients(compute_dtype="bfloat16"),
        loss_and_gradients(),
    )
    assert loss.dtype == np.float32
    assert loss != expected
    assert loss == pytest.approx(expected, rel=0.02)
    for ours, theirs in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert ours.dtype == np.float32
        assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)


@pytest.mark.long
def test_text_never_recompiles():
    """200 batches of noise and text, patches anywhere, some overflowing: one compilation."""
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=10), 1000)
    state = create_state(TINY, optimizer, seed=0)
    train_step = make_train_step(TINY, TrainingConfig(), optimizer)
    rng = np.random.default_rng(0)
    for step in range(200):
        state, metrics = train_step(state, (random_batch, text_batch)[step % 2](rng))
        if step == 0:
            # The first batch compiles; a state that comes back typed otherwise would do so again.
            first = train_step._cache_size()
    assert (first, train_step._cache_size()) == (1, 1)
    assert int(state.step) == 200
    assert np.isfinite(metrics["loss"])


def test_gradient_of_a_common_byte_adds_up_in_float32():
    """8192 uses of one row in bfloat16 compute: the sum does not stick at 256."""
    embedding = Embedding(260, 4, std=1.0, key=jax.random.key(0))
    ids = jnp.full((1, 8192), 7, jnp.int32)

    def total(embedding):
        return embedding(ids, jnp.bfloat16).astype(jnp.float32).sum()

    (gradient,) = jax.tree.leaves(jax.grad(total)(embedding))
    np.testing.assert_array_equal(np.asarray(gradient)[7], 8192)


def logits_of(config, params):
    tokens = jnp.asarray(encode(TEXT)[: B * L].reshape(B, L))
    patches = buffers_from_starts(space_starts(tokens), L + 1)
    return jax.jit(functional.apply, static_argnums=0)(config, params, tokens, patches)


@pytest.mark.long
def test_grouped_cross_heads_are_repeated_heads():
    """Each key/value head serves the query heads that follow each other (as in model.md#block)."""
    local = dataclasses.replace(TINY.local_encoder, dim=16, num_heads=2)
    cross = CrossAttentionConfig(num_heads=4, num_kv_heads=2, num_heads_decoder=2)
    grouped = dataclasses.replace(
        TINY, local_encoder=local, local_decoder=local, cross_attention=cross
    )
    params = functional.init(grouped, jax.random.key(0))
    full = dataclasses.replace(cross, num_kv_heads=None)
    repeated = jax.tree.map(lambda x: x, params)
    layers = repeated["local_encoder"]["cross_attn_layers"]
    for name in ("wk", "wv"):
        weight = layers[name]["weight"]  # [layers, 2 heads of 4, 16]
        assert weight.shape == (1, 8, 16)
        heads = weight.reshape(1, 2, 4, 16)
        layers[name] = {"weight": jnp.repeat(heads, 2, axis=1).reshape(1, 16, 16)}
    assert params["local_decoder"]["cross_attn_layers"]["wk"]["weight"].shape == (1, 16, 16)
    expected = logits_of(dataclasses.replace(grouped, cross_attention=full), repeated)
    np.testing.assert_allclose(logits_of(grouped, params), expected, rtol=0, atol=1e-6)
    assert np.abs(expected - logits_of(grouped, functional.init(grouped, jax.random.key(1)))).max()


@pytest.mark.long
def test_a_projection_between_equal_widths_may_be_there():
    """Published models have none (model.md#decoder); with the identity it changes nothing."""
    same = dataclasses.replace(
        TINY,
        global_transformer=stack(8, 1, ffn_multiple_of=8),
        cross_attention=CrossAttentionConfig(k=1, num_heads=2),
    )
    params = functional.init(same, jax.random.key(0))
    assert "patch_embedding_projection" not in params["local_decoder"]
    always = dataclasses.replace(same, always_project=True)
    assert functional.abstract_params(always)["local_decoder"]["patch_embedding_projection"]
    with_identity = jax.tree.map(lambda x: x, params)
    with_identity["local_decoder"]["patch_embedding_projection"] = {"weight": jnp.eye(8)}
    np.testing.assert_allclose(
        logits_of(always, with_identity), logits_of(same, params), rtol=0, atol=1e-6
    )


@pytest.mark.long
def test_a_skip_projection_is_zero_at_first():
    """The identity changes nothing; as drawn, the decoder knows a byte by its patch alone."""
    skipping = dataclasses.replace(TINY, skip_projection=True)
    params = functional.init(skipping, jax.random.key(0))
    decoder = params["local_decoder"]
    weight = decoder["skip_projection"]["weight"]
    assert weight.shape == (8, 8) and not weight.any()
    patches = buffers_from_starts(jnp.ones((B, L + 1), bool), L + 1)
    rows = patches, jnp.zeros((B, L), jnp.int32)
    h = jax.random.normal(jax.random.key(1), (B, L, 8))
    latents = jax.random.normal(jax.random.key(2), (*patches.starts.shape, 16))
    decode = functools.partial(functional.decode, skipping, params)
    assert (decode(h, latents, *rows) == decode(-h, latents, *rows)).all()
    assert (decode(h, latents, *rows) != decode(h, -latents, *rows)).any()
    decoder["skip_projection"]["weight"] = jnp.eye(8)
    with_identity = logits_of(skipping, params)
    del decoder["skip_projection"]
    np.testing.assert_allclose(with_identity, logits_of(TINY, params), rtol=0, atol=1e-6)


def test_feed_forward_width_can_be_given():
    config = dataclasses.replace(
        TINY, global_transformer=stack(16, 2, ffn_multiple_of=8, ffn_width=13)
    )
    layers = functional.abstract_params(config)["global_transformer"]["layers"]
    assert layers["feed_forward"]["w1"]["weight"].shape == (2, 13, 16)
    assert layers["feed_forward"]["w2"]["weight"].shape == (2, 16, 13)
