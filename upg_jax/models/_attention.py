"""Grouped-query attention over fresh keys, or over what a cache holds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax.models._cache import positions_in, read, write
from upg_jax.models._native_attention import attend_position, fits

# A GPU reads this many keys faster than it chooses how many to read.
_SHORTEST_ON_GPU = 1024
# Queries that share their keys: fewer read less, and are more products.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Scores:
    """How queries and keys become weights.

    Attributes:
        scale: what their products are multiplied by.
        cap: limits them to +-cap by a hyperbolic tangent; None leaves them.
        window: positions that a query sees, its own included; None if it sees all before it.
    """

    scale: float
    cap: float | None = None
    window: int | None = None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    key_positions: jax.Array,
    scores: Scores,
    *,
    widen: bool = True,
) -> jax.Array:
    """Causal attention, accumulated in float32.

    Args:
        q: `(batch, tokens, heads, head_dim)`.
        k: `(batch, kv_heads, length, head_dim)`.
        v: like `k`.
        positions: int32 `(batch, tokens)` of the queries.
        key_positions: int32 `(batch, length)`; negative where there is no key.
        scores: how they become weights.
        widen: multiply in float32. Otherwise in `q`'s dtype, to which weights are rounded: as tensor cores can.

    Returns:
        `(batch, tokens, heads * head_dim)` in `q`'s dtype.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    # One matrix of queries per key head: XLA's CPU backend runs this as a plain batched product, and with more
    # dimensions half as fast. It lacks some products of bfloat16.
    groups = (
        q.reshape(batch, tokens, kv_heads, -1, dim).transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim)
    )
    if widen:
        groups, k, v = (x.astype(jnp.float32) for x in (groups, k, v))
    einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    products = einsum("bkqd,bksd->bkqs", groups, k) * scores.scale
    if scores.cap is not None:
        products = jnp.tanh(products / scores.cap) * scores.cap
    behind = positions[:, :, None] - key_positions[:, None]
    visible = (behind >= 0) & (key_positions >= 0)[:, None]
    if scores.window is not None:
        visible &= behind < scores.window
    visible = jnp.repeat(visible, heads // kv_heads, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(visible, products, jnp.finfo(jnp.float32).min), axis=-1)
    out = einsum("bkqs,bksd->bkqd", weights.astype(v.dtype), v).astype(q.dtype)
    out = out.reshape(batch, kv_heads, tokens, -1, dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, tokens, heads * dim)


def attend_fresh(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, scores: Scores) -> jax.Array:
    """`attend` of tokens to themselves; `positions` count from 0 in each row.

    In blocks of queries, which read no key that none of them sees: half of the work for long sequences.

    Args:
        q: `(batch, tokens, heads, head_dim)`.
        k: `(batch, tokens, kv_heads, head_dim)`.
        v: like `k`.
        positions: int32 `(batch, tokens)`.
        scores: how queries and keys become weights.
    """
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(start: int) -> jax.Array:
        end = min(start + _BLOCK, q.shape[1])
        first = 0 if scores.window is None else max(start + 1 - scores.window, 0)
        seen = (k[:, :, first:end], v[:, :, first:end])
        return attend(q[:, start:end], *seen, positions[:, start:end], positions[:, first:end], scores)

    return jnp.concatenate([block(start) for start in range(0, q.shape[1], _BLOCK)], axis=1)


def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    buffers: tuple[jax.Array, jax.Array],
    index: Any,
    past: jax.Array,
    counts: jax.Array,
    capacity: int,
    scores: Scores,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`attend` over what a layer's cache holds and new tokens, which are stored; reads little more than is filled.

    A decode step is bound by memory, and a cache is mostly empty when an answer begins: a kernel reads what is filled,
    and where there is none, which of a few static lengths is read is chosen at run time.

    Args:
        q: `(batch, tokens, heads, head_dim)`.
        k: `(batch, tokens, kv_heads, head_dim)`.
        v: like `k`.
        buffers: keys and values as in `KVCache`, those of this layer at `index`.
        index: integer, traced or not.
        past: int32 `(batch,)`, tokens that each sequence had before.
        counts: int32 `(batch,)`, how many of its new tokens are real.
        capacity: tokens that a sequence may have.
        scores: how queries and keys become weights.

    Returns:
        What `attend` does, and the buffers with the new tokens.
    """
    tokens, length = q.shape[1], buffers[0].shape[-2]
    positions = past[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    full = jnp.minimum(past + counts, capacity)
    stored = positions < full[:, None]
    overwrites = tokens > 1 and length < capacity
    if overwrites:
        stored &= positions >= full[:, None] - length
    targets = jnp.where(stored, positions % length, length)

    if overwrites:
        # Some of what the new tokens overwrite is still seen by the first of them.
        out = _attend_filled((k, v), q, *buffers, index, positions, past, scores=scores)
        # XLA would copy the buffers of all layers for what reads them in no known order. It does not know this to be 0.
        targets = targets + (jnp.max(jnp.abs(out)) < 0).astype(jnp.int32)
    buffers = (write(buffers[0], index, k, targets), write(buffers[1], index, v, targets))
    if not overwrites:
        out = _attend_stored(q, *buffers, index, positions, full, scores)
    return out, buffers


def _attend_stored(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    index: Any,
    positions: jax.Array,
    filled: jax.Array,
    scores: Scores,
) -> jax.Array:
    """`_attend_filled` without fresh keys, by the fastest means."""
    arrays = (q, keys, values, index, positions, filled)
    pure = functools.partial(_attend_filled, None, scores=scores)
    if not fits(q, keys):
        return pure(*arrays)
    return attend_position(pure, *arrays, **dataclasses.asdict(scores))


def _attend_filled(fresh: tuple[jax.Array, jax.Array] | None, *arrays: Any, scores: Scores) -> jax.Array:
    """`attend` over the filled part of a layer's buffers, and over `fresh` keys and values of `positions` if given."""
    on = functools.partial(_attend_window, scores=scores)
    gpu = functools.partial(on, widen=False, shortest=_SHORTEST_ON_GPU)
    return lax.platform_dependent(fresh, *arrays, cuda=gpu, default=on)


def _attend_window(
    fresh: tuple[jax.Array, jax.Array] | None,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    index: Any,
    positions: jax.Array,
    filled: jax.Array,
    *,
    scores: Scores,
    widen: bool = True,
    shortest: int = 64,
) -> jax.Array:
    length = keys.shape[-2]

    def branch(n: int) -> jax.Array:
        k, v = read(keys, index, n), read(values, index, n)
        key_positions = positions_in(filled, n, length)
        if fresh is not None:
            k, v = (
                jnp.concatenate([x, new.swapaxes(1, 2)], axis=2) for x, new in zip((k, v), fresh, strict=True)
            )
            key_positions = jnp.concatenate([key_positions, positions], axis=1)
        return attend(q, k, v, positions, key_positions, scores, widen=widen)

    windows = window_lengths(length, q.shape[1] if fresh is None else 0, keys.shape[0] == 1, shortest)
    which = jnp.sum(jnp.max(filled) > jnp.asarray(windows[:-1], jnp.int32))
    return lax.switch(which, [lambda n=n: branch(n) for n in windows])


def window_lengths(capacity: int, tokens: int, unrolled: bool, shortest: int = 64) -> list[int]:
    """Lengths to attend over, ending with the capacity; none too short for `tokens` new ones.

    64, 96, 128, 192, and so on, or only the powers of two where each layer would compile all of them again.
    """
    steps = (shortest,) if unrolled else (shortest, shortest * 3 // 2)
    lengths = [length << k for k in range(capacity.bit_length()) for length in steps]
    return [*(length for length in lengths if tokens <= length < capacity), capacity]
