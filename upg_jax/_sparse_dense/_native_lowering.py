"""The lowering on platform "cpu": XLA custom calls of the compiled kernels.

The call takes the primitives' operands as they are, so that stacks and group indices are read in place, and one more
result: scratch memory, which XLA plans and reuses like any other buffer. XLA is asked for row-major operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax import _native
from upg_jax._compat import Primitive, mlir
from upg_jax._errors import BackendError
from upg_jax._sparse_dense._primitive import Layout, dense_sparse_p, sparse_dense_p

_TARGETS = {sparse_dense_p: _native.SPARSE_DENSE, dense_sparse_p: _native.DENSE_SPARSE}
_ELEMENTS = (jnp.float32, jnp.bfloat16, jnp.float16)


def register(primitive: Primitive, reference: Callable[..., Any]) -> None:
    """Registers the native lowering where the library is loaded; `reference` is the rule to fall back to."""
    library = _native.load()
    if library is None:
        return
    target = _TARGETS[primitive]

    def lower(ctx: Any, *operands: Any, layout: Layout, backend: str) -> Any:
        x, _, index, _, values, *_ = ctx.avals_in
        (y,) = ctx.avals_out
        if backend == "reference":
            return reference(ctx, *operands, layout=layout, backend=backend)
        if reason := _unfit(ctx.avals_in):
            if backend == "native":
                raise BackendError(f"backend 'native' cannot be used here: {reason}; use 'auto' or 'reference'")
            return reference(ctx, *operands, layout=layout, backend=backend)
        rows, columns = layout.shape
        scratch = library.scratch_floats(
            transposed=primitive is dense_sparse_p,
            groups=math.prod(index.shape),
            vectors=math.prod(x.shape[len(index.shape) : -1]),
            rows=rows,
            columns=columns,
            capacity=values.shape[-1],
        )
        ctx = ctx.replace(avals_out=[y, y.update(shape=(scratch,), dtype=jnp.dtype("float32"))])
        return jax.ffi.ffi_lowering(target)(ctx, *operands)[:1]

    mlir.register_lowering(primitive, lower, platform="cpu")


def _unfit(avals: Any) -> str | None:
    if avals[0].dtype not in _ELEMENTS:
        return f"x is {avals[0].dtype}"
    if not all(isinstance(n, int) for aval in avals for n in aval.shape):
        return "shapes are symbolic"
    return None
