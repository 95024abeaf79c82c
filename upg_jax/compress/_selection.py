"""Choosing the largest scores of a matrix, as every method and pattern does it; jitted, without a sort."""

from __future__ import annotations

import re
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax._errors import EncodingError

Scope: TypeAlias = Literal["row", "layer"]


class Pattern(NamedTuple):
    """What is counted when a density is met.

    Attributes:
        scope: `"row"` keeps as many weights in every row, `"layer"` as many in the whole matrix.
        keep: weights kept of every `group` consecutive ones of a row; None without such a constraint.
        group: see `keep`.
    """

    scope: Scope
    keep: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads `row`, `layer`, or `N:M`.

        Raises:
            EncodingError: if the text is none of them.
        """
        if text == "row" or text == "layer":
            return cls("row" if text == "row" else "layer")
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match and 0 < int(match[1]) <= int(match[2]):
            return cls("row", int(match[1]), int(match[2]))
        raise EncodingError(
            f"settings: pattern must be row, layer, or N:M with 0 < N <= M, such as 2:4; got {text!r}"
        )

    def check_density(self, density: float) -> None:
        """Raises `EncodingError` for N:M and another density."""
        if self.keep is None or self.group is None:
            return
        if density != self.keep / self.group:
            raise EncodingError(
                f"settings: pattern {self.keep}:{self.group} keeps a density of {self.keep / self.group}; "
                f"got {density}"
            )

    def check_columns(self, columns: int) -> None:
        """Raises `EncodingError` where M does not divide the columns."""
        if self.group is not None and columns % self.group:
            raise EncodingError(
                f"pattern {self.keep}:{self.group} needs a multiple of {self.group} columns; "
                f"got {columns}; keep the tensor dense by a rule"
            )


def keep_pattern(scores: jax.Array, density: float, pattern: Pattern) -> jax.Array:
    """Boolean matrix of `scores`' shape `(rows, columns)`, True for the best; ties go to the first."""
    rows, columns = scores.shape
    pattern.check_density(density)
    pattern.check_columns(columns)
    if pattern.keep is not None and pattern.group is not None:
        groups = scores.reshape(-1, pattern.group)
        return keep_largest(groups, np.int32(pattern.keep)).reshape(rows, columns)
    if pattern.scope == "layer":
        return keep_largest(scores.reshape(1, -1), np.int32(round(density * scores.size))).reshape(
            rows, columns
        )
    return keep_largest(scores, np.int32(round(density * columns)))


@partial(jax.jit, inline=True)
def keep_largest(scores: jax.Array, count: jax.Array | np.int32) -> jax.Array:
    """Marks the `count` largest scores of each row, exactly; of equal ones, the first.

    Bisection over the bits of float32, which sort as the numbers do: 32 passes that vectorize, where a sort is
    several times slower on a CPU.

    Args:
        scores: float32 `(rows, columns)`, at least 0 or minus infinity (kept last).
        count: int32 scalar, may be traced.

    Returns:
        Boolean `(rows, columns)`.
    """
    # Minus infinity becomes 0, and everything else moves up by 1.
    bits = jnp.where(scores >= 0, lax.bitcast_convert_type(jnp.abs(scores), jnp.uint32) + 1, 0)

    def halve(step: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        enough = jnp.sum(bits >= candidate[:, None], axis=1) >= count
        return jnp.where(enough, candidate, threshold)

    # The largest value that at least `count` scores reach: the last one kept.
    threshold = lax.fori_loop(0, 32, halve, jnp.zeros(scores.shape[0], jnp.uint32))[:, None]
    above = bits > threshold
    ties = bits == threshold
    left = count - jnp.sum(above, axis=1, keepdims=True)
    return above | (ties & (jnp.cumsum(ties, axis=1) <= left))
