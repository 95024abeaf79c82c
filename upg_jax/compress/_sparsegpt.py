"""SparseGPT: pruning and quantizing a matrix column by column, the columns not yet done absorbing the error.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023), algorithm 1;
the step for a single weight is that of Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain
Surgeon" (1993).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax._errors import EncodingError
from upg_jax._quantize_groups import choose_multipliers, quantize
from upg_jax._values import groups_of
from upg_jax.compress._selection import Pattern, keep_largest

_BLOCK = 128
# Columns whose changes reach each other one by one; the rest of a block gets those of a slice in one product.
_SLICE = 32
_DAMPENING = 0.01
_MOST_DAMPENING = 1.0


class Pruned(NamedTuple):
    """What SparseGPT makes of a matrix.

    Attributes:
        weights: float32 `(rows, columns)`, updated survivors, 0 elsewhere; as they decode where they were quantized.
        mask: boolean, the survivors.
        levels: int8, the survivors' values `q`, or None where nothing was quantized.
        multipliers: uint8 `(rows, groups)`, or None with values of 8 bits.
    """

    weights: np.ndarray
    mask: np.ndarray
    levels: np.ndarray | None
    multipliers: np.ndarray | None = None


def factor(gram: jax.Array) -> jax.Array:
    """Factors the inverse of a dampened Hessian.

    The diagonal of a feature that is always 0 becomes 1, and the mean diagonal's hundredth is added; more, by
    factors of ten, where float32 needs it.

    Args:
        gram: float32 `(columns, columns)`, the sum of `x x^T` over the calibration activations.

    Returns:
        Upper triangular `R` with `inverse = R^T R`.

    Raises:
        EncodingError: if the matrix is not finite.
    """
    if not bool(jnp.isfinite(gram).all()):
        raise EncodingError("sparsegpt: the calibration activations must be finite; got NaN or infinity")
    dampening = _DAMPENING
    while True:
        upper = _factor(gram, np.float32(dampening))
        if bool(jnp.isfinite(upper).all()):
            return upper
        if dampening >= _MOST_DAMPENING:
            raise EncodingError("sparsegpt: the Hessian of the calibration activations cannot be factored")
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


def sparsegpt(
    w: Any,
    hessian: Any,
    density: float,
    *,
    pattern: str = "row",
    scales: Any | None = None,
    value_bits: int = 8,
    group_size: int | None = None,
) -> Pruned:
    """Prunes a matrix so that its outputs change little, and quantizes it if there are scales.

    From the first column to the last, what pruning and rounding change is made up for by the columns that follow.
    Within a block of 128 columns (M columns for N:M) the weights whose removal costs least are chosen, given what the
    columns before have made of them; the same share of every block.

    Args:
        w: float `(out_features, in_features)`.
        hessian: float32 `(in_features, in_features)`, the sum of `x x^T` over calibration inputs `x`.
        density: fraction of the weights to keep, in `[0, 1]`.
        pattern: see `prune_mask`.
        scales: float32 `(out_features,)`, quantization steps of the survivors; 0 for a row of zeros.
        value_bits: of the survivors' values; of fewer than 8, steps are scales times multipliers.
        group_size: columns that share a multiplier, chosen from what the columns before have made of them.

    Raises:
        EncodingError: for a density or pattern that does not fit, or a Hessian that is not finite.
    """
    if not 0.0 <= density <= 1.0:
        raise EncodingError(f"sparsegpt: density must be in [0, 1]; got {density}")
    upper = factor(jnp.asarray(hessian, jnp.float32))
    chosen = Pattern.parse(pattern)
    return prune(
        np.asarray(w, np.float32),
        upper,
        density,
        chosen,
        None if scales is None else np.asarray(scales, np.float32),
        value_bits,
        group_size,
    )


def prune(
    w: np.ndarray,
    upper: jax.Array,
    density: float,
    pattern: Pattern,
    scales: np.ndarray | None,
    value_bits: int = 8,
    group_size: int | None = None,
) -> Pruned:
    """`sparsegpt` with the inverse Hessian factored."""
    rows, columns = w.shape
    pattern.check_density(density)
    pattern.check_columns(columns)
    group = pattern.group or _BLOCK
    block = group * max(1, _BLOCK // group)
    if group_size is not None and block % group_size:
        raise EncodingError(
            f"sparsegpt: blocks of {block} columns, of which pattern N:{group} is met, must hold whole groups of "
            f"{group_size}; use a pattern N:M whose M divides {group_size}"
        )
    padding = -columns % block
    counts = _counts(rows, columns, density, pattern, group, padding)
    # Columns that are padding have no effect on others, and are never chosen.
    padded = jnp.pad(upper, ((0, padding), (0, padding)))
    padded = padded.at[jnp.arange(columns, columns + padding), jnp.arange(columns, columns + padding)].set(1)
    weights, mask, levels, multipliers = _prune(
        jnp.pad(jnp.asarray(w), ((0, 0), (0, padding))),
        padded,
        counts,
        None if scales is None else jnp.asarray(scales),
        columns=columns,
        block=block,
        group=group,
        by_row=pattern.scope == "row",
        value_bits=value_bits,
        group_size=group_size,
    )
    kept = np.asarray(mask)[:, :columns]
    return Pruned(
        np.asarray(weights)[:, :columns],
        kept,
        None if scales is None else np.asarray(levels)[:, :columns],
        None if group_size is None else np.asarray(multipliers).T[:, : groups_of(columns, group_size)],
    )


def _counts(
    rows: int, columns: int, density: float, pattern: Pattern, group: int, padding: int
) -> np.ndarray:
    """Weights to keep in each group of columns, of a row or of all, so that all groups together are exact."""
    ends = np.minimum(np.arange(0, columns + padding + group, group), columns)
    if pattern.keep is not None:
        return np.where(np.diff(ends) > 0, pattern.keep, 0).astype(np.int32)
    of = 1 if pattern.scope == "row" else rows
    return np.diff([round(density * of * int(end)) for end in ends]).astype(np.int32)


@partial(jax.jit, static_argnames=("columns", "block", "group", "by_row", "value_bits", "group_size"))
def _prune(
    w: jax.Array,
    upper: jax.Array,
    counts: jax.Array,
    scales: jax.Array | None,
    *,
    columns: int,
    block: int,
    group: int,
    by_row: bool,
    value_bits: int,
    group_size: int | None,
) -> tuple[jax.Array, ...]:
    rows, width = w.shape
    inner = math.gcd(group, _SLICE)
    divisors = None if scales is None else jnp.where(scales > 0, scales, jnp.ones_like(scales))

    def select(part: jax.Array, diagonal: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
        """The survivors of `part (group, rows)`."""
        real = first + jnp.arange(group) < columns
        scores = jnp.where(real[:, None], (part / diagonal[:, None]) ** 2, -jnp.inf).T
        kept = keep_largest(scores if by_row else scores.reshape(1, -1), count)
        return kept.reshape(rows, group).T

    def multipliers_of(part: jax.Array, kept: jax.Array, at: jax.Array, first: jax.Array) -> jax.Array:
        """Of the group that begins at `first`; what survives of it is known where a pattern is no shorter."""
        assert group_size is not None
        assert divisors is not None
        targets = lax.dynamic_slice(part, (first, 0), (group_size, rows)) / divisors[None]
        if group >= group_size:
            targets = jnp.where(lax.dynamic_slice(kept, (first - at, 0), (group_size, rows)), targets, 0)
        return choose_multipliers(targets.T, value_bits, jnp).astype(jnp.uint8)

    def prune_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, masks, levels, multipliers = carry
        start = index * block
        rows_of_upper = lax.dynamic_slice(upper, (start, 0), (block, width))
        square = lax.dynamic_slice(rows_of_upper, (0, start), (block, block))
        # A column's weights lie together, since the loop below goes from column to column.
        part = lax.dynamic_slice(w, (0, start), (rows, block)).T

        def prune_group(g: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            part, *others = carry
            at = g * group
            diagonal = lax.dynamic_slice(jnp.diagonal(square), (at,), (group,))
            chosen = lax.dynamic_slice(part, (at, 0), (group, rows))
            kept = select(chosen, diagonal, start + at, counts[index * (block // group) + g])

            def prune_slice(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                part, errors, masks, levels, multipliers = carry
                first = at + number * inner
                unit = jnp.ones(rows, jnp.float32)
                if group_size is not None:
                    this = (start + first) // group_size
                    multipliers = lax.cond(
                        (start + first) % group_size == 0,
                        lambda m: m.at[this].set(multipliers_of(part, kept, at, first)),
                        lambda m: m,
                        multipliers,
                    )
                    unit = multipliers[this].astype(jnp.float32)
                triangle = lax.dynamic_slice(square, (first, first), (inner, inner))
                survive = lax.dynamic_slice(kept, (number * inner, 0), (inner, rows))

                def prune_column(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    columns, errors, levels = carry
                    if scales is None or divisors is None:
                        level = jnp.zeros(rows, jnp.int8)
                        final = jnp.where(survive[j], columns[j], 0)
                    else:
                        q = quantize(columns[j] / divisors, unit, value_bits, jnp)
                        q = jnp.where(survive[j], q, 0)
                        level, final = q.astype(jnp.int8), q * unit * scales
                    error = (columns[j] - final) / triangle[j, j]
                    columns = columns - triangle[j][:, None] * error[None]
                    return columns.at[j].set(final), errors.at[j].set(error), levels.at[j].set(level)

                columns = lax.dynamic_slice(part, (first, 0), (inner, rows))
                columns, error, level = lax.fori_loop(
                    0,
                    inner,
                    prune_column,
                    (columns, jnp.zeros_like(columns), jnp.zeros(columns.shape, jnp.int8)),
                )
                later = jnp.where(
                    jnp.arange(block) >= first + inner,
                    lax.dynamic_slice(square, (first, 0), (inner, block)),
                    0,
                )
                part = part - jnp.matmul(later.T, error, precision=lax.Precision.HIGHEST)
                put = partial(lax.dynamic_update_slice, start_indices=(first, 0))
                found = put(part, columns), put(errors, error), put(masks, survive), put(levels, level)
                return *found, multipliers

            return lax.fori_loop(0, group // inner, prune_slice, (part, *others))

        done = (
            part,
            jnp.zeros_like(part),
            jnp.zeros(part.shape, jnp.bool_),
            jnp.zeros(part.shape, jnp.int8),
            multipliers,
        )
        part, errors, mask, level, multipliers = lax.fori_loop(0, block // group, prune_group, done)
        later = jnp.where((jnp.arange(width) >= start + block)[None], rows_of_upper, 0)
        w = w - jnp.matmul(errors.T, later, precision=lax.Precision.HIGHEST)
        put = partial(lax.dynamic_update_slice, start_indices=(0, start))
        return put(w, part.T), put(masks, mask.T), put(levels, level.T), multipliers

    groups = jnp.zeros((groups_of(width, group_size), rows), jnp.uint8)
    begin = (w, jnp.zeros(w.shape, jnp.bool_), jnp.zeros(w.shape, jnp.int8), groups)
    return lax.fori_loop(0, width // block, prune_block, begin)
