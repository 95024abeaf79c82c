"""Registers what the primitives lower to on each platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from upg_jax import _cuda, _native
from upg_jax._compat import Primitive, mlir
from upg_jax._errors import BackendError
from upg_jax._sparse_dense import _cuda_lowering, _metal_lowering, _native_lowering, _reference
from upg_jax._sparse_dense._decode import decode_p
from upg_jax._sparse_dense._primitive import Layout, dense_sparse_p, sparse_dense_p


def _register(
    primitive: Primitive,
    implementation: Callable[..., jax.Array],
    target: str,
    operation: str,
    on_nvidia: Callable[..., jax.Array],
    scratch: Callable[..., int] | None = None,
) -> None:
    """The default lowering is pure HLO, so that it runs under plugins that refuse custom calls."""
    compiled_once = jax.jit(implementation, static_argnames="layout")

    def reference(*args: Any, layout: Layout, backend: str) -> jax.Array:
        return compiled_once(*args, layout=layout)

    def default(*args: Any, layout: Layout, backend: str) -> jax.Array:
        if backend not in ("auto", "reference"):
            raise BackendError(
                f"backend {backend!r} cannot be used here: it has no kernels for the platform this program is "
                "compiled for; use 'auto' or 'reference'"
            )
        return compiled_once(*args, layout=layout)

    anywhere = mlir.lower_fun(default, multiple_results=False)
    native = _native_lowering.lowering(target, mlir.lower_fun(reference, multiple_results=False), scratch)

    def on_cpu(ctx: Any, *args: Any, layout: Layout, backend: str) -> Any:
        rule = native if native and backend != "cuda" else anywhere
        return rule(ctx, *args, layout=layout, backend=backend)

    mlir.register_lowering(primitive, anywhere)
    mlir.register_lowering(primitive, _metal_lowering.lowering(operation, on_cpu), platform="cpu")
    mlir.register_lowering(primitive, _cuda_lowering.lowering(on_nvidia, anywhere), platform="cuda")


_cuda.load()
for _primitive, _implementation, _target, _on_nvidia, _transposed in (
    (sparse_dense_p, _reference.sparse_dense, _native.SPARSE_DENSE, _cuda_lowering.sparse_dense, False),
    (dense_sparse_p, _reference.dense_sparse, _native.DENSE_SPARSE, _cuda_lowering.dense_sparse, True),
):
    _register(
        _primitive,
        _implementation,
        _target,
        _metal_lowering.TRANSPOSED if _transposed else _metal_lowering.PRODUCTS,
        _on_nvidia,
        functools.partial(_native_lowering.product_scratch, transposed=_transposed),
    )
_register(decode_p, _reference.decode, _native.DECODE, _metal_lowering.DECODE, _cuda_lowering.decode)
