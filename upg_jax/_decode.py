"""`MdCSR` -> dense matrix."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._mdcsr import MdCSR
from upg_jax._sparse_dense._backend import requested_backend
from upg_jax._sparse_dense._decode import decode_p
from upg_jax._sparse_dense._primitive import bind, operands


@functools.partial(jax.jit, static_argnames=("dtype", "backend"))
def _decode(layer: MdCSR, *, dtype: Any, backend: str) -> jax.Array:
    layout, scales, planes = operands(layer)
    dense = bind(decode_p, scales, *planes, layout=layout, backend=backend).astype(dtype)
    return dense if layer.stack_size is not None else dense[0]


def to_dense(layer: MdCSR, dtype: Any | None = None) -> jax.Array:
    """See `MdCSR.to_dense`."""
    dtype = jnp.dtype(layer.dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"to_dense: dtype must be floating-point, such as float32 or bfloat16; got {dtype}")
    return _decode(layer, dtype=dtype, backend=requested_backend())
