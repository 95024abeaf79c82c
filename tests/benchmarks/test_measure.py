"""Timing in turns: who runs when, how often, and what quartiles are."""

from __future__ import annotations

import time

import numpy as np
import pytest

from upg_jax.cli import _measure


def test_contenders_take_turns_until_each_has_its_repeats(monkeypatch):
    monkeypatch.setattr(_measure, "SETTLING", 0.0)
    ran = []
    seconds = _measure.take_turns({name: lambda name=name: ran.append(name) for name in "ab"}, repeats=4)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4}
    # Whatever runs untimed, a turn of one ends before the other's begins.
    turns = [name for i, name in enumerate(ran) if i == 0 or ran[i - 1] != name]
    assert turns == ["a", "b"] * 5


def test_a_slow_contender_gets_fewer_repeats_but_three_and_a_quick_one_all():
    seconds = _measure.take_turns({"slow": lambda: time.sleep(0.03), "quick": lambda: None}, 8, budget=0.05)
    assert len(seconds["slow"]) == 3
    assert len(seconds["quick"]) == 8
    assert min(seconds["slow"]) >= 0.03
    assert max(seconds["quick"]) < 0.03


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_quartiles_are_numpys(count, rng):
    seconds = rng.random(count)
    np.testing.assert_allclose(_measure.quartiles(seconds.tolist()), np.percentile(seconds, [25, 50, 75]))


def test_bandwidth_counts_a_copied_byte_twice(monkeypatch):
    monkeypatch.setattr(_measure, "_time", lambda call: call() and 0.5)
    found = _measure.bandwidth(passes=1, megabytes=4)
    assert found == {"read": 2 * (4 << 20), "copy": 4 * (4 << 20)}
