"""Grouped-query attention over fresh keys or over the part of a cache that is filled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax.models._cache import LayerBuffers, read


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
    kv_heads, length = k.shape[1:3]
    # One matrix of queries per key head: XLA's CPU backend runs this as a plain batched product, and with more
    # dimensions half as fast. In float32 also for bfloat16, of which it lacks some products.
    groups = (
        q.reshape(batch, tokens, kv_heads, -1, dim).transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim)
    )
    groups, k, v = (x.astype(jnp.float32) for x in (groups, k, v))
    scores = jnp.einsum("bkqd,bksd->bkqs", groups, k, precision="highest") * dim**-0.5
    visible = jnp.arange(length)[None, None] <= positions[:, :, None]
    visible = jnp.repeat(visible, heads // kv_heads, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, v, precision="highest").astype(q.dtype)
    out = out.reshape(batch, kv_heads, tokens, -1, dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, tokens, heads * dim)


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
    one_of = keys[0] if isinstance(keys, tuple) else keys
    windows = window_lengths(one_of.shape[-2], q.shape[1], isinstance(keys, tuple))
    branches = [
        lambda length=length: attend(q, read(keys, layer, length), read(values, layer, length), positions)
        for length in windows
    ]
    return lax.switch(jnp.sum(filled > jnp.asarray(windows[:-1], jnp.int32)), branches)


def window_lengths(capacity: int, tokens: int, unrolled: bool) -> list[int]:
    """Lengths to attend over, ending with the capacity; none too short for `tokens` new ones.

    64, 96, 128, 192, and so on, or only the powers of two where each layer would compile all of them again.
    """
    lengths = [
        length << k for k in range(capacity.bit_length()) for length in ((64,) if unrolled else (64, 96))
    ]
    return [*(length for length in lengths if tokens <= length < capacity), capacity]
