"""A stack is read in place: results have the bits of its layers'."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import metal
from helpers.layers import Case, stacked
from helpers.metal import Planes

# Capacities are no multiples of a lane's entries, so that layers begin anywhere.
CASES = [Case("random", (13, 301), "prime", seed=seed) for seed in range(3)]
INDEX = [2, 0, -7, 1, 9]
CHOSEN = [2, 0, 0, 1, 2]


@pytest.fixture
def stack() -> Planes:
    planes = Planes.of(stacked(*CASES))
    assert planes.values.shape[1] % 4
    return planes


def layer(planes: Planes, i: int) -> Planes:
    arrays = (planes.values, planes.deltas, planes.prime_indices, planes.scales, planes.row_pointers)
    return Planes(*[metal.aligned(a[i : i + 1]) for a in arrays], planes.shape)


@pytest.mark.parametrize("kernel", metal.PRODUCTS)
def test_indices_choose_layers_and_are_clamped(kernel, stack, rng):
    x = rng.standard_normal((5, 2, 301)).astype(np.float32)
    bias = rng.standard_normal((3, 13)).astype(np.float32)
    y = metal.product(kernel, stack, x, INDEX, bias)
    for group, i in enumerate(CHOSEN):
        alone = metal.product(kernel, layer(stack, i), x[group : group + 1], bias=bias[i])
        # Another first entry of a lane adds in another order, so bits may differ where lanes have several entries.
        np.testing.assert_allclose(y[group], alone[0], rtol=0, atol=2e-4 * np.abs(alone).max())
        if kernel == "sparse_matvec":
            np.testing.assert_array_equal(y[group], alone[0])


def test_transposed_products_of_a_stack(stack, rng):
    g = rng.standard_normal((5, 2, 13)).astype(np.float32)
    y = metal.transposed(stack, g, INDEX)
    for group, i in enumerate(CHOSEN):
        np.testing.assert_array_equal(y[group], metal.transposed(layer(stack, i), g[group : group + 1])[0])


def test_decoding_a_stack(stack):
    dense = metal.decode(stack)
    for i in range(3):
        np.testing.assert_array_equal(dense[i], metal.decode(layer(stack, i))[0])
