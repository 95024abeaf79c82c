"""vmap of the two primitives: always one call, never a copy of a plane per example."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._compat import Primitive, batching
from upg_jax._sparse_dense._primitive import bind, dense_sparse_p, sparse_dense_p


def _to_front(array: Any, axis: int | None, size: int) -> jax.Array:
    if axis is None:
        return jnp.broadcast_to(array, (size, *array.shape))
    return jnp.moveaxis(array, axis, 0)


def _rule(primitive: Primitive, args: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    x, scales, index, *planes = args
    x_axis, scales_axis, index_axis, *plane_axes = axes
    if any(axis is not None for axis in plane_axes):
        size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
        stack_size = scales.shape[1 if scales_axis == 0 else 0]
        scales, *planes = (
            _merge_stacks(a, axis, size)
            for a, axis in zip((scales, *planes), (scales_axis, *plane_axes), strict=True)
        )
        index = _to_front(index, index_axis, size)
        offsets = stack_size * jnp.arange(size, dtype=index.dtype)
        index, index_axis = index + offsets.reshape(size, *[1] * (index.ndim - 1)), 0
    elif scales_axis is not None:
        dtype = params.pop("dtype", "float32")
        return _scales_mapped(primitive, args, axes, **params).astype(dtype), 0

    if index_axis is not None:
        index = jnp.moveaxis(index, index_axis, 0)
        x = _to_front(x, x_axis, index.shape[0])
        return bind(primitive, x, scales, index, *planes, **params), 0

    out_axis = index.ndim
    x = jnp.moveaxis(x, x_axis, out_axis)
    return bind(primitive, x, scales, index, *planes, **params), out_axis


def _merge_stacks(array: Any, axis: int | None, size: int) -> jax.Array:
    """`size` stacks of `(S, n)` -> one stack of `(size * S, n)`."""
    array = _to_front(array, axis, size)
    return array.reshape(math.prod(array.shape[:2]), array.shape[2])


def _scales_mapped(primitive: Primitive, args: Any, axes: Any, **params: Any) -> jax.Array:
    """Linear in scales: one product without them serves every example."""
    x, scales, index, *planes = args
    x_axis, scales_axis, index_axis, *_ = axes
    chosen = jax.vmap(lambda s, i: s[i], (scales_axis, index_axis))(scales, index)
    batch_ndim = x.ndim - (x_axis is not None) - (chosen.ndim - 1)
    chosen = jnp.expand_dims(chosen, range(chosen.ndim - 1, chosen.ndim - 1 + batch_ndim))
    ones = jnp.ones(scales.shape[:scales_axis] + scales.shape[scales_axis + 1 :], jnp.float32)

    def product(x: jax.Array, index: jax.Array) -> jax.Array:
        return bind(primitive, x, ones, index, *planes, **params)

    if primitive is dense_sparse_p:
        x = jnp.expand_dims(x, 0) if x_axis is None else jnp.moveaxis(x, x_axis, 0)
        return jax.vmap(product, (0, index_axis))(x.astype(jnp.float32) * chosen, index)
    if x_axis is None and index_axis is None:
        return jnp.expand_dims(product(x, index), 0) * chosen
    return jax.vmap(product, (x_axis, index_axis))(x, index) * chosen


def _register(primitive: Primitive) -> None:
    batching.primitive_batchers[primitive] = lambda args, axes, **params: _rule(
        primitive, args, axes, **params
    )


_register(sparse_dense_p)
_register(dense_sparse_p)
