"""The one place that says how far a float32 result may be from the exact one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

EPS = 2.0**-24
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_SMALLEST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}


def exact(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def assert_within_bound(actual, formula: Callable, *operands, terms: int, dtype: str | None = None) -> None:
    """Compares with `formula(*operands)` in float64 under the design's bound.

    `formula` must be a polynomial with non-negative coefficients in the operands (matrix products, sums), so
    that its value at their magnitudes bounds the sum of the magnitudes of all terms. The bound is then
    `2 * terms * eps * formula(|operands|)` plus one rounding to the output's dtype, where `terms` is the
    longest chain of additions plus 2.
    """
    operands = [exact(o) for o in operands]
    expected = np.asarray(formula(*operands))
    magnitude = np.asarray(formula(*[np.abs(o) for o in operands]))
    dtype = str(actual.dtype) if dtype is None else dtype
    assert str(actual.dtype) == dtype
    assert actual.shape == expected.shape
    tolerance = 2 * terms * EPS * magnitude
    tolerance = tolerance + _ROUNDING[dtype] * (np.abs(expected) + tolerance) + _SMALLEST[dtype]
    error = np.abs(exact(actual) - expected)
    assert np.all(error <= tolerance), f"{np.max(error / tolerance):.3g} times the bound"
