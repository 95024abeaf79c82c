"""Dense matrices that are multiplied by in training and not trained."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """A dense `([S,] out, in)` matrix of a model, called as one: no gradient, factors rounded to its dtype.

    Attributes:
        weight: float32 or bfloat16.
    """

    weight: jax.Array

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """`x (..., in) @ weight.T + bias` in `x`'s dtype, accumulated in float32."""
        y = _product(x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)
        if bias is not None:
            y = y + bias.astype(jnp.float32).reshape(*[1] * (y.ndim - 1), -1)
        return y.astype(x.dtype)


jax.tree_util.register_dataclass(Frozen, data_fields=["weight"], meta_fields=[])


def _dot(a: jax.Array, b: jax.Array, contract_b: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    dimensions = (((1,), (contract_b,)), ((), ()))
    return lax.dot_general(
        a.astype(b.dtype), b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


@partial(jax.custom_vjp)
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _dot(x, weight, 1)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
    return _dot(x, weight, 1), (weight, jnp.zeros(0, x.dtype))


def _backward(kept: Any, g: jax.Array) -> tuple[jax.Array, None]:
    # JAX's own rule would multiply a float32 cotangent by a bfloat16 matrix, in float32.
    weight, like = kept
    return _dot(g, weight, 0).astype(like.dtype), None


_product.defvjp(_forward, _backward)
