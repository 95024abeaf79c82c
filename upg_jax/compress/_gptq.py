"""GPTQ: values of few bits for a matrix, column by column, the columns not yet done absorbing the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), in the order
of falling inputs and with multipliers chosen beforehand, as the authors' code has it (`act_order`, `static_groups`).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax._quantize_groups import choose_multipliers, quantize
from upg_jax._values import groups_of
from upg_jax.compress._hessian import Ordered

_BLOCK = 128


class Quantized(NamedTuple):
    """What GPTQ makes of a matrix.

    Attributes:
        weights: float32 `(rows, columns)`, as they decode.
        levels: int8 `(rows, columns)`, the values `q`.
        multipliers: uint8 `(rows, groups)`.
    """

    weights: np.ndarray
    levels: np.ndarray
    multipliers: np.ndarray


def quantize_in_order(
    w: np.ndarray,
    kept: np.ndarray,
    hessian: Ordered,
    scales: np.ndarray,
    value_bits: int,
    group_size: int,
) -> Quantized:
    """Quantizes a pruned matrix so that its outputs change little.

    Args:
        w: float32 `(rows, columns)`, what pruning has left.
        kept: boolean, which weights that is; the others stay 0.
        hessian: of the inputs.
        scales: float32 `(rows,)`, whose products with multipliers are steps; 0 for a row of zeros.
        value_bits: 4 or 3.
        group_size: columns that share a multiplier.
    """
    rows, columns = w.shape
    groups = groups_of(columns, group_size)
    targets = np.zeros((rows, groups * group_size), np.float32)
    np.divide(w, scales[:, None], out=targets[:, :columns], where=kept & (scales[:, None] > 0))
    multipliers = choose_multipliers(targets.reshape(rows, groups, group_size), value_bits, np)
    units = np.repeat(multipliers, group_size, axis=1)[:, :columns]
    missing = -columns % _BLOCK
    # Columns that are padding have no effect on others.
    beyond = (jnp.arange(columns + missing) >= columns).astype(hessian.upper.dtype)
    upper = jnp.pad(hessian.upper, (0, missing)) + jnp.diag(beyond)

    def in_order(a: np.ndarray) -> np.ndarray:
        return np.pad(a[:, hessian.order], ((0, 0), (0, missing)))

    levels = np.zeros((rows, columns), np.int8)
    found = _quantize(in_order(w), upper, in_order(kept), in_order(units), scales, value_bits=value_bits)
    levels[:, hessian.order] = np.asarray(found)[:, :columns]
    weights = levels * units * scales[:, None]
    return Quantized(weights, levels, multipliers.astype(np.uint8))


@partial(jax.jit, static_argnames="value_bits")
def _quantize(
    w: jax.Array, upper: jax.Array, kept: jax.Array, units: jax.Array, scales: jax.Array, *, value_bits: int
) -> jax.Array:
    """The values `q`, int8, of columns in the order of `upper`."""
    rows, width = w.shape
    divisors = jnp.where(scales > 0, scales, jnp.ones_like(scales))

    def block(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, levels = carry
        start = index * _BLOCK
        rows_of_upper = lax.dynamic_slice(upper, (start, 0), (_BLOCK, width))
        square = lax.dynamic_slice(rows_of_upper, (0, start), (_BLOCK, _BLOCK))

        def part_of(a: jax.Array) -> jax.Array:
            # A column's weights lie together, since the loop below goes from column to column.
            return lax.dynamic_slice(a, (0, start), (rows, _BLOCK)).T

        survive, unit = part_of(kept), part_of(units)

        def column(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            part, errors, levels = carry
            q = jnp.where(
                survive[j], quantize(part[j] / divisors, jnp.maximum(unit[j], 1), value_bits, jnp), 0
            )
            error = (part[j] - q * unit[j] * scales) / square[j, j]
            later = jnp.where(jnp.arange(_BLOCK) > j, square[j], 0)
            part = part - later[:, None] * error[None]
            return part, errors.at[j].set(error), levels.at[j].set(q.astype(jnp.int8))

        part = part_of(w)
        begin = (part, jnp.zeros_like(part), jnp.zeros(part.shape, jnp.int8))
        _, errors, level = lax.fori_loop(0, _BLOCK, column, begin)
        later = jnp.where((jnp.arange(width) >= start + _BLOCK)[None], rows_of_upper, 0)
        w = w - jnp.matmul(errors.T, later, precision=lax.Precision.HIGHEST)
        return w, lax.dynamic_update_slice(levels, level.T, (0, start))

    return lax.fori_loop(0, width // _BLOCK, block, (w, jnp.zeros(w.shape, jnp.int8)))[1]
