"""`ShardedMdCSR`: a compressed matrix cut into blocks, one for each device along an axis of a mesh."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from upg_jax import _compat
from upg_jax._cut import (
    Cut,
    block_capacity,
    block_length,
    check_groups,
    even_cut,
    pieces_in_order,
    pieces_of,
    take_columns,
    take_rows,
)
from upg_jax._mdcsr import PLANES, Manifold, MdCSR, stack
from upg_jax._validate import check_sizes

Dim: TypeAlias = Literal["out", "in"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ShardedMdCSR:
    """A compressed matrix, or a stack of them, cut by rows (`dim="out"`) or by columns (`"in"`); see `shard`.

    `sparse_dense` takes it like an `MdCSR`, under jit or not. Inside a `jax.shard_map` over `axis` whose `in_specs` has
    `specs` for it, `sparse_dense` uses the device's block.

    Attributes:
        block: what each device has: a valid `MdCSR` of a block's `shape` inside `jax.shard_map`. Outside, its planes
            hold all blocks side by side along their last axis, sharded over `axis`; `scales` of a matrix that is cut
            by columns are whole, on every device.
        shape: static `(out_features, in_features)` of the whole matrix.
        mesh: static; the devices.
        axis: static; name of the mesh axis.
        dim: static; `"out"` or `"in"`, the features that are cut.
        cut: static; which of them each block has.
    """

    block: MdCSR
    shape: tuple[int, int]
    mesh: Mesh
    axis: str
    dim: Dim
    cut: Cut

    @property
    def specs(self) -> ShardedMdCSR:
        """A `PartitionSpec` for each leaf, for `in_specs` of `jax.shard_map`."""
        names = [plane for plane in PLANES if getattr(self.block, plane) is not None]
        specs: dict[str, Any] = {plane: self._spec(plane) for plane in names}
        return dataclasses.replace(self, block=dataclasses.replace(self.block, **specs))

    def _spec(self, plane: str) -> PartitionSpec:
        return plane_spec(plane, getattr(self.block, plane).ndim, self.axis, self.dim)

    @property
    def out_features(self) -> int:
        """Rows of the whole matrix."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the whole matrix."""
        return self.shape[1]

    @property
    def manifold(self) -> Manifold:
        """As of `MdCSR`."""
        return self.block.manifold

    @property
    def index(self) -> str:
        """As of `MdCSR`."""
        return self.block.index

    @property
    def stack_size(self) -> int | None:
        """Layers in the stack; None for a single layer."""
        return self.block.stack_size

    @property
    def num_weights(self) -> int:
        """Weights of the dense matrix, summed over a stack."""
        return (self.stack_size or 1) * self.out_features * self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, padding included."""
        return self.block.nbytes

    def unshard(self) -> MdCSR:
        """Returns the whole matrix as one valid layer, with NumPy planes; what a file holds of it.

        Decodes to the same bits as what was cut. Planes are the same, too, but for zero tails, and of a matrix that was
        cut by columns if they were as encoders make them.

        Raises:
            ValueError: if some blocks lie on devices of other processes, or under a JAX transformation.
        """
        _need_concrete(self.block, "ShardedMdCSR.unshard", "take the layer out of it")
        if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(self.block)):
            raise ValueError(
                "ShardedMdCSR.unshard: all blocks must lie in this process; some lie in others; read the file that the "
                "layer came from instead"
            )
        whole = jax.tree.map(np.asarray, self.block)
        return _each_layer(whole, self._joined)

    def _joined(self, planes: MdCSR) -> MdCSR:
        blocks = [self._nth(planes, i) for i in range(len(self.cut))]
        pieces = pieces_in_order(blocks, self.cut)
        return (take_rows if self.dim == "out" else take_columns)(pieces, blocks[0])

    def _nth(self, planes: MdCSR, i: int) -> MdCSR:
        def part(plane: str) -> Any:
            array = getattr(planes, plane)
            if array is None or (plane == "scales" and self.dim == "in"):
                return array
            return array[i * (array.size // len(self.cut)) :][: array.size // len(self.cut)]

        return dataclasses.replace(planes, **{plane: part(plane) for plane in PLANES})

    def to_dense(self, dtype: Any | None = None) -> jax.Array:
        """Decodes the whole matrix on the default device, as `MdCSR.to_dense`."""
        return self.unshard().to_dense(dtype)

    def __repr__(self) -> str:
        size = f"{self.out_features}x{self.in_features}"
        with contextlib.suppress(AttributeError):  # JAX builds pytrees with leaves of any kind
            size = size if self.stack_size is None else f"{self.stack_size} x [{size}]"
        return (
            f"ShardedMdCSR({size}, {self.dim} over {self.axis!r} in {len(self.cut)} blocks of "
            f"{self.block.shape[0]}x{self.block.shape[1]}, {self.manifold} manifold, index {self.index})"
        )


jax.tree_util.register_dataclass(
    ShardedMdCSR, data_fields=["block"], meta_fields=["shape", "mesh", "axis", "dim", "cut"]
)


def plane_spec(plane: str, ndim: int, axis: str, dim: Dim) -> PartitionSpec:
    """How a plane of blocks lies on the mesh."""
    if plane == "scales" and dim == "in":
        return PartitionSpec()
    return PartitionSpec(*[None] * (ndim - 1), axis)


def shard(layer: MdCSR, mesh: Mesh, axis: str, dim: Dim = "out") -> ShardedMdCSR:
    """Cuts a layer into a block for each device along a mesh axis, and places each on its device.

    `sparse_dense` with the result gathers no weights. With `dim="out"` (*column-parallel* in Megatron's words) each
    device computes its rows' outputs, which stay sharded over `axis`; with `"in"` (*row-parallel*) it multiplies its
    columns by its part of `x`, and the products are summed over `axis`. Features that do not divide evenly are padded
    in the last blocks. Weights keep their bits. Groups of columns that share a multiplier stay whole.

    Runs on the host, and holds little more than a block at a time besides what it has placed; planes may be
    memory-mapped. In a program of several processes each calls it with the same layer, reads its devices' rows alone
    (but all entries, to cut by columns), and places its own blocks.

    Args:
        layer: a valid layer or stack, with NumPy planes or JAX's.
        mesh: the devices. Along its other axes blocks are replicated.
        axis: name of the mesh axis.
        dim: the features to cut, `"out"` or `"in"`.

    Raises:
        TypeError: for a layer that is no `MdCSR`, a mesh that is no `jax.sharding.Mesh`, or an axis that is no name.
        ValueError: for an unknown axis or `dim`, a cut through a group of columns, or under a JAX transformation.
        FormatError: for planes that do not fit the layer's shape or each other.
        NotImplementedError: with a JAX too old for `jax.shard_map`.
    """
    if not isinstance(layer, MdCSR):
        raise TypeError(f"shard: layer must be an upg_jax.MdCSR; got {type(layer).__name__}")
    check_mesh("shard", mesh, axis)
    if dim not in ("out", "in"):
        raise ValueError(f"shard: dim must be 'out' or 'in'; got {dim!r}")
    size, multiple = (layer.out_features, 1) if dim == "out" else (layer.in_features, layer.group_size or 1)
    return shard_as(layer, mesh, axis, dim, even_cut(size, mesh.shape[axis], multiple))


def check_mesh(operation: str, mesh: Any, axis: Any) -> None:
    """Checks what users give as a mesh and the name of one of its axes."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"{operation}: mesh must be a jax.sharding.Mesh; got {type(mesh).__name__}; jax.make_mesh makes one"
        )
    if not isinstance(axis, str):
        raise TypeError(f"{operation}: axis must be the name of one of the mesh's axes, a str; got {axis!r}")
    if axis not in mesh.shape:
        raise ValueError(f"{operation}: axis must be one of the mesh's {tuple(mesh.shape)}; got {axis!r}")


def shard_as(layer: MdCSR, mesh: Mesh, axis: str, dim: Dim, cut: Cut) -> ShardedMdCSR:
    """`shard` with a cut of the caller's."""
    _compat.require_shard_map("shard")
    _need_concrete(layer, "shard", "shard the layer before")
    check_sizes(layer, "shard")
    if dim == "in":
        check_groups(cut, layer.group_size)
    host = jax.tree.map(np.asarray, layer)
    capacity = max((block_capacity(one, cut, dim) for one in _layers(host)), default=0)

    def block(i: int) -> MdCSR:
        def of_layer(one: MdCSR) -> MdCSR:
            pieces = pieces_of(one, cut[i])
            return (take_rows if dim == "out" else take_columns)(pieces, one, capacity)

        return _each_layer(host, of_layer)

    length = block_length(cut)
    shape = (length, layer.in_features) if dim == "out" else (layer.out_features, length)
    planes = _place(block, mesh, axis, dim)
    return ShardedMdCSR(
        block=dataclasses.replace(layer, **planes, shape=shape),
        shape=layer.shape,
        mesh=mesh,
        axis=axis,
        dim=dim,
        cut=cut,
    )


def _place(block: Callable[[int], MdCSR], mesh: Mesh, axis: str, dim: Dim) -> dict[str, Any]:
    """Makes blocks one after the other, each for its devices in this process."""
    at = mesh.axis_names.index(axis)
    devices_of: dict[int, list[Any]] = {}
    for where, device in np.ndenumerate(mesh.devices):
        if device.process_index == jax.process_index():
            devices_of.setdefault(where[at], []).append(device)
    placed: dict[str, list[jax.Array]] = {}
    for i, devices in devices_of.items():
        for plane, array in vars(block(i)).items():
            if plane in PLANES and array is not None:
                placed.setdefault(plane, []).extend(jax.device_put(array, device) for device in devices)
        jax.block_until_ready(placed)  # else blocks on their way to devices would gather on the host

    def whole(plane: str, parts: list[jax.Array]) -> jax.Array:
        *lead, last = parts[0].shape
        spec = plane_spec(plane, parts[0].ndim, axis, dim)
        shape = (*lead, last * mesh.shape[axis] if len(spec) else last)
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), parts)

    return {plane: whole(plane, parts) for plane, parts in placed.items()}


def _need_concrete(layer: MdCSR, operation: str, instead: str) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(layer)):
        raise ValueError(
            f"{operation}: needs concrete arrays; it was called under jit, vmap or grad; {instead}"
        )


def _layers(host: MdCSR) -> list[MdCSR]:
    if host.stack_size is None:
        return [host]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], host) for i in range(host.stack_size)]


def _each_layer(host: MdCSR, change: Callable[[MdCSR], MdCSR]) -> MdCSR:
    changed = list(map(change, _layers(host)))
    return changed[0] if host.stack_size is None else stack(changed)
