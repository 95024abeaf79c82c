"""Registers what the primitives lower to on each platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from upg_jax._compat import Primitive, mlir
from upg_jax._sparse_dense import _reference
from upg_jax._sparse_dense._primitive import Layout, dense_sparse_p, sparse_dense_p


def _register_reference(primitive: Primitive, implementation: Callable[..., jax.Array]) -> None:
    """The default lowering: pure HLO, so that it runs under plugins that refuse custom calls."""
    compiled_once = jax.jit(implementation, static_argnames="layout")

    def lowered(*args: Any, layout: Layout, backend: str) -> jax.Array:
        return compiled_once(*args, layout=layout)

    mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=False))


_register_reference(sparse_dense_p, _reference.sparse_dense)
_register_reference(dense_sparse_p, _reference.dense_sparse)
