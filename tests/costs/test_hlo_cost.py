"""FLOPs, bytes and collectives of programs that are small enough to count by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from bltjax.costs import hlo_cost, jaxpr_flops
from tests import processes

# As libtpu 0.0.42 prints: products are convolutions, a batch is an axis of the window, a collective
# shows in each piece of its way, a kernel's attributes span lines.
TPU = (processes.ROOT / "tests/golden_data/hlo/tpu.txt").read_text()
ROUNDS = 10  # from 2 to 12


def test_a_program_of_tpus():
    kernel = ("attend", ((2, 4), (4,)))
    cost = hlo_cost.read_cost(TPU, {kernel: 7.0})
    assert cost.flops == ROUNDS * 2 * 4 * 64 * 128 * 16  # one tap of four meets each output
    assert cost.kernel_flops == ROUNDS * 7.0 and not cost.unknown_kernels
    gathered, scattered = 64 * 64 * 2, 8 * 128 * 4
    assert cost.collective_bytes() == {"all-gather": ROUNDS * gathered, "reduce-scatter": scattered}
    assert cost.received_bytes() == ROUNDS * gathered / 2 + scattered * 3 / 4
    assert cost.largest_collective() == hlo_cost.Collective(
        "all-gather", gathered, 2, "bf16[64,64]", "jit(step)/w", "/a/model.py:7"
    )
    assert [c.op_name for c, _ in cost.collectives.values()] == ["jit(step)/grads", "jit(step)/w"]
    # In HBM: q, and one round of twelve, read and written; the copy of the counter.
    assert cost.hbm_bytes == ROUNDS * (4 * 64 * 16 * 2 + 2 * 64 * 128 * 4) + 2 * 4


def test_a_kernel_that_is_not_known_is_named():
    cost = hlo_cost.read_cost(TPU)
    assert cost.kernel_flops == 0 and cost.unknown_kernels == {"attend"}


def test_a_loop_that_ends_itself_counts_once():
    text, once = TPU.replace("constant(12)", "parameter(1)"), 2 * 4 * 64 * 128 * 16
    cost = hlo_cost.read_cost(text)
    assert cost.flops == once and cost.unknown_loops == {"loop"}
    named = text.replace("body=%body", 'body=%body, metadata={op_name="a/while" stack_frame_id=3}')
    assert hlo_cost.read_cost(named).unknown_loops == {"/a/model.py:7"}
    assert hlo_cost.read_cost(named.replace("=3}", "=4}")).unknown_loops == {"a/while"}
    exchange = hlo_cost.read_cost(named.replace("a/while", "jit(step)/shard_map/while"))
    assert exchange.flops == 3 * once and not exchange.unknown_loops


def test_a_fusion_that_makes_several_results_at_once():
    """Its root holds the two results of a reduction in a tuple of their own."""
    made = "(f32[8]{0}, (f32[8]{0}, s32[8]{0}))"
    text = f"""HloModule best

%larger (a: f32[], i: s32[], b: f32[], j: s32[]) -> (f32[], s32[]) {{
  %a = f32[] parameter(0)
  %i = s32[] parameter(1)
  %b = f32[] parameter(2)
  %j = s32[] parameter(3)
  ROOT %both = (f32[], s32[]) tuple(%a, %i)
}}

%fused (p: f32[8,4]) -> (f32[8], (f32[8], s32[8])) {{
  %p = f32[8,4]{{1,0}} parameter(0)
  %places = s32[8,4]{{1,0}} iota(), iota_dimension=1
  %zero = f32[] constant(0)
  %none = s32[] constant(0)
  %first = f32[8]{{0}} broadcast(%zero), dimensions={{}}
  %best = (f32[8]{{0}}, s32[8]{{0}}) reduce(%p, %places, %zero, %none), to_apply=%larger
  ROOT %made = {made} tuple(%first, %best)
}}

ENTRY %main (x: f32[8,4]) -> (f32[8], (f32[8], s32[8])) {{
  %x = f32[8,4]{{1,0}} parameter(0)
  ROOT %fusion = {made} fusion(%x), kind=kInput, calls=%fused
}}
"""
    assert hlo_cost.read_cost(text).hbm_bytes == 4 * (8 * 4 + 3 * 8)


def test_what_runs_on_other_cores_of_a_chip():
    """Computations of TPUs' sparse cores end with an attribute, and calls of them begin and end."""
    text = TPU.replace("\n}\n\n%update", '\n}, execution_thread="sparsecore"\n\n%update')
    called = "fusion(%q, %k), kind=kOutput, calls=%batched"
    assert text != TPU and called in text
    text = text.replace(called, "call-start(%q, %k), to_apply=%batched")
    kernel = ("attend", ((2, 4), (4,)))
    assert hlo_cost.read_cost(text, {kernel: 7.0}).flops == ROUNDS * 2 * 4 * 64 * 128 * 16


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=3,'c'=5] {'a','c'}", 10),
        ("mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b':(2)4}", 4),
    ],
)
def test_groups_of_devices(groups, size):
    (found, _), *_ = hlo_cost.read_cost(
        "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}\n}}\n"
    ).collectives.values()
    assert found.group == size


def cost_of(function, *arguments):
    lowered = jax.jit(function).trace(*arguments)
    work = jaxpr_flops.Work(lowered.jaxpr)
    text = lowered.lower().compile().as_text()
    return work, hlo_cost.read_cost(text, work.kernels)


def square(*shape):
    return jax.ShapeDtypeStruct((*shape, 64, 64), jnp.float32)


PRODUCT = 2 * 64**3


def nested(x, w):
    def layer(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

    return jax.lax.scan(layer, x, w)[0]


@pytest.mark.parametrize(
    "function, weights, products",
    [
        (lambda x, w: x @ w, (), 1),
        (lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], (5,), 5),
        (nested, (5,), 15),
        (lambda x, w: jax.grad(lambda w: jnp.sum(nested(x, w) ** 2))(w), (5,), 45),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), (), 2),
        (lambda x, w: jnp.einsum("bij,bjk->bik", w, w), (6,), 6),
    ],
)
def test_products_of_a_program_in_both_forms(function, weights, products):
    work, cost = cost_of(function, square(), square(*weights))
    assert (work.flops, cost.flops) == (products * PRODUCT, products * PRODUCT)
    assert not cost.unknown_loops


def test_a_loop_that_data_ends():
    work, cost = cost_of(
        lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x),
        square(),
        square(),
    )
    assert (work.flops, cost.flops, len(cost.unknown_loops)) == (PRODUCT, PRODUCT, 1)


def test_collectives_of_a_loop():
    def step(x, w):
        def gathered(x, _):
            return jnp.tanh(reshard(reshard(x, P()) @ w, P("x"))), None

        return jax.lax.scan(gathered, x, None, length=5)[0]

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, w = (
            jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
            for spec in (P("x"), P())
        )
        cost = hlo_cost.read_cost(jax.jit(step).lower(x, w).compile().as_text())
    assert cost.collective_bytes() == {"all-gather": 5 * 64 * 64 * 4}
    assert cost.received_bytes() == 5 * 64 * 64 * 4 * 7 / 8
    assert cost.largest_collective().group == 8


def test_a_kernel_is_its_grid_times_its_body():
    def body(x, y, out):
        out[...] = jnp.dot(x[...], y[...])

    block = functools.partial(pl.BlockSpec, index_map=lambda i: (i, 0))
    call = pl.pallas_call(
        body,
        jax.ShapeDtypeStruct((64, 64), jnp.float32),
        grid=(4,),
        in_specs=[block((16, 64)), pl.BlockSpec((64, 64), lambda i: (0, 0))],
        out_specs=block((16, 64)),
        name="rows",
    )
    work = jaxpr_flops.Work(
        jax.jit(lambda x, w: jax.lax.scan(lambda x, _: (call(x, w), None), x, None, length=3)[0])
        .trace(square(), square())
        .jaxpr
    )
    assert work.kernels == {("rows", ((64, 64),)): PRODUCT}
    assert work.flops == 3 * PRODUCT


def test_blocks_that_splash_attention_skips():
    splash = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention")
    length, width, block = 1024, 128, 128
    mask = splash.MultiHeadMask([splash.LocalMask((length, length), (255, 0), 0)])
    kernel = splash.make_splash_mha_single_device(mask)
    q = jax.ShapeDtypeStruct((1, length, width), jnp.bfloat16)
    work = jaxpr_flops.Work(jax.jit(kernel).trace(q, q, q).jaxpr)
    seen = np.tri(8, dtype=int) - np.tri(8, k=-3, dtype=int)  # each block and the two before it
    assert work.flops == seen.sum() * block**2 * 2 * 2 * width


FALLBACK = """%kernel (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %y = f32[8,8]{1,0} custom-call(%x), custom_call_target="NAME"
}

%tiles (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %a = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %b = f32[8,8]{1,0} dot(%a, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (i: s32[], x: f32[8,8]) -> f32[8,8] {
  %i = s32[] parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%i, %x, %x), branch_computations={%kernel, %tiles}
}
"""


@pytest.mark.parametrize("name, arrays", [("__cudnn$fmhaSoftmax", 2), ("other", 2 * 3)])
def test_tiles_beside_a_kernel_of_cudnn_do_not_run(name, arrays):
    """Its bytes count, and FLOPs as the tiles', for the kernel's own are not told."""
    cost = hlo_cost.read_cost(FALLBACK.replace("NAME", name))
    assert cost.flops == 2 * 2 * 8**3 and cost.hbm_bytes == arrays * 8 * 8 * 4
