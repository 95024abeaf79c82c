"""Decoded weights are the reference's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import metal
from helpers.metal import Planes, each_float32_case
from oracle import mdcsr as oracle

from upg_jax import use_backend


@each_float32_case
@pytest.mark.parametrize("tile", [16, 1024])
def test_weights_of_every_structure(tile, case):
    dense = metal.decode(Planes.of(case.layer), tile=tile)
    np.testing.assert_array_equal(dense[0], oracle.decode_layer(case.layer))
    with use_backend("reference"):
        assert dense[0].tobytes() == np.asarray(case.layer.to_dense(np.float32)).tobytes()
