"""Linear layers of any kind, and the loop over a decoder's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax._mdcsr import MdCSR
from upg_jax._sparse_dense import sparse_dense, sparse_dense_many

Linear: TypeAlias = jax.Array | MdCSR | Callable[[jax.Array, jax.Array | None], jax.Array]
"""A weight matrix `(out_features, in_features)`, dense or compressed, or what stands for one: a function of input and
bias."""

Linears: TypeAlias = MdCSR | tuple[Linear, ...]
"""One projection of all layers: a stack that is read in place, or a matrix per layer."""

Carry = TypeVar("Carry")


def linear(x: jax.Array, weight: Linear, bias: jax.Array | None = None) -> jax.Array:
    """`x (..., in) @ weight.T + bias` in `x`'s dtype, accumulated in float32."""
    if callable(weight):
        return weight(x, bias)
    if isinstance(weight, MdCSR):
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


def project(x: jax.Array, layers: Mapping[str, Any], name: str, layer: Any) -> jax.Array:
    """Applies projection `name` of layer number `layer`.

    Args:
        x: `(..., in)`.
        layers: the decoder's `layers` parameters: `name` holds the matrices (`Linears`), and `name.bias`, where
            there is one, the biases `(layers, out)`.
        name: of the projection.
        layer: index; traced where `is_stacked(layers)`, else a Python integer.
    """
    weight = layers[name]
    bias = _bias(layers, name, layer)
    if isinstance(weight, tuple):
        return linear(x, weight[layer], bias)
    return sparse_dense(x, weight, bias, index=layer)


def _bias(layers: Mapping[str, Any], name: str, layer: Any) -> jax.Array | None:
    return layers[f"{name}.bias"][layer] if f"{name}.bias" in layers else None


def project_together(
    x: jax.Array, layers: Mapping[str, Any], names: Sequence[str], sizes: Sequence[int], layer: Any
) -> list[jax.Array]:
    """Applies projections that share their input; in one product where one matrix has the rows of them all.

    Otherwise those of compressed matrices are launched together, which saves a GPU's waits.

    Args:
        x: `(..., in)`.
        layers: the decoder's `layers` parameters; `joined(names)` is the key of the matrix with all rows.
        names: of the projections.
        sizes: rows of each.
        layer: index, as for `project`.
    """
    if joined(names) not in layers:
        weights = [layers[name] for name in names]
        biases = [_bias(layers, name, layer) for name in names]
        if all(isinstance(weight, MdCSR) for weight in weights):
            return sparse_dense_many(x, weights, biases, index=layer)
        if all(isinstance(weight, tuple) and isinstance(weight[layer], MdCSR) for weight in weights):
            return sparse_dense_many(x, [weight[layer] for weight in weights], biases)
        return [project(x, layers, name, layer) for name in names]
    y = project(x, layers, joined(names), layer)
    return jnp.split(y, np.cumsum(sizes)[:-1].tolist(), axis=-1)


def joined(names: Sequence[str]) -> str:
    """The key of a matrix with the rows of several projections."""
    return "+".join(names)


def is_stacked(layers: Mapping[str, Any]) -> bool:
    """Whether every projection is a stack, so that one traced layer can stand for all."""
    return not any(isinstance(weights, tuple) for weights in layers.values())


def for_each_layer(
    body: Callable[[Any, Carry], Carry], carry: Carry, layers: Mapping[str, Any], count: int
) -> Carry:
    """Folds `body(layer, carry)` over the layers.

    One loop with a traced index where the layers are stacked: it compiles a single layer. Otherwise unrolled with
    Python integers, because slicing a dense matrix out of a stack would copy it at every step.
    """
    if is_stacked(layers):
        return lax.fori_loop(0, count, body, carry)
    for layer in range(count):
        carry = body(layer, carry)
    return carry
