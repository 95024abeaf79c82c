"""`MdCSR` -> dense matrix."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._mdcsr import MdCSR
from upg_jax._sparse_dense import _reference
from upg_jax._sparse_dense._primitive import Layout, operands


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def _decode(scales: jax.Array, planes: tuple[jax.Array, ...], *, layout: Layout, dtype: Any) -> jax.Array:
    levels = jax.lax.map(
        lambda layer: _reference.decode_levels(*layer, layout=layout), jax.lax.optimization_barrier(planes)
    )
    # Scaled outside the walk, so that the gradient of a decoded matrix reaches the scales.
    return (jax.lax.stop_gradient(levels) * scales[..., None]).astype(dtype)


def to_dense(layer: MdCSR, dtype: Any | None = None) -> jax.Array:
    """See `MdCSR.to_dense`."""
    layout, scales, planes = operands(layer)
    dtype = jnp.dtype(layer.dtype if dtype is None else dtype)
    dense = _decode(scales, tuple(planes), layout=layout, dtype=dtype)
    return dense if layer.stack_size is not None else dense[0]
