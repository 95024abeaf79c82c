"""`MdCSR` -> dense matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax import _native
from upg_jax._mdcsr import MdCSR
from upg_jax._native._conversion import INDEX_NUMBERS
from upg_jax._sparse_dense import _metal_lowering
from upg_jax._sparse_dense._backend import requested_backend
from upg_jax._sparse_dense._decode import decode_p
from upg_jax._sparse_dense._primitive import Layout, bind, operands


@functools.partial(jax.jit, static_argnames=("dtype", "backend"))
def _decode(layer: MdCSR, *, dtype: Any, backend: str) -> jax.Array:
    layout, scales, planes = operands(layer)

    def rounded(*arrays: jax.Array) -> jax.Array:
        return bind(decode_p, *arrays, layout=layout, backend=backend).astype(dtype)

    direct = dtype == jnp.bfloat16 and backend in ("auto", "native") and not _metal_lowering.gains(backend)
    if direct and layout.value_bits == 8 and _native.load() is not None:
        dense = _in_bfloat16(rounded, layout, scales, *planes)
    else:
        dense = rounded(scales, *planes)
    return dense if layer.stack_size is not None else dense[0]


def _in_bfloat16(rounded: Callable[..., jax.Array], layout: Layout, *arrays: jax.Array) -> jax.Array:
    """`rounded(*arrays)` without a float32 matrix on the way, where the compiled kernel runs."""

    def kernel(scales: jax.Array, *planes: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((scales.shape[0], *layout.shape), jnp.bfloat16)
        call = jax.ffi.ffi_call(_native.DECODE, result, vmap_method="sequential")
        return call(scales, *planes, index=np.int32(INDEX_NUMBERS[layout.index]))

    @jax.custom_jvp
    def run(*arrays: jax.Array) -> jax.Array:
        return lax.platform_dependent(*arrays, cpu=kernel, default=rounded)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(rounded, primals, tangents)

    return run(*arrays)


def to_dense(layer: MdCSR, dtype: Any | None = None) -> jax.Array:
    """See `MdCSR.to_dense`."""
    dtype = jnp.dtype(layer.dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"to_dense: dtype must be floating-point, such as float32 or bfloat16; got {dtype}")
    return _decode(layer, dtype=dtype, backend=requested_backend())
