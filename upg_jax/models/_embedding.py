"""Looking up token embeddings, dense or stored as int8 rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax._mdcsr import MdCSR


def is_rows(weight: Any) -> bool:
    """Whether rows of a matrix can be looked up: it is an array, or int8 with an entry for every column."""
    if not isinstance(weight, MdCSR):
        return True
    return weight.index == "dense" and weight.manifold == "unit" and weight.stack_size is None


def look_up(embedding: jax.Array | MdCSR, ids: jax.Array) -> jax.Array:
    """Returns the rows `ids` of an embedding, `(*ids.shape, hidden)`; decoded in float32 if they are int8."""
    if not isinstance(embedding, MdCSR):
        return embedding[ids]
    rows, hidden = embedding.shape
    # As of an array: negative ids count from the end, and what is outside is clamped.
    ids = jnp.clip(jnp.where(ids < 0, ids + rows, ids), 0, rows - 1)
    # Slices of the one-dimensional plane, which a reshape would copy where a tail follows the rows.
    slices = lax.GatherDimensionNumbers(
        offset_dims=(ids.ndim,), collapsed_slice_dims=(), start_index_map=(0,)
    )
    start = embedding.row_pointers[ids].astype(jnp.int32)[..., None]
    q = lax.gather(embedding.values, start, slices, (hidden,), mode="clip")
    return q.astype(jnp.float32) * embedding.scales[ids][..., None]
