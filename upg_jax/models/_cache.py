"""The key-value cache: static shapes, one length per sequence, updated in place where the caller donates it."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax.models._config import DecoderConfig

LayerBuffers: TypeAlias = jax.Array | tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class KVCache:
    """Keys and values of the tokens that each sequence of a batch has seen.

    Sequences share the capacity and nothing else: each has its own length, so prompts of different lengths sit
    in one batch without padding between their tokens.

    Attributes:
        keys: `(layers, batch, kv_heads, capacity, head_dim)` where the model's layers run as one loop, else a
            tuple with one `(batch, kv_heads, capacity, head_dim)` array per layer. Rotated already.
        values: like `keys`.
        lengths: int32 `(batch,)`, tokens stored for each sequence; what lies beyond is never read.
    """

    keys: LayerBuffers
    values: LayerBuffers
    lengths: jax.Array

    @property
    def batch(self) -> int:
        """Sequences that the cache holds."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that each sequence may have."""
        return (self.keys if isinstance(self.keys, jax.Array) else self.keys[0]).shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.keys, self.values)))

    def __repr__(self) -> str:
        buffer = self.keys if isinstance(self.keys, jax.Array) else self.keys[0]
        return f"KVCache(batch={self.batch}, capacity={self.capacity}, {buffer.dtype}, {self.nbytes / 2**20:.1f} MiB)"


jax.tree_util.register_dataclass(KVCache, data_fields=["keys", "values", "lengths"], meta_fields=[])


def init_cache(config: DecoderConfig, batch: int, capacity: int, *, dtype: Any, stacked: bool) -> KVCache:
    """Returns an empty cache.

    Args:
        config: the model's.
        batch: sequences.
        capacity: tokens that each sequence may have, prompt and answer together.
        dtype: of keys and values; the activations' dtype.
        stacked: one array for all layers, for models whose layers run as one loop. Where they are unrolled, an
            array for each compiles in two thirds of the time and runs the same.
    """
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)

    def buffers() -> LayerBuffers:
        if stacked:
            return jnp.zeros((config.num_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    return KVCache(keys=buffers(), values=buffers(), lengths=jnp.zeros(batch, jnp.int32))


def write(buffers: LayerBuffers, layer: Any, new: jax.Array, positions: jax.Array) -> LayerBuffers:
    """Stores `new (batch, tokens, kv_heads, head_dim)` of one layer at `positions (batch, tokens)`.

    Positions at or beyond the capacity are dropped.
    """
    rows = jnp.arange(new.shape[0])[:, None]
    if isinstance(buffers, tuple):
        updated = buffers[layer].at[rows, :, positions].set(new, mode="drop")
        return (*buffers[:layer], updated, *buffers[layer + 1 :])
    return buffers.at[layer, rows, :, positions].set(new, mode="drop")


def read(buffers: LayerBuffers, layer: Any, length: int) -> jax.Array:
    """Returns the first `length` tokens of one layer, `(batch, kv_heads, length, head_dim)`."""
    if isinstance(buffers, tuple):
        return buffers[layer][:, :, :length]
    _, batch, heads, _, dim = buffers.shape
    zero = jnp.zeros((), jnp.int32)
    start = (jnp.asarray(layer, jnp.int32), zero, zero, zero, zero)
    return lax.dynamic_slice(buffers, start, (1, batch, heads, length, dim))[0]
