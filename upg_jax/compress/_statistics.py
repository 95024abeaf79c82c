"""What calibration says of the inputs of matrices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from upg_jax.compress._hessian import Ordered, factor, ordered


class Inputs:
    """Calibration inputs that some matrices share, in batches `(windows, tokens, features)`."""

    def __init__(self, batches: Sequence[jax.Array], precision: str = "float32") -> None:
        self._batches, self._precision = batches, precision

    @functools.cached_property
    def norms(self) -> jax.Array:
        """Euclidean norm of each feature over all tokens, float32 `(features,)`."""
        return jnp.sqrt(square_sums(self._batches))

    @functools.cached_property
    def factor(self) -> jax.Array:
        """Of the inverse Hessian, see `sparsegpt`; float32 `(features, features)`."""
        return factor(self.hessian)

    @functools.cached_property
    def ordered(self) -> Ordered:
        """The same for columns in the order of falling inputs."""
        return ordered(self.hessian)

    @functools.cached_property
    def hessian(self) -> jax.Array:
        """The sum of `x x^T` over all tokens, float32 `(features, features)`."""
        return gram(self._batches, self._precision)


def square_sums(inputs: Sequence[jax.Array]) -> jax.Array:
    """The sum of each feature's squares over batches `(windows, tokens, features)`, float32 `(features,)`."""
    total = jnp.zeros(inputs[0].shape[-1], jnp.float32)
    for x in inputs:
        total = _add_squares(total, x)
    return total


@jax.jit
def _add_squares(total: jax.Array, x: jax.Array) -> jax.Array:
    return total + jnp.sum(x * x, axis=(0, 1))


def gram(inputs: Sequence[jax.Array], precision: str = "float32") -> jax.Array:
    """The sum of `x x^T` over batches `(windows, tokens, features)`, float32 `(features, features)`.

    Args:
        inputs: the batches.
        precision: what `x` is rounded to, `"float32"` or `"bfloat16"`; sums are float32.
    """
    features = inputs[0].shape[-1]
    total = jnp.zeros((features, features), jnp.float32)
    for x in inputs:
        total = _add_upper(total, x, precision)
    return jnp.triu(total) + jnp.triu(total, 1).T


@partial(jax.jit, donate_argnums=0, static_argnums=2)
def _add_upper(total: jax.Array, x: jax.Array, precision: str) -> jax.Array:
    # Only blocks on the diagonal and above: five eighths of the products.
    x = x.reshape(-1, x.shape[-1]).astype(precision)
    # Made before the products: inside, XLA's CPU backend would lose half of their speed in bfloat16.
    transposed = jax.lax.optimization_barrier(x.T)
    features = x.shape[1]
    step = -(-features // 4)
    for start in range(0, features, step):
        stop = min(start + step, features)
        product = jnp.matmul(
            transposed[start:stop], x[:, start:], precision="highest", preferred_element_type=jnp.float32
        )
        total = total.at[start:stop, start:].add(product)
    return total
