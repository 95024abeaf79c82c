"""The joint search for `(q, k)`: optimal, and exact where the format promises it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracle import mdcsr as oracle

from upg_jax import MdCSR
from upg_jax._primes import prime_table
from upg_jax._quantize import nearest_levels


@pytest.fixture(scope="module")
def products():
    return np.outer(np.arange(128), np.array(oracle.primes())).astype(np.float64)


def test_prime_table_is_the_first_ten_thousand_primes():
    np.testing.assert_array_equal(prime_table(), oracle.primes())
    assert prime_table()[-1] == 104_729


def test_no_pair_is_nearer_than_the_one_found(products, rng):
    largest = products[-1, -1]
    targets = np.concatenate(
        [
            [0, 0.5, 0.99, 1, 1.01, 2, 2.5, largest, largest + 0.4, largest - 1, 104_729, 104_730],
            rng.uniform(0, 300, 60),
            rng.uniform(0, largest, 100),
            rng.choice(products.ravel(), 40),
            np.exp(rng.uniform(0, np.log(largest), 60)),
        ]
    )
    q, k = nearest_levels(targets)
    assert q.dtype == np.int8
    assert k.dtype == np.uint16
    assert q.min() >= 0
    found = np.abs(products[q.astype(int), k] - targets)
    nearest = np.array([np.abs(products - t).min() for t in targets])
    np.testing.assert_array_equal(found, nearest)


def test_half_way_between_two_levels_the_smaller_is_taken(products):
    levels = np.unique(products)
    targets = (levels[1:] + levels[:-1]) / 2
    q, k = nearest_levels(targets)
    np.testing.assert_array_equal(products[q.astype(int), k], levels[:-1])


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_gaussian_bfloat16_survivors_come_back_bit_for_bit(scale):
    w = (np.random.default_rng(7).standard_normal((4096, 1024)) * scale).astype(ml_dtypes.bfloat16)
    layer = MdCSR.from_dense(w, density=0.5, manifold="prime")
    survivors = np.abs(w.astype(np.float32)) >= np.sort(np.abs(w.astype(np.float32)), axis=None)[w.size // 2]
    decoded = np.asarray(layer.to_dense(np.float32))
    kept = decoded != 0
    assert np.count_nonzero(kept) == w.size // 2
    assert np.mean(kept[survivors]) > 0.98  # the rest tie with the threshold
    exact = w.astype(np.float32)[kept]
    assert np.mean(np.abs(decoded[kept] - exact) / np.abs(exact)) <= 5e-6
    assert np.mean(np.asarray(layer.to_dense())[kept] == w[kept]) >= 0.9999


def test_negative_weights_carry_their_sign_in_q(rng):
    w = rng.standard_normal((5, 40)).astype(np.float32)
    layer, mirrored = (MdCSR.from_dense(m, manifold="prime") for m in (w, -w))
    np.testing.assert_array_equal(np.asarray(layer.values), -np.asarray(mirrored.values))
    np.testing.assert_array_equal(layer.prime_indices, mirrored.prime_indices)
