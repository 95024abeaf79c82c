"""Grouped-query attention over fresh keys or over the part of a cache that is filled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax.models._cache import LayerBuffers, read

_SMALLEST_WINDOW = 64


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Causal attention, accumulated in float32.

    Args:
        q: `(batch, tokens, heads, head_dim)`.
        k: `(batch, kv_heads, length, head_dim)`; the key at index `s` is that of position `s`.
        v: like `k`.
        positions: int32 `(batch, tokens)`; a query sees the keys at its own position and before.

    Returns:
        `(batch, tokens, heads * head_dim)` in `q`'s dtype.
    """
    batch, tokens, heads, dim = q.shape
    groups = q.reshape(batch, tokens, k.shape[1], heads // k.shape[1], dim)
    # In float32 also where the cache is bfloat16, for which XLA's CPU backend lacks some of these products.
    groups, k, v = (x.astype(jnp.float32) for x in (groups, k, v))
    scores = jnp.einsum("btkgh,bksh->bkgts", groups, k, precision="highest")
    visible = jnp.arange(k.shape[2])[None, None, None, None] <= positions[:, None, None, :, None]
    weights = jax.nn.softmax(jnp.where(visible, scores * dim**-0.5, jnp.finfo(jnp.float32).min), axis=-1)
    out = jnp.einsum("bkgts,bksh->btkgh", weights, v, precision="highest")
    return out.astype(q.dtype).reshape(batch, tokens, heads * dim)


def attend_cached(
    q: jax.Array,
    keys: LayerBuffers,
    values: LayerBuffers,
    layer: Any,
    positions: jax.Array,
    filled: jax.Array,
) -> jax.Array:
    """`attend` over one layer of a cache, reading little more than its filled part.

    A decode step is bound by memory, and a cache is mostly empty when an answer begins: which of a few static
    window lengths is used is chosen at run time.

    Args:
        q: `(batch, tokens, heads, head_dim)`.
        keys: the cache's keys, all layers.
        values: the cache's values, all layers.
        layer: index of the layer.
        positions: int32 `(batch, tokens)`.
        filled: int32 scalar, at least the largest of the positions that matter, plus 1.
    """
    windows = window_lengths((keys[0] if isinstance(keys, tuple) else keys).shape[-2])
    branches = [
        lambda length=length: attend(q, read(keys, layer, length), read(values, layer, length), positions)
        for length in windows
    ]
    return lax.switch(jnp.sum(filled > jnp.asarray(windows[:-1], jnp.int32)), branches)


def window_lengths(capacity: int) -> list[int]:
    """Lengths to attend over: doubling from 64 up to the capacity."""
    lengths = []
    length = _SMALLEST_WINDOW
    while length < capacity:
        lengths.append(length)
        length *= 2
    return [*lengths, capacity]
