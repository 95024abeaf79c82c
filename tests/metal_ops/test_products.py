"""The products in the emulator, against the plain NumPy oracle, within the design's bound."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import metal
from helpers.bounds import assert_within_bound
from helpers.layers import Case, each_case
from helpers.metal import Planes


def check_product(case: Case, y: np.ndarray, x: np.ndarray) -> None:
    assert_within_bound(
        y[0], lambda x, w, s: x @ w.T * s, x[0], case.levels, case.scales, terms=case.terms, dtype="float32"
    )


@each_case
@pytest.mark.parametrize("kernel", metal.PRODUCTS)
def test_products_of_every_structure(kernel, case):
    x = np.asarray(case.x(1, 5))
    check_product(case, metal.product(kernel, Planes.of(case.layer), x, tile=48), x)


@each_case
def test_transposed_products_of_every_structure(case):
    g = np.asarray(case.cotangent(1, 3))
    y = metal.transposed(Planes.of(case.layer), g)
    assert_within_bound(
        y[0], lambda g, w, s: g * s @ w, g[0], case.levels, case.scales, terms=case.terms + 4, dtype="float32"
    )
