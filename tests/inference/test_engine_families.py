"""Continuous batching of windows, experts and two sets of frequencies: answers are those of transformers."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.engines import Client, answered
from helpers.hf_families import (
    VOCABULARY,
    WINDOW,
    compressed_weights,
    dense_model,
    model_of,
    reference_logits,
)
from scipy.special import log_softmax

from upg_jax import _native
from upg_jax.inference import Engine

BASE = np.random.default_rng(0).integers(1, VOCABULARY, 70).tolist()
OTHER = np.random.default_rng(1).integers(1, VOCABULARY, 41).tolist()
SETTINGS = [{"logprobs": 0}, {"temperature": 1.1, "seed": 7, "logprobs": 0}]
# LongRoPE's border is 32: a server of that many tokens uses the short factors, and one of more the long ones.
CASES = [
    ("mistral", 96),
    ("gemma3", 96),
    ("mixtral", 96),
    ("mixtral compressed", 96),
    ("phi3", 32),
    ("phi3", 96),
]
SLOW = ("mistral", "mixtral compressed")


def requests(context):
    """Prompts, some of which begin alike, before and after a window is full; each with two kinds of settings."""
    prompts = [BASE[:5], BASE[:18], [*BASE[:18], 3, 3, 3, 3], OTHER[:20]]
    if context > 32:
        prompts += [BASE[:34], BASE[:50], [*BASE[:50], 7, 8], BASE, OTHER]
        assert len(BASE) > 3 * WINDOW
    return [
        (prompt, {**settings, "max_new_tokens": 8, "stop_at_eos": False})
        for prompt in prompts
        for settings in SETTINGS
    ]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id=f"{case[0]}-{case[1]}", marks=[pytest.mark.slow] if case[0] in SLOW else [])
        for case in CASES
    ],
)
def served(request):
    """A case, and what its requests are answered alone."""
    name, context = request.param
    family = name.split()[0]
    model = dense_model(family) if name == family else model_of(family, compressed_weights(family))
    engine = Engine(model, slots=3, context=context, chunk=16, max_waiting=40)
    wanted = requests(context)
    yield name, engine, wanted, [answered(engine, prompt, **settings) for prompt, settings in wanted]
    engine.close()


def test_answers_are_those_of_transformers(served):
    name, engine, wanted, alone = served
    if name == "mixtral compressed":
        pytest.skip("transformers has the weights before compression")
    compared = 0
    for (prompt, settings), (ids, logprobs, _) in zip(wanted, alone, strict=True):
        # It chooses the factors by the length that a sequence has, and an engine by the one it may come to have.
        if name == "phi3" and (engine.context > 32) != (len(prompt) > 32):
            continue
        logits = reference_logits(name, np.array([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
        expected = log_softmax(logits.astype(np.float64), axis=-1)
        # Logits are within 1e-4 of those of transformers (tests/models), so their differences within twice that.
        said = np.array([entry.logprob for entry in logprobs])
        np.testing.assert_allclose(said, expected[np.arange(8), ids], atol=2e-4, rtol=0)
        if "temperature" not in settings:
            assert (expected.max(axis=-1) - said < 2e-4).all()
        compared += 1
    assert compared >= 8


@pytest.mark.skipif(
    _native.load() is None,
    reason="attention in plain XLA reads as much as the longest sequence has, and rounds so",
)
def test_answers_are_the_same_bits_in_any_company(served):
    _, engine, wanted, alone = served
    clients = [Client(prompt, **settings) for prompt, settings in wanted]
    for client in reversed(clients):
        engine.submit([client.request])
    assert [client.result() for client in clients] == alone
