"""Looking up token embeddings, dense or stored as int8 rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax._index import dense_row_entries
from upg_jax._mdcsr import MdCSR


def is_rows(weight: Any) -> bool:
    """Whether rows of a matrix can be looked up: it is an array, or int8 with an entry for every column."""
    if not isinstance(weight, MdCSR):
        return True
    int8 = weight.manifold == "unit" and weight.value_bits == 8
    return int8 and weight.index == "dense" and weight.stack_size is None


def decoded_rows(weight: Any, dtype: Any) -> Any:
    """An embedding or head of int8 rows as a dense array `(rows, hidden)`; anything else as it is.

    For platforms whose kernels read no dense rows: there a product with the array is fast, one with the rows is not.
    """
    if not isinstance(weight, MdCSR) or not is_rows(weight):
        return weight
    return _decode_rows(weight, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _decode_rows(weight: MdCSR, dtype: Any) -> jax.Array:
    rows, hidden = weight.shape
    stride = dense_row_entries(hidden, weight.row_alignment)
    q = jnp.asarray(weight.values)[: rows * stride].reshape(rows, stride)[:, :hidden]
    return (q.astype(jnp.float32) * jnp.asarray(weight.scales)[:, None]).astype(dtype)


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
