"""Hessians of a layer's squared error, factored for loops that go from column to column."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._errors import EncodingError

_DAMPENING = 0.01
_MOST_DAMPENING = 1.0


def factor(gram: jax.Array) -> jax.Array:
    """Factors the inverse of a dampened Hessian.

    The diagonal of a feature that is always 0 becomes 1, and the mean diagonal's hundredth is added; more, by
    factors of ten, where float32 needs it.

    Args:
        gram: float32 `(columns, columns)`, the sum of `x x^T` over the calibration activations.

    Returns:
        Upper triangular `R` with `inverse = R^T R`.

    Raises:
        EncodingError: if the matrix is not finite, or cannot be factored in float32.
    """
    if not bool(jnp.isfinite(gram).all()):
        raise EncodingError(
            "sparsegpt: the Hessian of the calibration inputs must be finite; got NaN or infinity; the model may have "
            "weights that are infinite or no numbers before this matrix"
        )
    dampening = _DAMPENING
    while True:
        upper = _factor(gram, np.float32(dampening))
        # Where the mean diagonal overflows, the inverse is 0.
        if bool(jnp.isfinite(upper).all() & (jnp.diagonal(upper) > 0).all()):
            return upper
        if dampening >= _MOST_DAMPENING:
            raise EncodingError(
                f"sparsegpt: the Hessian of the calibration inputs, with {_MOST_DAMPENING:.0%} of its mean diagonal "
                f"{float(jnp.mean(jnp.diagonal(gram))):.3g} added to it, cannot be factored in float32; use more "
                "calibration text, or --method wanda (method='wanda')"
            )
        dampening *= 10


@jax.jit
def _factor(gram: jax.Array, dampening: jax.Array) -> jax.Array:
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    added = dampening * jnp.mean(diagonal) + dead.astype(diagonal.dtype)
    # With J reversing the order, J H J = L L^T gives H^-1 = R^T R for R = J L^-1 J: one factorization and one
    # triangular inverse, where the paper factors an explicit inverse.
    reversed_ = (gram + jnp.diag(added))[::-1, ::-1]
    lower = jnp.linalg.cholesky(reversed_)
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(gram.shape[0], dtype=gram.dtype), lower=True)
    return inverse[::-1, ::-1]


class Ordered(NamedTuple):
    """A dampened Hessian whose columns come in another order.

    Attributes:
        order: int `(columns,)`, each place's column.
        upper: `factor` of the Hessian in that order.
    """

    order: np.ndarray
    upper: jax.Array


def ordered(gram: jax.Array) -> Ordered:
    """Factors a Hessian with the columns of the largest inputs first.

    Errors of these cost most, and all others are still free to make up for them.

    Args:
        gram: as for `factor`.

    Raises:
        EncodingError: as `factor`.
    """
    order = np.argsort(-np.asarray(jnp.diagonal(gram)), kind="stable")
    return Ordered(order, factor(gram[order][:, order]))
