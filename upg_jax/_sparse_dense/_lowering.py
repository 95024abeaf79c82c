"""Registers what the primitives lower to on each platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from upg_jax import _native
from upg_jax._compat import Primitive, mlir
from upg_jax._errors import BackendError
from upg_jax._sparse_dense import _metal_lowering, _native_lowering, _reference
from upg_jax._sparse_dense._decode import decode_p
from upg_jax._sparse_dense._primitive import Layout, dense_sparse_p, sparse_dense_p


def _register(
    primitive: Primitive,
    implementation: Callable[..., jax.Array],
    target: str,
    operation: str,
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
    on_cpu = _native_lowering.lowering(target, mlir.lower_fun(reference, multiple_results=False), scratch)
    mlir.register_lowering(primitive, anywhere)
    mlir.register_lowering(primitive, _metal_lowering.lowering(operation, on_cpu or anywhere), platform="cpu")


for _primitive, _implementation, _target, _transposed in (
    (sparse_dense_p, _reference.sparse_dense, _native.SPARSE_DENSE, False),
    (dense_sparse_p, _reference.dense_sparse, _native.DENSE_SPARSE, True),
):
    _register(
        _primitive,
        _implementation,
        _target,
        _metal_lowering.TRANSPOSED if _transposed else _metal_lowering.PRODUCTS,
        functools.partial(_native_lowering.product_scratch, transposed=_transposed),
    )
_register(decode_p, _reference.decode, _native.DECODE, _metal_lowering.DECODE)
