"""Perplexity against a sum over windows in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.hf_llama import dense_model, reference_logits

from upg_jax.inference import Perplexity, perplexity

IDS = np.random.default_rng(5).integers(0, 101, 50)


def by_hand(predictions):
    """Mean over (first id of the context, id predicted), from the logits of `transformers`."""
    total = 0.0
    for start, at in predictions:
        logits = reference_logits("everything", IDS[None, start:at])[0, -1].astype(np.float64)
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[IDS[at]]
    return total / len(predictions)


@pytest.mark.parametrize(
    ("window", "stride", "windows", "predictions"),
    [
        (64, None, 1, [(0, t) for t in range(1, 50)]),
        (16, None, 4, [(t // 16 * 16, t) for t in range(50) if t % 16]),
        # Windows begin at 0, 4, 8, ...; a token is predicted in the first that has it.
        (16, 4, 10, [(max(0, -(-(t - 15) // 4) * 4), t) for t in range(1, 50)]),
        (16, 1, 35, [(max(0, t - 15), t) for t in range(1, 50)]),
        (2, 1, 49, [(t - 1, t) for t in range(1, 50)]),
    ],
)
def test_every_token_is_predicted_once_from_its_window(window, stride, windows, predictions):
    found = perplexity(dense_model("everything"), IDS, window=window, stride=stride)
    assert (found.tokens, found.windows) == (len(predictions), windows)
    assert (found.window, found.stride) == (window, stride or window)
    # Logits agree to 1e-4, so log-likelihoods do to twice that.
    assert found.nll == pytest.approx(by_hand(predictions), abs=2e-4)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_a_lone_last_token_without_context_is_not_a_window():
    found = perplexity(dense_model("everything"), IDS[:33], window=16)
    assert (found.tokens, found.windows) == (30, 2)


def test_progress_is_told_after_each_window():
    seen = []
    perplexity(
        dense_model("everything"), IDS, window=16, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_hopeless_model_is_infinitely_perplexed():
    assert Perplexity(nll=1000.0, tokens=1, windows=1, window=2, stride=2).perplexity == math.inf


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([1], {}, "the text must have at least two tokens; got 1"),
        ([1, 2], {"window": 1}, "window must be at least 2"),
        ([1, 2], {"window": 8, "stride": 9}, r"stride in \[1, window\]; got 8 and 9"),
        ([1, 2], {"window": 8, "stride": 0}, r"stride in \[1, window\]; got 8 and 0"),
        ([1, 200], {}, r"token ids must be in \[0, 101\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(ids, settings, message):
    with pytest.raises(ValueError, match=message):
        perplexity(dense_model("everything"), ids, **settings)
