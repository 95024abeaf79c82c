"""The definition of correct, in plain `jax.numpy`: runs on every platform.

All three functions walk the rows side by side, a few entries of every row per step of a loop, or a few columns where a
mask says which of them have entries. So they need no prefix sum over the planes, and no temporary larger than the
result and the input.
Measured against a flat cumulative sum, it is five times faster on a CPU (benchmarks/reference.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax._compat import unify_varying
from upg_jax._primes import prime_table
from upg_jax._sparse_dense._primitive import Layout
from upg_jax._values import groups_of

# More is faster still for one vector, but compiles longer and is slower for many.
_UNROLL = 6
# Up to these many vectors walking costs less than decoding to dense and multiplying (densities 0.1 to 0.5).
_WALK_VECTORS = 256
_WALK_VECTORS_TRANSPOSED = 16


def sparse_dense(
    x: jax.Array, scales: jax.Array, index: jax.Array, *planes: jax.Array, layout: Layout
) -> jax.Array:
    """`x (*group, *batch, in)` -> float32 `(*group, *batch, out)`."""
    return by_group(_product, layout.shape[0], x, scales, index, planes, layout)


def dense_sparse(
    g: jax.Array, scales: jax.Array, index: jax.Array, *planes: jax.Array, layout: Layout
) -> jax.Array:
    """`g (*group, *batch, out)` -> float32 `(*group, *batch, in)`."""
    return by_group(_transposed_product, layout.shape[1], g, scales, index, planes, layout)


def decode(scales: jax.Array, *planes: jax.Array, layout: Layout) -> jax.Array:
    """Every layer of a stack -> float32 `(S, out, in)`."""
    # A layer that is a constant of the program must not be folded away at compile time, for minutes.
    scales, *planes_ = lax.optimization_barrier((scales, *planes))
    levels = lax.map(lambda layer: decode_levels(*layer, layout=layout), tuple(planes_))
    return levels * scales[..., None]


def decode_levels(*planes: jax.Array, layout: Layout) -> jax.Array:
    """Planes of one layer -> float32 `(out, in)` of `q`, or `q * P[k]`; exact, and not yet scaled."""
    rows = jnp.arange(layout.shape[0])

    def step(dense: jax.Array, column: jax.Array, level: jax.Array) -> jax.Array:
        return dense.at[rows, column].add(level, mode="drop", unique_indices=True, indices_are_sorted=True)

    return _walk(planes, layout, jnp.zeros(layout.shape, jnp.float32), step)


def by_group(
    one: Callable[..., jax.Array],
    features_out: int,
    x: jax.Array,
    scales: jax.Array,
    index: jax.Array,
    planes: tuple[jax.Array, ...],
    layout: Layout,
) -> jax.Array:
    """Applies `one` to each group's `(n, features)` vectors and the layer that `index` names."""
    if index.size == 0:
        return jnp.zeros((*x.shape[:-1], features_out), jnp.float32)
    # A layer that is a constant of the program must not be folded away at compile time, for minutes.
    scales, *planes_ = lax.optimization_barrier((scales, *planes))

    def group(xs: jax.Array, i: jax.Array) -> jax.Array:
        layer = [lax.dynamic_index_in_dim(plane, i, keepdims=False) for plane in (scales, *planes_)]
        return one(xs, layer[0], layer[1:], layout)

    flat = x.astype(jnp.float32).reshape(index.size, math.prod(x.shape[index.ndim : -1]), x.shape[-1])
    if index.size == 1:
        y = group(flat[0], index.reshape(()))
    else:
        y = lax.map(lambda args: group(*args), (flat, index.reshape(-1)))
    return y.reshape(*x.shape[:-1], features_out)


def _product(x: jax.Array, scales: jax.Array, planes: Any, layout: Layout) -> jax.Array:
    n = x.shape[0]
    out_features, _ = layout.shape
    if not isinstance(n, int) or n > _WALK_VECTORS:  # no int: a symbolic size of jax.export
        dense = decode_levels(*planes, layout=layout)
        return jnp.dot(x, dense.T, precision=lax.Precision.HIGHEST) * scales[None]
    columns = x.T

    def step(acc: jax.Array, column: jax.Array, level: jax.Array) -> jax.Array:
        return acc + level[:, None] * columns.at[column].get(mode="clip")

    acc = _walk(planes, layout, jnp.zeros((out_features, n), jnp.float32), step, x)
    return acc.T * scales[None]


def _transposed_product(g: jax.Array, scales: jax.Array, planes: Any, layout: Layout) -> jax.Array:
    n = g.shape[0]
    _, in_features = layout.shape
    scaled = g * scales[None]
    if not isinstance(n, int) or n > _WALK_VECTORS_TRANSPOSED:
        dense = decode_levels(*planes, layout=layout)
        return jnp.dot(scaled, dense, precision=lax.Precision.HIGHEST)
    rows = scaled.T

    def step(acc: jax.Array, column: jax.Array, level: jax.Array) -> jax.Array:
        return acc.at[column].add(level[:, None] * rows, mode="drop")

    return _walk(planes, layout, jnp.zeros((in_features, n), jnp.float32), step, scaled).T


def _walk(
    planes: Any, layout: Layout, init: jax.Array, step: Callable[..., jax.Array], *operands: jax.Array
) -> jax.Array:
    """Folds `step(state, column, level)` over the rows' first entries, second entries, and so on.

    `column` is int32 `(out,)`, `level` is float32 `(out,)` and 0 for rows that have ended (their column stays).
    """
    row_pointers, values, columns, *factors = planes
    out_features, in_features = layout.shape
    if 0 in (out_features, in_features, values.shape[0], init.size):
        return init
    begin, end = row_pointers[:-1].astype(jnp.int32), row_pointers[1:].astype(jnp.int32)
    lengths = end - begin
    rows = jnp.arange(out_features)
    # Counts entries with deltas, columns with a mask.
    limit = in_features if layout.index == "mask" else jnp.max(lengths)
    steps = (limit + _UNROLL - 1) // _UNROLL
    mask = columns.reshape(out_features, -1) if layout.index == "mask" else None
    table = jnp.asarray(prime_table().astype("float32")) if layout.manifold == "prime" else None
    first_group = rows * groups_of(in_features, layout.group_size)

    def find(n: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Step `n`: `place` after it, the entries of all rows, which of them exist, and their columns.

        `place` is the column with deltas and the number of earlier entries with a mask. Of a row that has ended, the
        entry may be anywhere, or overflow in a layer of nearly 2**31 entries.
        """
        if mask is not None:
            has_bit = (mask.at[rows, n // 8].get(mode="clip") >> (n % 8).astype(jnp.uint8)) & 1 > 0
            live = has_bit & (place < lengths) & (n < in_features)
            return place + has_bit.astype(jnp.int32), begin + place, live, jnp.full_like(place, n)
        live = n < lengths
        if layout.index == "dense":
            return place, begin + n, live & (n < in_features), jnp.full_like(place, n)
        place += jnp.where(live, columns.at[begin + n].get(mode="clip"), 0).astype(jnp.int32)
        return place, begin + n, live, place

    def body(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        place, state = carry
        for u in range(_UNROLL):
            place, at, live, column = find(j * _UNROLL + u, place)
            level = jnp.where(live, _value(values, at, layout.value_bits), 0).astype(jnp.float32)
            if table is not None:
                # Exact in float32: |q * P[k]| < 2**24. A gather clamps k to the table's last prime.
                level *= table.at[factors[0].at[at].get(mode="clip")].get(mode="clip")
            elif layout.group_size is not None:
                # Exact in float32, too: |q * m| is at most 8 * 255.
                group = first_group + column // layout.group_size
                level *= factors[0].at[group].get(mode="clip").astype(jnp.float32)
            state = step(state, column, level)
        return place, state

    place = jnp.zeros(out_features, jnp.int32)
    place, init, *_ = unify_varying(place, init, *planes, *operands)
    return lax.fori_loop(0, steps, body, (place, init))[1]


def _value(values: jax.Array, at: jax.Array, bits: int) -> jax.Array:
    """The values of entries, from a stream of so many bits each; anything for an entry that does not exist."""
    if bits == 8:
        return values.at[at].get(mode="clip")
    place = at % 8 * bits  # of the eight entries that fill whole bytes
    byte, shift = at // 8 * bits + place // 8, place % 8
    word = values.at[byte].get(mode="clip").astype(jnp.int32) & 255
    if 8 % bits:
        word |= values.at[byte + 1].get(mode="clip").astype(jnp.int32) << 8
    return word << (32 - bits - shift) >> (32 - bits)
