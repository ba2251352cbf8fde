"""Causal and windowed attention on NVIDIA GPUs from Hopper on, by cuDNN's fused kernels.

A document is a batch entry of the kernels, which read it where it lies in its row (cuDNN's packed
layout): nothing is computed between documents, and no mask is made. Rows with more documents than
there are entries go through tiles instead.

XLA calls the kernels by a name and a description in JSON, the same that `jax.nn` writes for
implementation="cudnn"; it has no way to say where documents end.
"""

import functools
import json

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bltjax.ops.kernels import unrolled_attention as tiles
from bltjax.ops.segments import Documents, documents
from bltjax.ops.slots import on_rows, on_shards

# Documents of a row, on average over the rows of a device: entries cost little memory and launch.
MOST_DOCUMENTS = 16
MOST_HEAD_WIDTH = 128
DTYPES = ("bfloat16", "float16")
_FORWARD, _BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
_NAMES = {"bfloat16": "BF16", "float16": "F16"}


def packed_documents(segments, most: int = MOST_DOCUMENTS) -> Documents:
    """Returns what the kernels need of segments int32 [B, L], the same for all layers."""
    return on_rows(functools.partial(documents, most=max(2, most)), segments)


def cudnn_attention(q, k, v, segments, window: int | None = None, packed: Documents | None = None):
    """Attends from each position to itself and `window` - 1 before it (None: all) in its segment.

    q [B, L, H, D]; k, v [B, L, G, D], G dividing H, of one of DTYPES, D a multiple of 8 up to 128;
    segments int32 [B, L] -> [B, L, H, D]. Rows and heads may be sharded, positions not.
    packed: `packed_documents(segments)`, where many layers share it.
    """
    return _attend(q, k, v, segments, packed or packed_documents(segments), window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, segments, packed, window):
    return _forward(q, k, v, segments, packed, window)[0]


def _forward(q, k, v, segments, packed, window):
    attend = functools.partial(_forward_on_device, window)
    out, statistics = on_shards(attend, q, k, v, segments, *packed, like=(0, 0))
    out, statistics = (checkpoint_name(x, "attention") for x in (out, statistics))
    return out, (q, k, v, segments, packed, out, statistics)


def _backward(window, saved, gradient):
    q, k, v, segments, packed, out, statistics = saved
    pull_back = functools.partial(_backward_on_device, window)
    arrays = q, k, v, out, statistics, gradient, segments, *packed
    return *on_shards(pull_back, *arrays, like=(0, 1, 2)), None, None


_attend.defvjp(_forward, _backward)


def _forward_on_device(window, q, k, v, segments, *packed):
    """Returns the result, and statistics of softmaxes float32 [B, most, H, L]."""
    most = packed[0].shape[1]
    # Else what the tiles do with segments alone is done before the layers, by a branch of its own.
    q, segments, packed = jax.lax.optimization_barrier((q, segments, packed))

    def by_kernel():
        return kernel_forward(q, k, v, Documents(*packed), window)

    def by_tiles():
        out, log_sums = tiles.forward(q, k, v, segments, window)
        log_sums = jnp.swapaxes(log_sums, 1, 3)  # [B, 1, H, L]
        return out, jnp.pad(log_sums, ((0, 0), (0, most - 1), (0, 0), (0, 0)))

    return jax.lax.cond(packed[-1].all(), by_kernel, by_tiles)


def _backward_on_device(window, q, k, v, out, statistics, gradient, segments, *packed):
    q, segments, packed = jax.lax.optimization_barrier((q, segments, packed))  # as above

    def by_kernel():
        return kernel_backward(q, k, v, out, statistics, gradient, Documents(*packed), window)

    def by_tiles():
        log_sums = jnp.swapaxes(statistics[:, :1], 1, 3)
        return tiles.backward(q, k, v, segments, out, log_sums, gradient, window)

    return jax.lax.cond(packed[-1].all(), by_kernel, by_tiles)


def kernel_forward(q, k, v, packed: Documents, window: int | None):
    """Runs the forward kernel on the rows of one device; see `_forward_on_device`."""
    batch, length, heads, _ = q.shape
    most = packed.lengths.shape[1]
    statistics = jax.ShapeDtypeStruct((batch * most, heads, length), jnp.float32)
    call = _kernel_call(_FORWARD, q, k, window, most, [_heads_first(q), statistics], 1)
    out, statistics, _ = call(q, k, v, *_layout(q, k, packed))
    return jnp.swapaxes(out, 1, 2), statistics.reshape(batch, most, heads, length)


def kernel_backward(q, k, v, out, statistics, gradient, packed: Documents, window: int | None):
    """Runs the backward kernel on the rows of one device; returns gradients in q, k and v."""
    most = packed.lengths.shape[1]
    results = [_heads_first(x) for x in (q, k, v)]
    call = _kernel_call(_BACKWARD, q, k, window, most, results, 3)
    statistics = statistics.reshape(-1, *statistics.shape[2:])
    found = call(q, k, v, statistics, gradient, out, *_layout(q, k, packed))
    return tuple(jnp.swapaxes(x, 1, 2) for x in found[:3])


def _layout(q, k, packed):
    """Returns lengths and first elements of documents, of the queries and of the keys."""
    query_row, key_row = (x.shape[2] * x.shape[3] for x in (q, k))
    if q.size >= 2**31:
        raise ValueError(
            f"attention='cudnn' counts elements in int32, and a device has queries {q.shape}: give "
            "it fewer rows, or set attention='tiles'"
        )
    offsets = packed.offsets
    return packed.lengths, packed.lengths, offsets * query_row, offsets * key_row


def _heads_first(x):
    batch, length, heads, width = x.shape
    return jax.ShapeDtypeStruct((batch, heads, length, width), x.dtype)


def _kernel_call(name, q, k, window, most, results, num_heads_first):
    """Returns the call of a kernel, whose first results [B, H, L, D] lie as [B, L, H, D]."""
    workspace = jax.ShapeDtypeStruct((0,), jnp.uint8)
    return jax.ffi.ffi_call(
        name,
        [*results, workspace],
        output_layouts=[(0, 2, 1, 3)] * num_heads_first
        + [None] * (len(results) - num_heads_first + 1),
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(_description(name, q, k, window, most)),
    )


# Products of the kernels, of [B, L, H, D] and [B, H, L, L]: contracted and batch axes of both.
_PRODUCTS = {
    _FORWARD: {
        "bmm1": ((3, 3), ((0, 2), (0, 2))),
        "bmm2": ((3, 1), ((0, 1), (0, 2))),
    },
    _BACKWARD: {
        "bmm1_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
        "bmm1_grad_gemm2": ((3, 1), ((0, 1), (0, 2))),
        "bmm2_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
        "bmm2_grad_gemm2": ((3, 3), ((0, 2), (0, 2))),
    },
}


def _description(name, q, k, window, most):
    """Describes a kernel as XLA reads it: `CudnnfMHABackendConfig` in backend_configs.proto."""
    batch, length, heads, width = q.shape
    scores = dict(
        element_type=_NAMES[q.dtype.name],
        dimensions=[str(n) for n in (batch, heads, length, k.shape[1])],
        tuple_shapes=[],
        layout=dict(
            dim_level_types=[],
            dim_unique=[],
            dim_ordered=[],
            minor_to_major=["3", "2", "1", "0"],
            tiles=[],
            element_size_in_bits="0",
            memory_space="0",
            index_primitive_type="PRIMITIVE_TYPE_INVALID",
            pointer_primitive_type="PRIMITIVE_TYPE_INVALID",
            dynamic_shape_metadata_prefix_bytes="0",
        ),
        is_dynamic_dimension=[False] * 4,
    )
    algorithm = dict(
        algo_id="0",
        math_type="TENSOR_OP_MATH",
        tuning_knobs={"17": "1", "24": "0"},
        is_cudnn_frontend=True,
        workspace_size="0",
    )
    attention = dict(
        algorithm=algorithm,
        fmha_scale=width**-0.5,
        intermediate_tensor_shape=scores,
        is_flash_attention=True,
        mask_type="PADDING_CAUSAL",
        **{f"{n}_dot_dimension_numbers": _axes(*axes) for n, axes in _PRODUCTS[name].items()},
        dropout_rate=0.0,
        seed=42,
        sliding_window_length=window or 0,
        max_seg_per_batch=most,
        is_paged_attention=False,
    )
    return dict(operation_queue_id="0", cudnn_fmha_backend_config=attention)


def _axes(contracted, batch):
    found = {}
    for side, axis, axes in zip(("lhs", "rhs"), contracted, batch, strict=True):
        found[f"{side}_contracting_dimensions"] = [str(axis)]
        found[f"{side}_batch_dimensions"] = [str(n) for n in axes]
    return found
