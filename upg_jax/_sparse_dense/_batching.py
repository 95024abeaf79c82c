"""vmap of the two primitives: always one call, never a copy of a plane per example."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._compat import Primitive, batching
from upg_jax._sparse_dense._primitive import Layout, bind, dense_sparse_p, sparse_dense_p


def _to_front(array: Any, axis: int | None, size: int) -> jax.Array:
    if axis is None:
        return jnp.broadcast_to(array, (size, *array.shape))
    return jnp.moveaxis(array, axis, 0)


def _rule(primitive: Primitive, args: Any, axes: Any, *, layout: Layout, backend: str) -> tuple[jax.Array, int]:
    x, scales, index, *planes = args
    x_axis, scales_axis, index_axis, *plane_axes = axes
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    params = {"layout": layout, "backend": backend}
    layers_mapped = any(axis is not None for axis in plane_axes)

    if scales_axis is not None and not layers_mapped:
        # Linear in scales: one product without them serves every example.
        scales = jnp.moveaxis(scales, scales_axis, 0)
        x, index = _to_front(x, x_axis, size), _to_front(index, index_axis, size)
        ones = jnp.ones(scales.shape[1:], jnp.float32)
        chosen = jax.vmap(lambda s, i: s[i])(scales, index)
        chosen = chosen.reshape(*index.shape, *[1] * (x.ndim - index.ndim - 1), layout.shape[0])
        if primitive is sparse_dense_p:
            return chosen * bind(primitive, x, ones, index, *planes, **params), 0
        return bind(primitive, x.astype(jnp.float32) * chosen, ones, index, *planes, **params), 0

    if layers_mapped:
        stack_size = scales.shape[0 if scales_axis != 0 else 1]
        scales, *planes = (
            _to_front(a, axis, size).reshape(size * stack_size, -1)
            if math.prod(a.shape)
            else jnp.zeros((size * stack_size, a.shape[-1] if axis != a.ndim - 1 else a.shape[-2]), a.dtype)
            for a, axis in zip((scales, *planes), (scales_axis, *plane_axes), strict=True)
        )
        index = _to_front(index, index_axis, size)
        offsets = stack_size * jnp.arange(size, dtype=index.dtype)
        index, index_axis = index + offsets.reshape(size, *[1] * (index.ndim - 1)), 0

    if index_axis is not None:
        x, index = _to_front(x, x_axis, size), jnp.moveaxis(index, index_axis, 0)
        return bind(primitive, x, scales, index, *planes, **params), 0

    out_axis = index.ndim
    x = jnp.moveaxis(x, x_axis, out_axis)
    return bind(primitive, x, scales, index, *planes, **params), out_axis


def _register(primitive: Primitive) -> None:
    batching.primitive_batchers[primitive] = lambda args, axes, **params: _rule(primitive, args, axes, **params)


_register(sparse_dense_p)
_register(dense_sparse_p)
