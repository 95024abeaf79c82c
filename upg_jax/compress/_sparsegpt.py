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

from upg_jax._encode import checked_group_size, finite_float32, float_matrix
from upg_jax._errors import EncodingError
from upg_jax._values import GROUP_SIZES, groups_of
from upg_jax.compress._gptq import quantize_in_order
from upg_jax.compress._hessian import Ordered, factor, ordered
from upg_jax.compress._selection import Pattern, keep_largest

_BLOCK = 128
# Columns whose changes reach each other one by one; the rest of a block gets those of a slice in one product.
_SLICE = 32


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
    columns before have made of them; the same share of every block. What it leaves is then quantized to values of
    fewer than 8 bits by GPTQ, the columns of the largest inputs first.

    Args:
        w: float `(out_features, in_features)`.
        hessian: float32 `(in_features, in_features)`, the sum of `x x^T` over calibration inputs `x`.
        density: fraction of the weights to keep, in `[0, 1]`.
        pattern: see `prune_mask`.
        scales: float32 `(out_features,)`, quantization steps of the survivors; 0 for a row of zeros.
        value_bits: of the survivors' values; of fewer than 8, steps are scales times multipliers.
        group_size: columns that share a multiplier, chosen from what pruning alone has made of them: 32, 64 or 128;
            None with values of 8 bits.

    Raises:
        EncodingError: for weights that are no matrix of finite numbers, a Hessian of another shape, without calibration
            inputs, or that cannot be factored, scales that are no steps of these rows, and for a density, pattern,
            value_bits or group_size that does not fit.
    """
    w = finite_float32(float_matrix(w, "sparsegpt"), where="sparsegpt")
    gram, chosen = jnp.asarray(hessian, jnp.float32), Pattern.parse(pattern)
    steps = None if scales is None else np.asarray(scales, np.float32)
    _check(w.shape, gram, density, steps, value_bits, group_size)
    if not w.size:
        levels = None if steps is None else np.zeros(w.shape, np.int8)
        groups = groups_of(w.shape[1], group_size)
        multipliers = None if group_size is None else np.ones((w.shape[0], groups), np.uint8)
        return Pruned(w, np.zeros(w.shape, bool), levels, multipliers)
    if steps is None or group_size is None:
        return prune(w, factor(gram), density, chosen, steps)
    return prune_to_few_bits(w, factor(gram), ordered(gram), density, chosen, steps, value_bits, group_size)


def _check(
    shape: tuple[int, ...],
    gram: jax.Array,
    density: float,
    scales: np.ndarray | None,
    value_bits: int,
    group_size: int | None,
) -> None:
    """Raises `EncodingError` for arguments of `sparsegpt` that do not fit each other."""
    rows, columns = shape
    if not 0.0 <= density <= 1.0:
        raise EncodingError(f"sparsegpt: density must be in [0, 1]; got {density}")
    if gram.shape != (columns, columns):
        raise EncodingError(
            f"sparsegpt: hessian must be (in_features, in_features), {(columns, columns)} for this w; got {gram.shape}"
        )
    if gram.size and not bool(jnp.any(gram)):
        raise EncodingError(
            "sparsegpt: hessian must be of one calibration input or more; got zeros; calibrate on text"
        )
    checked_group_size(value_bits, group_size, "unit", "sparsegpt")
    if value_bits != 8 and group_size is None:
        raise EncodingError(
            f"sparsegpt: group_size must be one of {GROUP_SIZES} with value_bits {value_bits}; got None"
        )
    if value_bits != 8 and scales is None:
        raise EncodingError(
            f"sparsegpt: scales must be given with value_bits {value_bits}; got None; leave out both to prune only"
        )
    if scales is None:
        return
    if scales.shape != (rows,):
        raise EncodingError(
            f"sparsegpt: scales must be (out_features,), {(rows,)} for this w; got {scales.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(scales) | (scales < 0))
    if bad.size:
        raise EncodingError(
            f"sparsegpt: scales must be finite and at least 0; got {scales[bad[0]]} at row {bad[0]}"
        )


def prune_to_few_bits(
    w: np.ndarray,
    upper: jax.Array,
    in_order: Ordered,
    density: float,
    pattern: Pattern,
    scales: np.ndarray,
    value_bits: int,
    group_size: int,
) -> Pruned:
    """`sparsegpt` with values of fewer than 8 bits: what it leaves is quantized by GPTQ.

    Args:
        w: see `sparsegpt`.
        upper: `factor` of the Hessian.
        in_order: `ordered` of the Hessian.
        density: see `sparsegpt`, like the following.
        pattern: parsed.
        scales: see `sparsegpt`.
        value_bits: see there.
        group_size: see there.
    """
    chosen = prune(w, upper, density, pattern, None)
    found = quantize_in_order(chosen.weights, chosen.mask, in_order, scales, value_bits, group_size)
    return Pruned(found.weights, chosen.mask, found.levels, found.multipliers)


def prune(
    w: np.ndarray,
    upper: jax.Array,
    density: float,
    pattern: Pattern,
    scales: np.ndarray | None,
) -> Pruned:
    """`sparsegpt` with the inverse Hessian factored, and int8 values or none."""
    rows, columns = w.shape
    pattern.check_density(density)
    pattern.check_columns(columns)
    group = pattern.group or _BLOCK
    block = group * max(1, _BLOCK // group)
    padding = -columns % block
    counts = _counts(rows, columns, density, pattern, group, padding)
    # Columns that are padding have no effect on others, and are never chosen.
    padded = jnp.pad(upper, ((0, padding), (0, padding)))
    padded = padded.at[jnp.arange(columns, columns + padding), jnp.arange(columns, columns + padding)].set(1)
    weights, mask, levels = _prune(
        jnp.pad(jnp.asarray(w), ((0, 0), (0, padding))),
        padded,
        counts,
        None if scales is None else jnp.asarray(scales),
        columns=columns,
        block=block,
        group=group,
        by_row=pattern.scope == "row",
    )
    kept = np.asarray(mask)[:, :columns]
    return Pruned(
        np.asarray(weights)[:, :columns],
        kept,
        None if scales is None else np.asarray(levels)[:, :columns],
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


@partial(jax.jit, static_argnames=("columns", "block", "group", "by_row"))
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

    def prune_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, masks, levels = carry
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
                part, errors, masks, levels = carry
                first = at + number * inner
                triangle = lax.dynamic_slice(square, (first, first), (inner, inner))
                survive = lax.dynamic_slice(kept, (number * inner, 0), (inner, rows))

                def prune_column(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    columns, errors, levels = carry
                    if scales is None or divisors is None:
                        level = jnp.zeros(rows, jnp.int8)
                        final = jnp.where(survive[j], columns[j], 0)
                    else:
                        q = jnp.clip(jnp.rint(columns[j] / divisors), -127, 127)
                        q = jnp.where(survive[j], q, 0)
                        level, final = q.astype(jnp.int8), q * scales
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
                return put(part, columns), put(errors, error), put(masks, survive), put(levels, level)

            return lax.fori_loop(0, group // inner, prune_slice, (part, *others))

        done = (
            part,
            jnp.zeros_like(part),
            jnp.zeros(part.shape, jnp.bool_),
            jnp.zeros(part.shape, jnp.int8),
        )
        part, errors, mask, level = lax.fori_loop(0, block // group, prune_group, done)
        later = jnp.where((jnp.arange(width) >= start + block)[None], rows_of_upper, 0)
        w = w - jnp.matmul(errors.T, later, precision=lax.Precision.HIGHEST)
        put = partial(lax.dynamic_update_slice, start_indices=(0, start))
        return put(w, part.T), put(masks, mask.T), put(levels, level.T)

    begin = (w, jnp.zeros(w.shape, jnp.bool_), jnp.zeros(w.shape, jnp.int8))
    return lax.fori_loop(0, width // block, prune_block, begin)
