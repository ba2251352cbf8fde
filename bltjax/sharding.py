"""Mesh axes, and how arrays are sharded over them; the only file that names mesh axes.

The mesh is always set (`jax.set_mesh(make_mesh(...))`) and its axes are Explicit: every array's
type carries its sharding, so a wrong layout is an error while tracing. One device is a (1, 1, 1)
mesh. Code elsewhere speaks of logical axes, and `spec` turns them into mesh axes:

    batch          data, fsdp   rows of a batch
    embed          fsdp         model width of a weight matrix; gathered just before use
    heads, ffn     tensor       attention heads, hidden feed-forward units
    hash_rows      data, fsdp   rows of the hash tables, where they divide (see `table_spec`)
    hash_features  tensor       features of the hash tables, where they divide
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, PartitionSpec, reshard

from bltjax.config import (
    TRAINING,
    BLTConfig,
    EntropyModelConfig,
    MeshConfig,
    RunConfig,
    TokenModelConfig,
    TransformerConfig,
)
from bltjax.config.model import SHARED_TABLE

MESH_AXES = ("data", "fsdp", "tensor")
_RULES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "ffn": "tensor",
    "hash_rows": ("data", "fsdp"),
    "hash_features": "tensor",
    None: None,
}


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> jax.sharding.Mesh:
    """Returns the (data, fsdp, tensor) mesh over `devices` (default: all).

    Where the devices are TPU slices, which a slower network joins, the data axis spans the slices:
    only gradients and rows of hash tables cross it. Raises ValueError when the sizes do not
    multiply to the number of devices, or the data axis does not split over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    slices = num_slices(devices)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data={sizes[0]} is not divisible by the {slices} slices of the devices: the "
            "other axes stay within a slice, lower fsdp or tensor"
        )
    within = (sizes[0] // slices, *sizes[1:])
    # Where no side of the chips' torus is as long as a mesh axis, a part of one will do.
    options = dict(devices=devices, allow_split_physical_axes=True)
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(within, **options)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), **options)
    return jax.sharding.Mesh(arranged, MESH_AXES, axis_types=(AxisType.Explicit,) * 3)


def abstract_mesh(config: MeshConfig, num_devices: int) -> jax.sharding.AbstractMesh:
    """Returns the mesh of `num_devices` devices that need not exist, to check types on."""
    sizes = mesh_sizes(config, num_devices)
    return jax.sharding.AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * 3)


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Returns sizes (data, fsdp, tensor) for the devices; raises ValueError where none fit."""
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    elif known != num_devices or -1 in sizes:
        raise ValueError(
            f"mesh={tuple(sizes)} (data, fsdp, tensor) does not fit {num_devices} "
            f"device(s): the sizes must multiply to {num_devices}, -1 fills one axis"
        )
    data, fsdp, tensor = sizes
    return data, fsdp, tensor


def num_slices(devices) -> int:
    """Returns the number of TPU slices that the devices belong to; 1 for other devices."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def local_mesh() -> jax.sharding.Mesh:
    """Returns a mesh of the devices of this process, each with rows of its own."""
    return make_mesh(MeshConfig(data=-1), jax.local_devices())


def check_layout(
    config: RunConfig, models: Iterable[str], mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
):
    """Raises ValueError where batches, hash updates or one of the models do not fit the mesh."""
    check_batch_sizes(config, mesh)
    check_hash_updates(config, mesh)
    for name in models:
        check_model(getattr(config, name), name, mesh)


def check_model(
    config: BLTConfig | EntropyModelConfig,
    name: str,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
):
    """Raises ValueError that lists all sizes of a model that do not split over the mesh.

    Widths must split over fsdp, heads and feed-forward units over tensor, large tables over chips.
    """
    found = [
        f"{name}.{size}={value} is not divisible by mesh.{axis}={mesh.shape[axis]}"
        for size, value, axis in _split_sizes(config)
        if value % mesh.shape[axis]
    ]
    if config.hash.sizes:
        rows, shards = config.hash.rows, num_row_shards(mesh)
        if rows >= SHARED_TABLE and rows % shards:
            found.append(
                f"the {rows} rows of a hash table ({name}.hash.vocab={config.hash.vocab}) do not "
                f"divide over mesh.data * mesh.fsdp={shards}"
            )
    if found:
        raise ValueError("; ".join(found) + ": change the model or the mesh")


def _split_sizes(config) -> Iterator[tuple[str, int, str]]:
    """Yields the name and value of each size of a model that is split, and the mesh axis."""
    for field in dataclasses.fields(config):
        stack = getattr(config, field.name)
        if isinstance(stack, TransformerConfig):
            yield f"{field.name}.dim", stack.dim, "fsdp"
            for size in ("num_heads", "kv_heads", "ffn_dim"):
                yield f"{field.name}.{size}", getattr(stack, size), "tensor"
    cross = config.cross_attention if isinstance(config, BLTConfig) else None
    if cross and (cross.encoder or cross.decoder):
        for side, heads in (("encoder", cross.encoder_heads), ("decoder", cross.decoder_heads)):
            for kind, number in zip(("heads", "kv heads"), heads, strict=True):
                yield f"cross_attention {side} {kind}", number, "tensor"
    if isinstance(config, TokenModelConfig) and config.hash.sizes:
        yield "hash_dim", config.hash_width, "fsdp"


def num_row_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns the number of parts that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec(*logical_axes: str | None) -> PartitionSpec:
    """Returns the PartitionSpec, on the mesh that is set, of an array with these logical axes."""
    return _present(*(_RULES[axis] for axis in logical_axes))


def _present(*entries) -> PartitionSpec:
    """Returns a PartitionSpec without mesh axes of size 1.

    They split nothing, and jax 0.12 loses them in types where a dimension has size 1 (one row).
    """
    sizes = jax.sharding.get_abstract_mesh().shape

    def kept(entry):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        return axes if len(axes) > 1 else axes[0] if axes else None

    return PartitionSpec(*map(kept, entries))


def batch_spec(ndim: int) -> PartitionSpec:
    """Returns the PartitionSpec of an activation [B, ...]: rows sharded, the rest whole."""
    return spec("batch", *(None,) * (ndim - 1))


def gather_weight(weight: jax.Array) -> jax.Array:
    """Returns a weight whole over fsdp, still split over tensor, as fully sharded training does.

    Callers cast it to the compute dtype first, so that half the bytes travel.
    """
    axes = jax.typeof(weight).sharding.spec
    return reshard(weight, PartitionSpec(*(None if axis == "fsdp" else axis for axis in axes)))


def num_weight_parts(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns the number of parts that `gather_weight` makes a weight whole from."""
    return mesh.shape["fsdp"]


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` [B, L] of a replicated table [V, E]: [B, L, E]."""
    return table.at[ids].get(out_sharding=batch_spec(ids.ndim + 1))


def table_spec(rows: int, dim: int) -> PartitionSpec:
    """Returns the PartitionSpec, on the mesh that is set, of hash tables [T, rows, dim].

    A chip owns its share of the rows of every table, and of the features where tensor splits them.
    An axis that does not divide is whole on every chip.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split_rows = rows % num_row_shards(mesh) == 0
    split_features = dim % mesh.shape["tensor"] == 0
    return spec(
        None, "hash_rows" if split_rows else None, "hash_features" if split_features else None
    )


def shard_rows(tree):
    """Shards the rows of a pytree of arrays [B, ...] over the mesh, inside jit or out."""
    return jax.tree.map(lambda x: reshard(x, batch_spec(jnp.ndim(x))), tree)


def rows_before(x: jax.Array) -> jax.Array:
    """Returns for each row of a batch [B, ...] the row before it, for the first one the last.

    Every device gets the whole batch meanwhile.
    """
    return shard_rows(jnp.roll(reshard(x, PartitionSpec()), 1, axis=0))


def one_per_shard(row: jax.Array) -> jax.Array:
    """Returns a batch with a copy of a row [L] per row shard, the smallest that a mesh holds."""
    rows = num_row_shards(jax.sharding.get_abstract_mesh())
    return shard_rows(jnp.broadcast_to(row, (rows, *row.shape)))


def first_row(batch: jax.Array) -> jax.Array:
    """Returns the first row of a batch, whole on every device."""
    return reshard(batch, PartitionSpec())[0]


def rows_of_process(num_rows: int) -> np.ndarray:
    """Returns which rows of a batch the devices of this process hold, in order."""
    mesh = jax.sharding.get_mesh()
    placed = jax.NamedSharding(mesh, batch_spec(1)).addressable_devices_indices_map((num_rows,))
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in placed.values()]))


def put_batch(batch):
    """Places a pytree of host arrays with rows sharded over the mesh.

    Each process gives its `rows_of_process`.
    """
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            jax.NamedSharding(mesh, batch_spec(x.ndim)), x
        ),
        batch,
    )


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Gathers int64 rows [B, K] on every process, each giving its `rows_of_process`."""
    halves = put_batch(np.ascontiguousarray(rows).view(np.int32))  # devices have no int64
    return np.ascontiguousarray(on_host(halves)).view(np.int64)


@jax.jit
def _whole(tree):
    return jax.tree.map(lambda x: reshard(x, PartitionSpec()), tree)


def on_host(tree):
    """Returns a pytree of sharded arrays as NumPy arrays, whole in every process."""
    return jax.tree.map(np.asarray, _whole(tree))


def put_whole(tree):
    """Places a pytree of host arrays, each whole on every device of the mesh."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(tree, jax.NamedSharding(mesh, PartitionSpec()))


def barrier(name: str):
    """Waits until all processes are here; all give the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def micro_batches(batch, count: int):
    """Splits a pytree of arrays [B, ...] into [count, B / count, ...]; no row leaves its device.

    Part i holds rows i, i + count, ... Rows stay sharded, over the second axis now.
    """

    def split(x):
        rows = len(x) // count
        spec = _present(_RULES["batch"], *(None,) * x.ndim)
        parts = jax.lax.reshape(x, (rows, count, *x.shape[1:]), out_sharding=spec)
        return jnp.swapaxes(parts, 0, 1)

    return jax.tree.map(split, batch)


def concrete(tree):
    """Gives ShapeDtypeStructs from `jax.eval_shape` shardings on the devices of the mesh."""
    mesh = jax.sharding.get_mesh()

    def place(x):
        # Scalars come out of eval_shape without a sharding.
        axes = x.sharding.spec if x.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, axes))

    return jax.tree.map(place, tree)


def check_batch_sizes(config: RunConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh):
    """Raises ValueError where the rows of a stage's batch do not divide over the mesh."""
    names = [TRAINING[stage] for stage in config.stages if stage in TRAINING]
    shards = num_row_shards(mesh)
    for name in names + ["evaluation"] * ("evaluate" in config.stages):
        size = getattr(config, name).batch_size
        parts = getattr(getattr(config, name), "accumulation_steps", 1)
        if size % (shards * parts):
            each = f" in each of {name}.accumulation_steps={parts} parts" if parts > 1 else ""
            raise ValueError(
                f"{name}.batch_size={size} is not divisible by the {shards} row shards of "
                f"mesh={dict(mesh.shape)}{each}: change one"
            )


def check_hash_updates(config: RunConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh):
    """Raises ValueError for sparse updates on several devices: touched rows are found on one."""
    for name in (TRAINING[stage] for stage in config.stages if stage in TRAINING):
        touched = getattr(config, name).optimizer.hash_updates == "touched"
        if touched and mesh.size > 1:
            raise ValueError(
                f"{name}.optimizer.hash_updates='touched' is for one device, and mesh="
                f"{dict(mesh.shape)} has {mesh.size}: choose 'dense', large batches read most rows"
            )
