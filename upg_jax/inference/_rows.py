"""Rows of a batch's caches: repeated for several answers to one prompt, and moved into a batch that is running."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax.models import KVCache

_BLOCK = 64


@partial(jax.jit, static_argnames="n")
def repeat_rows(logits: jax.Array, cache: KVCache, n: int) -> tuple[jax.Array, KVCache]:
    """Repeats each sequence `n` times; the copies lie together."""
    keys, values = (
        jax.tree.map(lambda buffer: jnp.repeat(buffer, n, axis=_axis(buffer)), buffers)
        for buffers in (cache.keys, cache.values)
    )
    lengths = jnp.repeat(cache.lengths, n)
    return jnp.repeat(logits, n, axis=0), dataclasses.replace(
        cache, keys=keys, values=values, lengths=lengths
    )


def replace_row(cache: KVCache, row: jax.Array, one: KVCache) -> KVCache:
    """Puts the only sequence of `one`, a cache of the same capacity, in a row's place; copies what is filled."""

    def insert(into: jax.Array, buffer: jax.Array) -> jax.Array:
        length = buffer.shape[-2]
        block = min(_BLOCK, length)

        def copy(i: Any, into: jax.Array) -> jax.Array:
            at = jnp.minimum(i * block, length - block)
            part = lax.dynamic_slice_in_dim(buffer, at, block, axis=buffer.ndim - 2)
            start = [jnp.zeros((), jnp.int32)] * buffer.ndim
            start[_axis(buffer)], start[-2] = row, at
            return lax.dynamic_update_slice(into, part, start)

        filled = jnp.minimum(one.lengths[0], length)
        return lax.fori_loop(0, (filled + block - 1) // block, copy, into)

    keys, values = (
        jax.tree.map(insert, into, buffers)
        for into, buffers in ((cache.keys, one.keys), (cache.values, one.values))
    )
    return dataclasses.replace(
        cache, keys=keys, values=values, lengths=cache.lengths.at[row].set(one.lengths[0])
    )


def _axis(buffer: jax.Array) -> int:
    """Where a cache's buffers, `(..., batch, kv_heads, length, head_dim)`, have their sequences."""
    return buffer.ndim - 4
