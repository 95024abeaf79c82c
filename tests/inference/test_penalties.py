"""Penalties and biases: against NumPy in plain loops, and against transformers where it has them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upg_jax.inference import GenerationSettings, Sampling
from upg_jax.inference._penalties import History, penalized

VOCABULARY = 60
apply = jax.jit(penalized)


def said(settings, prompt, answer):
    """The history of one row after an answer."""
    history = jax.device_put(History.create([prompt], settings, VOCABULARY))
    for token in answer:
        history = history.add(jnp.array([token]), jnp.array([False]))
    return history


def ours(logits, prompt, answer, **settings):
    sampling = Sampling.create(1, **settings)
    history = said(GenerationSettings(**settings), prompt, answer)
    return np.asarray(apply(jnp.asarray(logits[None]), sampling, history)[0])


def oracle(logits, prompt, answer, repetition=1.0, frequency=0.0, presence=0.0, bias=None):
    """As the definitions say, a token at a time."""
    scores = logits.astype(np.float64)
    for token in range(len(scores)):
        if token in prompt or token in answer:
            scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
        scores[token] -= answer.count(token) * frequency + (token in answer) * presence
        scores[token] += (bias or {}).get(token, 0.0)
    return scores


@pytest.mark.parametrize("seed", range(6))
def test_penalties_and_bias_are_those_of_the_definitions(seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=VOCABULARY) * 5).astype(np.float32)
    prompt, answer = rng.integers(0, VOCABULARY, 9).tolist(), rng.integers(0, 12, 20).tolist()
    repetition, frequency, presence = (float(np.float32(x)) for x in rng.uniform(0.3, 2.0, 3))
    bias = {int(t): float(np.float32(rng.normal() * 30)) for t in rng.integers(0, VOCABULARY, 5)}
    found = ours(
        logits,
        prompt,
        answer,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
    )
    expected = oracle(logits, prompt, answer, repetition, frequency, presence, bias)
    # Five roundings, each of at most half a unit of the largest intermediate.
    largest = np.abs(logits) * max(repetition, 1 / repetition) + 20 * frequency + presence + 100
    assert np.all(np.abs(found - expected) <= 5 * 2.0**-24 * largest)


def test_the_repetition_penalty_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason='pip install "upg-jax[oracle]"')
    torch = pytest.importorskip("torch", reason='pip install "upg-jax[oracle]"')
    logits = np.random.default_rng(1).normal(size=VOCABULARY).astype(np.float32)
    prompt, answer = [3, 3, 9, 41], [7, 9, 7]
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor([prompt + answer]), torch.tensor(logits[None])).numpy()[0]
    np.testing.assert_allclose(ours(logits, prompt, answer, repetition_penalty=1.3), expected, rtol=2**-23)


def test_a_row_without_settings_keeps_its_bits_beside_one_with_them():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, VOCABULARY)), jnp.float32)
    rows = [Sampling.create(1), Sampling.create(1, repetition_penalty=1.7, presence_penalty=0.3)]
    sampling = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    history = History.create([[1, 2], [1, 2]], GenerationSettings(), VOCABULARY)
    found = apply(logits, sampling, history)
    np.testing.assert_array_equal(found[0], logits[0])
    assert not np.array_equal(found[1], logits[1])


def test_rows_that_are_done_count_no_tokens():
    history = jax.device_put(History.create([[1], [1]], GenerationSettings(), VOCABULARY))
    history = history.add(jnp.array([5, 5]), jnp.array([False, True]))
    np.testing.assert_array_equal(history.counts[:, 5], [1, 0])


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_bias_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=rf"logit_bias must be for token ids in \[0, 60\); got {token}"):
        GenerationSettings(logit_bias={token: 1.0}).bias(VOCABULARY)
