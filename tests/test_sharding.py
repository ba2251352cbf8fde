"""The same numbers on every mesh, and layouts that hold on a thousand chips."""

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
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    TransformerConfig,
)
from bltjax.model import functional
from bltjax.training.optimizer import make_optimizer
from bltjax.training.state import create_state, start_state
from bltjax.training.step import batch_sums, make_train_step

B, L, P = 8, 16, 9
HASH_ROWS = 1016  # a number that no other dimension has
COLLECTIVES = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
Explicit = jax.sharding.AxisType.Explicit


def stack(dim, layers, heads, **settings):
    return TransformerConfig(dim=dim, num_layers=layers, num_heads=heads, **settings)


TINY = BLTConfig(
    local_encoder=stack(16, 1, 2, window=6, ffn_multiple_of=16),
    global_transformer=stack(24, 2, 2, ffn_multiple_of=16),
    local_decoder=stack(16, 2, 2, window=6, ffn_multiple_of=16),
    cross_attention=CrossAttentionConfig(num_heads=2),
    hash=HashConfig((2, 3), HASH_ROWS),
)
ENTROPY = EntropyModelConfig(stack(16, 2, 2, window=6, ffn_multiple_of=16))
BLT_1B = BLTConfig(
    local_encoder=stack(1024, 1, 16, window=512),
    global_transformer=stack(2048, 25, 16),
    local_decoder=stack(1024, 9, 16, window=512),
    cross_attention=CrossAttentionConfig(num_heads=16),
    compute_dtype="bfloat16",
)


def keep_gradients() -> optax.GradientTransformation:
    """Passes gradients on and leaves them in its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (grads, grads),
    )


def host_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 260, (B, L + 1)).astype(np.int32)
    tokens[:, 7] = 2
    cuts = np.sort(np.stack([rng.permutation(L - 1)[: P - 2] for _ in range(B)]) + 2, axis=1)
    edges = np.concatenate([np.tile([0, 1], (B, 1)), cuts, np.full((B, 1), L + 1)], axis=1)
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=rng.random((B, L)) < 0.9,
        document_ids=np.tile(np.arange(L) > 7, (B, 1)).astype(np.int32),
        patch_lengths=np.diff(edges).astype(np.int32),
    )


def compiled_train_step(config):
    """The compiled train step on the mesh that is set, and its arguments, placed."""
    optimizer = optax.chain(keep_gradients(), make_optimizer(OptimizerConfig(), 10))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jax.device_put(rng.normal(0, 0.25, x.shape).astype(np.float32), x.sharding),
        sharding.concrete(functional.abstract_params(config)),
    )
    state = start_state(params, optimizer)
    batch = host_batch()
    if isinstance(config, EntropyModelConfig):
        del batch["patch_lengths"]
    batch = sharding.put_batch(batch)
    step = make_train_step(config, TrainingConfig(), optimizer)
    return step.lower(state, batch).compile(), state, batch


def loss_and_gradients(config):
    compiled, state, batch = compiled_train_step(config)
    state, metrics = compiled(state, batch)
    return compiled.as_text(), jax.device_get((metrics["loss"], state.opt_state[0]))


@functools.cache
def on_one_device(config):
    assert jax.sharding.get_mesh().size == 1
    return loss_and_gradients(config)[1]


@pytest.mark.long
@pytest.mark.parametrize("config", [TINY, ENTROPY], ids=["blt", "entropy model"])
def test_same_loss_and_gradients_on_a_mesh(config, use_mesh, compiling, capfd):
    """And XLA found a way to each layout without gathering everything.

    `test_meshes` compares losses on more of them.
    """
    expected = on_one_device(config)
    capfd.readouterr()
    with use_mesh(2, 2, 2):
        text, result = loss_and_gradients(config)
    assert "rematerialization" not in capfd.readouterr().err
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), result, expected
    )
    moved = re.findall(rf"= (.*?) ({COLLECTIVES})", text)
    assert {"all-gather", "all-to-all"} <= {kind for _, kind in moved} or config is ENTROPY
    shares = [HASH_ROWS // chips * tables for chips in (1, 2, 4) for tables in (1, 2)]
    of_tables = re.compile(rf"\b({'|'.join(map(str, shares))})\b")
    assert not [shape for shape, _ in moved if of_tables.search(shape)]


def test_initial_weights_are_the_same_on_every_mesh(use_mesh):
    alone = jax.device_get(functional.init(ENTROPY, jax.random.key(0)))
    with use_mesh(2, 2, 2):
        params = functional.init(ENTROPY, jax.random.key(0))
        wq = params["layers"]["attention"]["wq"]["weight"]
        assert wq.addressable_shards[0].data.size == wq.size // 4  # born sharded: fsdp x tensor
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), alone)


def test_optimizer_state_is_sharded_as_the_parameters(use_mesh):
    with use_mesh(2, 2, 2):
        optimizer = make_optimizer(OptimizerConfig(), 10)
        state = jax.eval_shape(lambda: create_state(ENTROPY, optimizer, 0))
        adam = next(
            s
            for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
            if hasattr(s, "mu")
        )
        for moment in (adam.mu, adam.nu):
            jax.tree.map(
                lambda m, p: np.testing.assert_equal(m.sharding.spec, p.sharding.spec),
                moment,
                state.params,
            )


@pytest.mark.parametrize(
    "given, sizes",
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((1, -1, 2), (1, 4, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((8, 1, -1), (8, 1, 1)),
        ((2, 4, 1), (2, 4, 1)),
    ],
)
def test_make_mesh(given, sizes):
    mesh = sharding.make_mesh(MeshConfig(*given), jax.devices()[:8])
    assert tuple(mesh.shape.values()) == sizes
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {Explicit}
    assert sharding.num_row_shards(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize("sizes", [(2, 2, 1), (3, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_fit_is_named(sizes):
    with pytest.raises(ValueError, match=re.escape(str(sizes)) + r".*\b8 device"):
        sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:8])


class Chip:
    """A chip of a TPU slice, as far as a mesh asks."""

    platform, device_kind, core_on_chip, process_index = "tpu", "TPU v5 lite", 0, 0
    client = None

    def __init__(self, number, slice_index, coords):
        self.id, self.slice_index, self.coords = number, slice_index, coords


def tpu_slices(count, sides):
    """The chips of so many slices of sides[0] x sides[1] chips, in no order that would help."""
    places = [(s, (x, y, 0)) for s in range(count) for x, y in np.ndindex(*sides)]
    chips = [Chip(number, *place) for number, place in enumerate(places)]
    return [chips[i] for i in np.random.default_rng(0).permutation(len(chips))]


@pytest.mark.parametrize("fsdp, tensor", [(2, 2), (4, 1), (1, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("slices", [1, 2, 4])
def test_on_tpu_slices_the_data_axis_goes_over_them(fsdp, tensor, slices):
    """Outermost, so that fsdp and tensor stay inside a slice, where the network is fast."""
    devices = tpu_slices(slices, (2, 2))
    assert sharding.num_slices(devices) == slices
    mesh = sharding.make_mesh(MeshConfig(-1, fsdp, tensor), devices)
    assert mesh.axis_names == sharding.MESH_AXES and set(mesh.axis_types) == {Explicit}
    each = 4 // fsdp // tensor
    assert mesh.devices.shape == (slices * each, fsdp, tensor)
    assert set(mesh.devices.flat) == set(devices)
    of_rows = [{chip.slice_index for chip in row.flat} for row in mesh.devices]
    assert of_rows == [{number // each} for number in range(slices * each)]


@pytest.mark.parametrize("slices", [1, 2])
def test_a_mesh_axis_may_be_a_part_of_a_side_of_the_chips(slices):
    devices = tpu_slices(slices, (4, 4))
    for chip in devices:
        chip.device_kind = "TPU v6 lite"  # of which JAX splits none unasked
    mesh = sharding.make_mesh(MeshConfig(-1, 8, 1), devices)
    assert mesh.devices.shape == (2 * slices, 8, 1)


@pytest.mark.parametrize("sizes, data", [((1, -1, 1), 1), ((3, 2, 4), 3), ((-1, 8, 1), 3)], ids=str)
def test_a_data_axis_that_does_not_split_over_the_slices_is_named(sizes, data):
    devices = tpu_slices(6, (2, 2))
    said = f"mesh.data={data} is not divisible by the 6 slices"
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(MeshConfig(*sizes), devices)


def test_large_tables_must_divide(no_mesh):
    """Small ones are whole on every chip where they do not."""
    mesh = sharding.abstract_mesh(MeshConfig(data=3, fsdp=1), 3)
    for vocab in (4095, 6140):  # the second held as 6144 rows
        model = dataclasses.replace(TINY, hash=HashConfig((3,), vocab))
        sharding.check_model(model, "blt", mesh)
    model = dataclasses.replace(TINY, hash=HashConfig((3,), 5000))
    said = r"5120 rows .*blt\.hash\.vocab=5000\) do not divide over mesh.data \* mesh.fsdp=3"
    with pytest.raises(ValueError, match=said):
        sharding.check_model(model, "blt", mesh)


def test_a_single_row_on_one_device():
    """Generation runs one row; jax 0.12 forgets that a dimension of size 1 was sharded."""
    lengths = np.array([[1, 3, 13]], np.int32)
    batch = dict(tokens=np.full((1, L), 9, np.int32), patch_lengths=lengths)
    batch |= dict(
        targets=batch["tokens"], loss_mask=batch["tokens"] > 0, document_ids=0 * batch["tokens"]
    )
    sums = jax.eval_shape(
        functools.partial(batch_sums, TINY), functional.abstract_params(TINY), batch
    )
    assert sums["nats"].shape == ()
    entropy_logits = jax.eval_shape(
        functools.partial(functional.apply, ENTROPY),
        functional.abstract_params(ENTROPY),
        batch["tokens"],
    )
    assert entropy_logits.shape == (1, L, 260)


@pytest.mark.parametrize("sizes", [(4, 64, 4), (256, 1, 4)], ids=str)
def test_a_thousand_chips(sizes, no_mesh):
    """The 1B model's loss and gradients type-check on 1024 chips, every large weight divided."""
    mesh = jax.sharding.AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(Explicit,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        params = functional.abstract_params(BLT_1B)

        def rows(dtype, *shape):
            return jax.ShapeDtypeStruct(
                shape, dtype, sharding=jax.NamedSharding(mesh, sharding.batch_spec(len(shape)))
            )

        batch = {
            name: rows(dtype, 256, 4096)
            for name, dtype in dict(
                tokens=jnp.int32, targets=jnp.int32, loss_mask=jnp.bool, document_ids=jnp.int32
            ).items()
        }
        batch["patch_lengths"] = rows(jnp.int32, 256, 1024)

        def loss(params, batch):
            sums = batch_sums(BLT_1B, params, batch)
            return sums["nats"], sums

        gradients, sums = jax.eval_shape(jax.grad(loss, has_aux=True), params, batch)
    assert sums["nats"].shape == ()
    fsdp = "fsdp" if sizes[1] > 1 else None
    tables = params["encoder_hash_tok_embedding"]["weight"].sharding.spec
    assert tables == jax.P(None, ("data", "fsdp") if fsdp else "data", "tensor")
    layers = params["global_transformer"]["layers"]
    assert layers["attention"]["wq"]["weight"].sharding.spec == jax.P(None, "tensor", fsdp)
    assert layers["attention"]["wo"]["weight"].sharding.spec == jax.P(None, fsdp, "tensor")
    assert layers["feed_forward"]["w2"]["weight"].sharding.spec == jax.P(None, fsdp, "tensor")
    for weight in jax.tree.leaves(params):
        spec = weight.sharding.spec
        assert weight.size < 1e6 or any(spec) or fsdp is None, (weight.shape, spec)
    jax.tree.map(
        lambda g, p: np.testing.assert_equal(g.sharding.spec, p.sharding.spec), gradients, params
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (8, 1, 1)])
def test_rows_of_a_process_are_placed_and_gathered(use_mesh, sizes):
    use_mesh(*sizes)
    assert sharding.rows_of_process(16).tolist() == list(range(16))  # one process has them all
    batch = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    placed = sharding.put_batch(dict(x=batch))["x"]
    np.testing.assert_array_equal(placed, batch)
    shards = {s.index[0].indices(16)[:2] for s in placed.addressable_shards}
    assert len(shards) == sizes[0] * sizes[1]
    states = np.array([[2**40 + i, -1, i] for i in range(16)], np.int64)
    found = sharding.gather_rows(states)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, states)
