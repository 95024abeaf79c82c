"""`sparse_dense` with a layer that is cut into blocks: one product a device, and a sum where columns are cut."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from upg_jax._compat import explicit_sharding, manual_axes, reshard
from upg_jax._cut import PADDING, Cut, block_length, places, sources
from upg_jax._sharded import ShardedMdCSR
from upg_jax._sparse_dense._primitive import bind, operands, sparse_dense_p


def is_local(layer: ShardedMdCSR) -> bool:
    """Whether the caller is inside `jax.shard_map` over the layer's axis.

    Raises:
        ValueError: if it is, and the layer came in otherwise than by its specs.
    """
    if layer.axis not in manual_axes():
        return False
    if layer.block.row_pointers.shape[-1] != layer.block.out_features + 1:
        raise ValueError(
            f"sparse_dense: inside jax.shard_map over {layer.axis!r} a sharded layer must be this device's block; pass "
            "it as an argument, with layer.specs among in_specs"
        )
    return True


def product_of_block(
    x: jax.Array, layer: ShardedMdCSR, index: jax.Array, *, backend: str, dtype: str = "float32"
) -> jax.Array:
    """The product on one device, inside `jax.shard_map`: of its rows in `dtype`, or the float32 sum of all columns."""
    layout, scales, planes = operands(layer.block)
    rounded = {} if dtype == "float32" or layer.dim == "in" else {"dtype": dtype}
    y = bind(sparse_dense_p, x, scales, index, *planes, layout=layout, backend=backend, **rounded)
    return jax.lax.psum(y, layer.axis) if layer.dim == "in" else y


@functools.partial(jax.jit, static_argnames=("lead", "backend", "dtype"))
def mapped_product(
    x: jax.Array, layer: ShardedMdCSR, index: jax.Array, *, lead: tuple[Any, ...], backend: str, dtype: str
) -> jax.Array:
    """The product outside `jax.shard_map`, which it enters; in `dtype` or, of cut columns, in float32.

    Args:
        x: `(..., in_features)`.
        layer: the whole layer.
        index: as the primitive's.
        lead: the sharding of `x`'s leading dimensions.
        backend: as the primitive's.
        dtype: as the primitive's.
    """
    columns = layer.dim == "in"
    features = [None, layer.axis]
    x_spec = PartitionSpec(*lead, features[columns])
    y_spec = PartitionSpec(*lead, features[not columns])
    of_group = PartitionSpec(*lead[: index.ndim])

    def to(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        return reshard(array, NamedSharding(layer.mesh, spec))

    place = places(layer.cut)
    aligned = np.array_equal(place, np.arange(len(layer.cut) * block_length(layer.cut)))
    product = jax.shard_map(
        functools.partial(product_of_block, backend=backend, dtype=dtype),
        mesh=layer.mesh,
        in_specs=(x_spec, layer.specs, of_group),
        out_specs=y_spec,
    )
    if columns and not aligned:
        x = _side_by_side(to(x, PartitionSpec(*lead, None)), layer.cut, place)
    y = product(to(x, x_spec), layer, to(index, of_group))
    if columns or aligned:
        return y
    # No type says that devices have different numbers of features.
    return _in_order(to(y, PartitionSpec(*lead, None)), place)


def leading_spec(x: jax.Array, layer: ShardedMdCSR) -> tuple[Any, ...]:
    """The sharding of `x`'s leading dimensions, where its type tells.

    Raises:
        ValueError: if it is over the axis that the layer is sharded over.
    """
    sharding = explicit_sharding(x)
    if sharding is None:
        return (None,) * (x.ndim - 1)
    spec: list[Any] = list(sharding.spec)
    *lead, _ = spec + [None] * (x.ndim - len(spec))
    if any(layer.axis in (names if isinstance(names, tuple) else (names,)) for names in lead):
        raise ValueError(
            f"sparse_dense: only the last dimension of x may be sharded over the layer's axis {layer.axis!r}; got "
            f"{sharding.spec}; use jax.reshard on x first"
        )
    return tuple(lead)


def _side_by_side(x: jax.Array, cut: Cut, place: np.ndarray) -> jax.Array:
    """Features in the order of the blocks, with zeros for padding."""
    lead = [(0, 0)] * (x.ndim - 1)
    if _in_front(place):
        return jnp.pad(x, [*lead, (0, len(cut) * block_length(cut) - place.size)])
    assert PADDING == -1
    return jnp.pad(x, [*lead, (0, 1)])[..., sources(cut)]


def _in_order(y: jax.Array, place: np.ndarray) -> jax.Array:
    """Features of the blocks in the matrix's order."""
    return y[..., : place.size] if _in_front(place) else y[..., place]


def _in_front(place: np.ndarray) -> bool:
    """Whether blocks are in the matrix's order, with all padding behind."""
    return np.array_equal(place, np.arange(place.size))
