"""The key-value cache: static shapes, one length per sequence, updated in place where the caller donates it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax.models._config import DecoderConfig


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class KVCache:
    """Keys and values of the tokens that each sequence of a batch has seen.

    Sequences share the capacity and nothing else: each has its own length, so prompts of different lengths sit
    in one batch without padding between their tokens.

    Attributes:
        keys: arrays `(layers, batch, kv_heads, length, head_dim)`, rotated already: one for each of the model's kinds
            of layers where they run as a loop, else one for each layer. The length is the capacity, or a sliding
            window where that is shorter; position `p` is stored at `p % length`.
        values: like `keys`.
        lengths: int32 `(batch,)`, tokens that each sequence has; what lies beyond is never read.
        capacity: tokens that each sequence may have.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    capacity: int

    @property
    def batch(self) -> int:
        """Sequences that the cache holds."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.keys, self.values)))

    def __repr__(self) -> str:
        size = f"{self.nbytes / 2**20:.1f} MiB"
        return f"KVCache(batch={self.batch}, capacity={self.capacity}, {self.keys[0].dtype}, {size})"


jax.tree_util.register_dataclass(KVCache, data_fields=["keys", "values", "lengths"], meta_fields=["capacity"])


def init_cache(
    config: DecoderConfig,
    batch: int,
    capacity: int,
    *,
    dtype: Any,
    stacked: bool,
    rows: jax.sharding.Sharding | None = None,
    buffers: jax.sharding.Sharding | None = None,
) -> KVCache:
    """Returns an empty cache.

    Args:
        config: the model's.
        batch: sequences.
        capacity: tokens that each sequence may have, prompt and answer together.
        dtype: of keys and values; the activations' dtype.
        stacked: one array for all layers of a kind, for models whose layers run as a loop. Where they are unrolled, an
            array for each compiles in two thirds of the time and runs the same.
        rows: where the lengths are; the default device if not given.
        buffers: where keys and values are.
    """

    def buffer(layers: int, kind: int) -> jax.Array:
        window = config.kinds[kind].window
        length = capacity if window is None else min(window, capacity)
        return jnp.zeros((layers, batch, config.num_kv_heads, length, config.head_dim), dtype, device=buffers)

    def of_layers() -> tuple[jax.Array, ...]:
        if stacked:
            return tuple(buffer(config.layers.count(kind), kind) for kind in range(len(config.kinds)))
        return tuple(buffer(1, kind) for kind in config.layers)

    lengths = jnp.zeros(batch, jnp.int32, device=rows)
    return KVCache(keys=of_layers(), values=of_layers(), lengths=lengths, capacity=capacity)


def write(buffer: jax.Array, index: Any, new: jax.Array, targets: jax.Array) -> jax.Array:
    """Stores `new (batch, tokens, kv_heads, head_dim)` of layer `index` at `targets (batch, tokens)`.

    Targets at or beyond the buffer's length are dropped.
    """
    rows = jnp.arange(new.shape[0])[:, None]
    return buffer.at[index, rows, :, targets].set(new, mode="drop")


def read(buffer: jax.Array, index: Any, length: int) -> jax.Array:
    """Returns the first `length` places of layer `index`, `(batch, kv_heads, length, head_dim)`."""
    _, batch, heads, _, dim = buffer.shape
    zero = jnp.zeros((), jnp.int32)
    start = (jnp.asarray(index, jnp.int32), zero, zero, zero, zero)
    return lax.dynamic_slice(buffer, start, (1, batch, heads, length, dim))[0]


def positions_in(filled: jax.Array, places: int, length: int) -> jax.Array:
    """The position that lies in each of a buffer's first places, int32 `(batch, places)`; negative in an empty one.

    Args:
        filled: int32 `(batch,)`, tokens that were stored, of which the last `length` remain.
        places: how many.
        length: the buffer's.
    """
    last = filled[:, None] - 1
    return last - (last - jnp.arange(places, dtype=jnp.int32)[None]) % length
