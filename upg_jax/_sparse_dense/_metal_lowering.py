"""The lowering on platform "cpu" to Metal kernels: on a Mac's GPU, or in the emulator on any machine.

CPU and GPU of a Mac share memory, so a program of JAX's CPU platform can hand its buffers to the GPU: an XLA custom
call launches the kernels and waits. Backend `emulator` runs the same calls over a stand-in for Metal. docs/apple.md has
the reasons, and what nobody has yet seen run.

`metal_ops` is imported when one of the two backends is asked for, or on a Mac.
"""

from __future__ import annotations

import math
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._compat import mlir
from upg_jax._errors import BackendError
from upg_jax._sparse_dense._primitive import Layout

BACKENDS = ("metal", "emulator")
PRODUCTS, TRANSPOSED, DECODE = "products", "transposed", "decode"
# With backend "auto", entries times vectors from which a product is worth a command buffer and a wait (docs/apple.md).
MIN_WORK = 4 * 2**20

_ELEMENTS = ("float32", "bfloat16", "float16")


def unavailable_reason(backend: str) -> str | None:
    """Says why `"metal"` or `"emulator"` cannot be used in this process; None where it can."""
    from upg_jax._sparse_dense import _metal_device

    return _metal_device.unavailable_reason(backend)


def device_name() -> str:
    """The name of this Mac's GPU."""
    from upg_jax._sparse_dense import _metal_device

    return _metal_device.device("metal").name


def is_apple_silicon() -> bool:
    """Whether this is macOS on arm64."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def gains(backend: str) -> bool:
    """Whether products launched together may cost less than one after the other."""
    return backend in BACKENDS or (
        backend == "auto" and is_apple_silicon() and not unavailable_reason("metal")
    )


def reads(entries: int, backend: str) -> bool:
    """Whether products of one vector with a layer of so many entries go to Metal kernels, if its index allows it."""
    return gains(backend) and (backend in BACKENDS or entries >= MIN_WORK)


def takes(ctx: Any, operation: str, avals: Sequence[Any], layouts: Sequence[Layout], backend: str) -> bool:
    """Whether an operation on platform "cpu" goes to Metal kernels, which are compiled then.

    Args:
        ctx: of the lowering.
        operation: decoding to dense is rare and stays with the CPU unless the backend is forced.
        avals: of the call's operands.
        layouts: of the layers.
        backend: as asked for.

    Raises:
        BackendError: if a backend of Metal kernels is forced that cannot do it.
        MetalError: if it is forced and a kernel does not compile.
    """
    forced = backend in BACKENDS
    if not forced and (operation == DECODE or not gains(backend)):
        return False
    if reason := _unfit(avals, layouts, operation):
        if forced:
            raise BackendError(
                f"backend {backend!r} cannot be used here: {reason}; use 'auto' or 'reference'"
            )
        return False
    entries = sum(aval.shape[-1] for aval in avals if aval.dtype == jnp.int8)
    if not forced and entries * math.prod(avals[0].shape[:-1]) < MIN_WORK:
        return False
    from upg_jax._sparse_dense import _metal_device

    try:
        _metal_device.prepare(operation, _device_of(backend), avals, ctx.avals_out)
    except Exception as error:
        if forced:
            raise
        warnings.warn(f"sparse_dense: the processor computes what the GPU would have: {error}", stacklevel=2)
        return False
    return True


def lowering(operation: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a lowering rule for a primitive over one layer.

    Args:
        operation: `PRODUCTS`, `TRANSPOSED` or `DECODE`.
        otherwise: the rule for what Metal kernels do not take.
    """

    def lower(ctx: Any, *operands: Any, layout: Layout, backend: str) -> Any:
        avals, ordered = ctx.avals_in, operands
        if operation != DECODE:
            # x, scales, index, *planes -> x, index, scales, *planes
            avals, ordered = ((a[0], a[2], a[1], *a[3:]) for a in (avals, operands))
        if not takes(ctx, operation, avals, [layout], backend):
            return otherwise(ctx, *operands, layout=layout, backend=backend)
        return lower_call(ctx, operation, avals, ordered, backend)

    return lower


def lower_call(ctx: Any, operation: str, avals: Sequence[Any], operands: Sequence[Any], backend: str) -> Any:
    """Lowers to the custom call of an operation that Metal kernels take."""
    from upg_jax._sparse_dense import _metal_device

    target = _metal_device.register(operation, _device_of(backend))
    results = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_out]

    def call(*operands: Any) -> Any:
        # Results begin as NaN: should an exception ever leave the handler (Python can raise one before its
        # first line runs), it would seem to have succeeded, and nothing else would tell.
        unwritten = [jnp.full(result.shape, jnp.nan, result.dtype) for result in results]
        aliases = {len(operands) + i: i for i in range(len(results))}
        return jax.ffi.ffi_call(target, results, input_output_aliases=aliases)(*operands, *unwritten)

    return mlir.lower_fun(call, multiple_results=True)(ctx.replace(avals_in=avals), *operands)


def _device_of(backend: str) -> str:
    return "metal" if backend == "auto" else backend


def _unfit(avals: Sequence[Any], layouts: Sequence[Layout], operation: str) -> str | None:
    if operation != DECODE and str(avals[0].dtype) not in _ELEMENTS:
        return f"x is {avals[0].dtype}"
    for layout in layouts:
        if layout.index != "delta8":
            return f"the layer's index is {layout.index!r}"
        if layout.value_bits != 8:
            return f"the layer's values have {layout.value_bits} bits"
    if not all(isinstance(n, int) for aval in avals for n in aval.shape):
        return "shapes are symbolic"
    return None
