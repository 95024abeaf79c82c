"""The lowering on platform "cpu": XLA custom calls of the compiled kernels.

The calls take the primitives' operands as they are, so that stacks and group indices are read in place. XLA is asked
for row-major operands and results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax import _native
from upg_jax._native._conversion import INDEX_NUMBERS
from upg_jax._sparse_dense._primitive import Layout

_ELEMENTS = (jnp.float32, jnp.bfloat16, jnp.float16)


def custom_call(
    target: str, scratch_floats: Callable[[_native.Library, Any, Layout], int] | None = None
) -> Callable[..., Any]:
    """Returns the lowering rule that makes a custom call.

    Args:
        target: name of the call.
        scratch_floats: from the operands' avals, how long a float32 buffer the call works in. It is one more
            result, so that XLA plans and reuses it like any other buffer.
    """

    def lower(ctx: Any, *operands: Any, layout: Layout) -> Any:
        results = list(ctx.avals_out)
        if scratch_floats is not None:
            library = _native.load()
            assert library is not None
            scratch = jax.core.ShapedArray((scratch_floats(library, ctx.avals_in, layout),), jnp.float32)
            results.append(scratch)
        index = np.int32(INDEX_NUMBERS[layout.index])
        return jax.ffi.ffi_lowering(target)(ctx.replace(avals_out=results), *operands, index=index)[:1]

    return lower


def product_scratch(library: _native.Library, avals: Any, layout: Layout, *, transposed: bool) -> int:
    """Scratch memory of the two products, whose operands are `(x, scales, index, *planes)`."""
    x, _, index, _, values, *_ = avals
    rows, columns = layout.shape
    return library.scratch_floats(
        transposed=transposed,
        groups=math.prod(index.shape),
        vectors=math.prod(x.shape[len(index.shape) : -1]),
        rows=rows,
        columns=columns,
        capacity=values.shape[-1],
        index=layout.index,
    )


def unfit(avals: Any, layout: Layout) -> str | None:
    """Why the kernels do not take a call, if they do not."""
    if layout.value_bits != 8 and layout.index == "delta8":
        return (
            f"values of {layout.value_bits} bits have no compiled kernel with index 'delta8'; upg_jax.pack makes it "
            "'mask'"
        )
    if avals[0].dtype not in _ELEMENTS:
        return f"x is {avals[0].dtype}"
    if not all(isinstance(n, int) for aval in avals for n in aval.shape):
        return "shapes are symbolic"
    return None
