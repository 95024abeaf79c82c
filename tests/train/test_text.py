"""`TokenWindows`: what it draws, and that the seed alone decides."""

from __future__ import annotations

import numpy as np
import pytest

from upg_jax.train import TokenWindows


def test_a_pass_has_every_window_of_a_cut_once():
    windows = TokenWindows(np.arange(1000), window=16, batch=4)
    first = windows.per_pass // 4
    drawn = np.concatenate([windows[step] for step in range(first)])
    starts = np.sort(drawn[:, 0])
    np.testing.assert_array_equal(drawn, drawn[:, :1] + np.arange(16))
    np.testing.assert_array_equal(np.diff(starts) % 16, 0)
    assert len(set(starts.tolist())) == drawn.shape[0]


def test_passes_differ_and_a_seed_repeats_them():
    one, same, other = (TokenWindows(np.arange(500), 8, 2, seed) for seed in (0, 0, 1))
    far = one.per_pass * 3
    np.testing.assert_array_equal(one[far], same[far])
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], one[one.per_pass // 2])


def test_a_short_text_is_refused():
    with pytest.raises(ValueError, match="2 windows of 8 and 20 tokens"):
        TokenWindows(np.arange(20), 8, 2)
