"""Registers what the primitives lower to on each platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from upg_jax._compat import Primitive, mlir
from upg_jax._errors import BackendError
from upg_jax._sparse_dense import _native_lowering, _reference
from upg_jax._sparse_dense._primitive import Layout, dense_sparse_p, sparse_dense_p


def _register(primitive: Primitive, implementation: Callable[..., jax.Array]) -> None:
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
    _native_lowering.register(primitive, mlir.lower_fun(reference, multiple_results=False))


_register(sparse_dense_p, _reference.sparse_dense)
_register(dense_sparse_p, _reference.dense_sparse)
