"""What platform "cpu" computes for layers with values of fewer than 8 bits, whose index is a mask, or dense.

A few vectors meet a row's levels as the compiled kernel unpacks them; for more, it decodes the levels, and XLA
multiplies.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax import _native
from upg_jax._native._conversion import INDEX_NUMBERS
from upg_jax._sparse_dense._primitive import Layout
from upg_jax._sparse_dense._reference import by_group

_MOST_VECTORS = 8  # kVectorsOfWholeRows in slabs.h


def sparse_dense(
    x: jax.Array, scales: jax.Array, index: jax.Array, *planes: jax.Array, layout: Layout
) -> jax.Array:
    """`x @ W.T` in float32; operands as in `_primitive`."""
    rows, columns = layout.shape
    vectors = math.prod(x.shape[index.ndim : -1])
    if vectors > _MOST_VECTORS:
        return by_group(_many, rows, x, scales, index, planes, layout)
    library = _native.load()
    assert library is not None
    floats = library.scratch_floats(
        transposed=False,
        groups=index.size,
        vectors=vectors,
        rows=rows,
        columns=columns,
        capacity=planes[1].shape[-1] * 8 // layout.value_bits,
        index=layout.index,
    )
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*x.shape[:-1], rows), (floats,))]
    return jax.ffi.ffi_call(_native.SPARSE_DENSE_NARROW, results)(
        x, scales, index, *planes, **_attributes(layout)
    )[0]


def dense_sparse(
    g: jax.Array, scales: jax.Array, index: jax.Array, *planes: jax.Array, layout: Layout
) -> jax.Array:
    """`g @ W` in float32; operands as in `_primitive`."""
    return by_group(_many_transposed, layout.shape[1], g, scales, index, planes, layout)


def decode(scales: jax.Array, *planes: jax.Array, layout: Layout) -> jax.Array:
    """`W` in float32, of every layer."""
    result = jax.ShapeDtypeStruct((scales.shape[0], *layout.shape), jnp.float32)
    return jax.ffi.ffi_call(_native.DECODE_NARROW, result)(scales, *planes, **_attributes(layout))


def _attributes(layout: Layout) -> dict[str, Any]:
    assert layout.group_size is not None
    return {
        "index": np.int32(INDEX_NUMBERS[layout.index]),
        "bits": np.int32(layout.value_bits),
        "group_size": np.int32(layout.group_size),
    }


def _levels(planes: Any, layout: Layout) -> jax.Array:
    ones = jnp.ones((1, layout.shape[0]), jnp.float32)
    return decode(ones, *(plane[None] for plane in planes), layout=layout)[0]


def _many(x: jax.Array, scales: jax.Array, planes: Any, layout: Layout) -> jax.Array:
    return jnp.dot(x, _levels(planes, layout).T, precision=lax.Precision.HIGHEST) * scales[None]


def _many_transposed(g: jax.Array, scales: jax.Array, planes: Any, layout: Layout) -> jax.Array:
    return jnp.dot(g * scales[None], _levels(planes, layout), precision=lax.Precision.HIGHEST)
