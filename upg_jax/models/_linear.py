"""Linear layers of any kind, and the loop over a decoder's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax._mdcsr import MdCSR
from upg_jax._sharded import ShardedMdCSR
from upg_jax._sparse_dense import sparse_dense, sparse_dense_many

Linear: TypeAlias = jax.Array | MdCSR | ShardedMdCSR | Callable[[jax.Array, jax.Array | None], jax.Array]
"""A weight matrix `(out_features, in_features)`, dense or compressed, or what stands for one: a function of input and
bias."""

Linears: TypeAlias = MdCSR | ShardedMdCSR | tuple[Linear, ...]
"""One projection of all layers, or of all their experts: a stack that is read in place, or a matrix for each."""

Carry = TypeVar("Carry")


def linear(x: jax.Array, weight: Linear, bias: jax.Array | None = None) -> jax.Array:
    """`x (..., in) @ weight.T + bias` in `x`'s dtype, accumulated in float32."""
    if callable(weight):
        return weight(x, bias)
    if isinstance(weight, (MdCSR, ShardedMdCSR)):
        return sparse_dense(x, weight, bias)
    y = _dense_product(x, weight)
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape(*[1] * (y.ndim - 1), -1)
    return y.astype(x.dtype)


def _dense_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    # For one bfloat16 vector, XLA's CPU backend converts the whole matrix to float32 first (12 times slower, and
    # as much memory again); for two it does not.
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count == 1 and x.dtype != jnp.float32:
        rows = jnp.broadcast_to(rows, (2, rows.shape[1]))
    y = jnp.einsum("ni,oi->no", rows, weight, precision="highest", preferred_element_type=jnp.float32)
    return y[:count].reshape(*x.shape[:-1], -1)


def project(x: jax.Array, layers: Mapping[str, Any], name: str, index: Any) -> jax.Array:
    """Applies projection `name` of a layer, or of one of its experts for each group of vectors.

    Args:
        x: `(..., in)`.
        layers: the decoder's `layers` parameters: `name` holds the matrices (`Linears`), and `name.bias`, where
            there is one, the biases `(layers, out)`.
        name: of the projection.
        index: which of them: a Python integer, traced if they are a stack, or int32 `(groups,)` for `x` of
            `(groups, ..., in)`.
    """
    weight = layers[name]
    if isinstance(weight, (MdCSR, ShardedMdCSR)):
        return sparse_dense(x, weight, _bias(layers, name, index), index=index)
    if isinstance(index, int):
        return linear(x, weight[index], _bias(layers, name, index))
    # A choice among branches reads the chosen matrix in place.
    branches = [partial(linear, weight=w) for w in weight]
    return lax.map(lambda group: lax.switch(group[1], branches, group[0]), (x, index))


def _bias(layers: Mapping[str, Any], name: str, index: Any) -> jax.Array | None:
    return layers[f"{name}.bias"][index] if f"{name}.bias" in layers else None


def project_together(
    x: jax.Array, layers: Mapping[str, Any], names: Sequence[str], sizes: Sequence[int], index: Any
) -> list[jax.Array]:
    """Applies projections that share their input; in one product where one matrix has the rows of them all.

    Otherwise those of compressed matrices are launched together, which saves a GPU's waits.

    Args:
        x: `(..., in)`.
        layers: the decoder's `layers` parameters; `joined(names)` is the key of the matrix with all rows.
        names: of the projections.
        sizes: rows of each.
        index: as for `project`.
    """
    if joined(names) in layers:
        y = project(x, layers, joined(names), index)
        return jnp.split(y, np.cumsum(sizes)[:-1].tolist(), axis=-1)
    weights = [layers[name] for name in names]
    if all(isinstance(weight, MdCSR) for weight in weights):
        return sparse_dense_many(x, weights, [_bias(layers, name, index) for name in names], index=index)
    if all(isinstance(index, int) and isinstance(w, tuple) and isinstance(w[index], MdCSR) for w in weights):
        biases = [_bias(layers, name, index) for name in names]
        return sparse_dense_many(x, [weight[index] for weight in weights], biases)
    return [project(x, layers, name, index) for name in names]


def joined(names: Sequence[str]) -> str:
    """The key of a matrix with the rows of several projections."""
    return "+".join(names)


def is_stacked(layers: Mapping[str, Any]) -> bool:
    """Whether every projection is a stack, so that one traced layer can stand for all."""
    return not any(isinstance(weights, tuple) for weights in layers.values())


def for_each_layer(
    body: Callable[[Any, int, Carry], Carry], carry: Carry, kinds: Sequence[int], stacked: bool
) -> Carry:
    """Folds `body(layer, kind, carry)` over the layers.

    Args:
        body: is given the layer's index and kind.
        carry: what it begins with.
        kinds: of the layers.
        stacked: loop with a traced index over each stretch that repeats, which compiles one repetition. Otherwise
            unrolled with Python integers, because slicing a dense matrix out of a stack would copy it at every step.
    """
    if not stacked:
        for layer, kind in enumerate(kinds):
            carry = body(layer, kind, carry)
        return carry
    start = 0
    while start < len(kinds):
        period, count = repetition(kinds[start:])

        def repeat(i: Any, carry: Carry, start: int = start, period: int = period) -> Carry:
            for j in range(period):
                carry = body(start + i * period + j, kinds[start + j], carry)
            return carry

        carry = lax.fori_loop(0, count, repeat, carry)
        start += period * count
    return carry


def repetition(kinds: Sequence[int]) -> tuple[int, int]:
    """The period at the beginning of a sequence, and how often it is there, that spare most layers from compilation."""
    best = (1, 1)
    for period in range(1, len(kinds) // 2 + 1):
        count = 1
        while kinds[count * period : (count + 1) * period] == kinds[:period]:
            count += 1
        if period * (count - 1) > best[0] * (best[1] - 1):
            best = (period, count)
    return best
