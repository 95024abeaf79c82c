"""Attention of one new position over a cache by the compiled kernel, where it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax import _native
from upg_jax._compat import unify_varying
from upg_jax._sparse_dense._backend import requested_backend

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MOST_DIM = 512  # as in `src/kernels.h`


def fits(q: jax.Array, keys: jax.Array) -> bool:
    """Whether the kernel takes `q (batch, tokens, heads, head_dim)` and a cache's `keys`, asked while tracing."""
    static = all(isinstance(n, int) for n in (*q.shape, *keys.shape))
    if not static or q.shape[1] != 1 or q.shape[-1] > _MOST_DIM:
        return False
    if q.dtype != keys.dtype or q.dtype not in _DTYPES:
        return False
    return requested_backend() in ("auto", "native") and _native.load() is not None


def attend_position(
    pure: Callable[..., jax.Array],
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    index: Any,
    positions: jax.Array,
    filled: jax.Array,
    *,
    scale: float,
    cap: float | None,
    window: int | None,
) -> jax.Array:
    """Runs the kernel on platform `cpu`, and `pure` elsewhere and for derivatives; both compute the same.

    Args:
        pure: takes the arrays that follow, and closes over no tracer.
        q: `(batch, 1, heads, head_dim)`, such that `fits`.
        keys: `(layers, batch, kv_heads, length, head_dim)`, position `p` at `p % length`; read where it lies.
        values: like `keys`.
        index: integer; which layer.
        positions: int32 `(batch, 1)` of the queries.
        filled: int32 `(batch,)`, how many positions each sequence has had.
        scale: what the products of queries and keys are multiplied by.
        cap: limits them to +-cap; None leaves them.
        window: positions that a query sees; None if all.

    Returns:
        `(batch, 1, heads * head_dim)` in `q`'s dtype; 0 for a query that sees nothing.
    """

    def kernel(q: jax.Array, keys: Any, values: Any, index: Any, positions: Any, filled: Any) -> jax.Array:
        batch, _, heads, dim = q.shape
        call = jax.ffi.ffi_call(
            _native.ATTEND, jax.ShapeDtypeStruct((batch, heads, dim), jnp.float32), vmap_method="sequential"
        )
        attributes = {
            "scale": np.float32(scale),
            "cap": np.float32(cap or 0),
            "window": np.int32(window or 0),
        }
        out = call(q[:, 0], keys, values, index, positions[:, 0], filled, **attributes)
        out, _ = unify_varying(out, q)
        return out.astype(q.dtype).reshape(batch, 1, heads * dim)

    @jax.custom_jvp
    def run(*arrays: Any) -> jax.Array:
        return lax.platform_dependent(*arrays, cpu=kernel, default=pure)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(pure, primals, tangents)

    return run(q, keys, values, jnp.asarray(index, jnp.int32), positions, filled)
