"""Registers what the primitives lower to on each platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from upg_jax import _native
from upg_jax._compat import Primitive, mlir
from upg_jax._errors import BackendError
from upg_jax._sparse_dense import _native_lowering, _reference
from upg_jax._sparse_dense._decode import decode_p
from upg_jax._sparse_dense._primitive import Layout, dense_sparse_p, sparse_dense_p


def _register_reference(primitive: Primitive, implementation: Callable[..., jax.Array]) -> Callable[..., Any]:
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

    mlir.register_lowering(primitive, mlir.lower_fun(default, multiple_results=False))
    return mlir.lower_fun(reference, multiple_results=False)


for _primitive, _implementation, _target, _transposed in (
    (sparse_dense_p, _reference.sparse_dense, _native.SPARSE_DENSE, False),
    (dense_sparse_p, _reference.dense_sparse, _native.DENSE_SPARSE, True),
):
    _native_lowering.register(
        _primitive,
        _target,
        _register_reference(_primitive, _implementation),
        functools.partial(_native_lowering.product_scratch, transposed=_transposed),
    )
_native_lowering.register(decode_p, _native.DECODE, _register_reference(decode_p, _reference.decode))
