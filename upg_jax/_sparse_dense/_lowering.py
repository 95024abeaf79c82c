"""Registers what the primitives lower to on each platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from upg_jax import _cuda, _native
from upg_jax._compat import Primitive, explicit_sharding, in_auto_mode, mlir
from upg_jax._errors import BackendError
from upg_jax._sparse_dense import (
    _cuda_lowering,
    _metal_lowering,
    _narrow_lowering,
    _native_lowering,
    _reference,
)
from upg_jax._sparse_dense._decode import decode_p
from upg_jax._sparse_dense._primitive import Layout, dense_sparse_p, sparse_dense_p


def _unsharded(implementation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A product whose operands' types say nothing of a mesh, as they do where vmap is over a sharded axis."""

    @functools.wraps(implementation)
    def product(x: jax.Array, *args: jax.Array, **params: Any) -> jax.Array:
        sharding = explicit_sharding(x)
        if sharding is None:
            return implementation(x, *args, **params)
        spec: list[Any] = list(sharding.spec)
        *lead, _ = spec + [None] * (x.ndim - len(spec))
        return in_auto_mode(functools.partial(implementation, **params), sharding, [*lead, None])(x, *args)

    return product


def _register(
    primitive: Primitive,
    implementation: Callable[..., jax.Array],
    target: str,
    operation: str,
    narrow: Callable[..., jax.Array],
    on_nvidia: Callable[..., jax.Array],
    scratch: Callable[..., int] | None = None,
) -> None:
    """The default lowering is pure HLO, so that it runs under plugins that refuse custom calls."""
    compiled_once = jax.jit(implementation, static_argnames="layout")

    def default(*args: Any, layout: Layout, backend: str) -> jax.Array:
        if backend not in ("auto", "reference"):
            raise BackendError(
                f"backend {backend!r} cannot be used here: it has no kernels for the platform this program is "
                "compiled for; use 'auto' or 'reference'"
            )
        return compiled_once(*args, layout=layout)

    anywhere = mlir.lower_fun(default, multiple_results=False)
    native = _native_lowering.custom_call(target, scratch)
    native_narrow = mlir.lower_fun(narrow, multiple_results=False)

    def on_cpu(ctx: Any, *args: Any, layout: Layout, backend: str) -> Any:
        if _native.load() is None or backend not in ("auto", "native"):
            return anywhere(ctx, *args, layout=layout, backend=backend)
        if reason := _native_lowering.unfit(ctx.avals_in, layout):
            if backend == "native":
                raise BackendError(
                    f"backend 'native' cannot be used here: {reason}; use 'auto' or 'reference'"
                )
            return anywhere(ctx, *args, layout=layout, backend=backend)
        kernels = native if layout.value_bits == 8 else native_narrow
        return kernels(ctx, *args, layout=layout)

    rounded = mlir.lower_fun(
        lambda *args, dtype, **params: primitive.bind(*args, **params).astype(dtype), multiple_results=False
    )

    def rounding(rule: Callable[..., Any]) -> Callable[..., Any]:
        def lower(ctx: Any, *args: Any, **params: Any) -> Any:
            return (rounded if "dtype" in params else rule)(ctx, *args, **params)

        return lower

    on_any_cpu = rounding(_metal_lowering.lowering(operation, on_cpu))
    mlir.register_lowering(primitive, rounding(anywhere))
    mlir.register_lowering(primitive, on_any_cpu, platform="cpu")
    mlir.register_lowering(primitive, _cuda_lowering.lowering(on_nvidia, rounding(anywhere)), platform="cuda")


# Now, since a saved program may be run that lowers nothing.
_native.load()
_cuda.load()
for _primitive, _target, _operation, _transposed in (
    (sparse_dense_p, _native.SPARSE_DENSE, _metal_lowering.PRODUCTS, False),
    (dense_sparse_p, _native.DENSE_SPARSE, _metal_lowering.TRANSPOSED, True),
):
    _register(
        _primitive,
        _unsharded(getattr(_reference, _primitive.name)),
        _target,
        _operation,
        _unsharded(getattr(_narrow_lowering, _primitive.name)),
        _unsharded(getattr(_cuda_lowering, _primitive.name)),
        functools.partial(_native_lowering.product_scratch, transposed=_transposed),
    )
_register(
    decode_p,
    _reference.decode,
    _native.DECODE,
    _metal_lowering.DECODE,
    _narrow_lowering.decode,
    _cuda_lowering.decode,
)
