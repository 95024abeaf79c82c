"""Generation: the tokens that `transformers` gives, whatever the batch, the chunks and the stops."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_llama import compressed_model, dense_model, make

from upg_jax.inference import _generate
from upg_jax.inference._steps import cache_capacity, chunk_length

NEW = 20


def prompt_of(length, seed=0):
    return np.random.default_rng([length, seed]).integers(0, 101, length).tolist()


PROMPTS = [prompt_of(5), prompt_of(1), prompt_of(33), prompt_of(16)]


@pytest.fixture(scope="module")
def model():
    return dense_model("everything")


@pytest.fixture(scope="module")
def alone(model):
    """Each prompt's greedy answer when it is the only one."""
    return [model.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS]


def test_greedy_tokens_are_those_of_transformers(alone):
    import torch

    reference, _, _ = make("everything")
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer.ids == out[0, len(prompt) :].tolist()
        assert answer.prompt_tokens == len(prompt)
        assert answer.finish_reason == "length"
        assert answer.text is None


def test_each_prompt_of_a_ragged_batch_gets_the_answer_it_gets_alone(model, alone):
    assert model.generate(PROMPTS, max_new_tokens=NEW) == alone


def test_compressed_layers_answer_a_ragged_batch_alike():
    compressed = compressed_model("everything")
    together = compressed.generate(PROMPTS[:2], max_new_tokens=8)
    assert together == [compressed.generate(prompt, max_new_tokens=8) for prompt in PROMPTS[:2]]


def test_a_prompt_may_be_taken_in_in_chunks(model, alone, monkeypatch):
    monkeypatch.setattr(_generate, "CHUNK", 16)
    assert model.generate(PROMPTS, max_new_tokens=NEW) == alone


def test_an_answer_ends_before_an_eos_token_and_others_go_on(model, alone):
    # Tokens that the answers have in different places, or not at all.
    stops = (alone[0].ids[4], alone[2].ids[7])
    stopping = dataclasses.replace(model, eos_token_ids=stops)
    answers = stopping.generate(PROMPTS, max_new_tokens=NEW)
    for answer, full in zip(answers, alone, strict=True):
        at = min((full.ids.index(stop) for stop in stops if stop in full.ids), default=None)
        assert answer.ids == full.ids[:at]
        assert answer.finish_reason == ("length" if at is None else "stop")
    assert len({len(answer.ids) for answer in answers}) > 1
    assert [a.ids for a in stopping.generate(PROMPTS, max_new_tokens=NEW, stop_at_eos=False)] == [
        a.ids for a in alone
    ]


def test_no_step_runs_long_after_all_answers_have_ended(model, alone, monkeypatch):
    stopping = dataclasses.replace(model, eos_token_ids=(alone[0].ids[4],))
    steps = []
    advance = _generate.advance
    monkeypatch.setattr(_generate, "advance", lambda *args: steps.append(1) or advance(*args))
    assert len(stopping.generate(PROMPTS[0], max_new_tokens=NEW).ids) == 4
    # Four tokens, the end, and the step that was running already; the first token takes none.
    assert len(steps) == 5


@pytest.mark.parametrize("count", [0, 1, 2])
def test_max_new_tokens_is_exact(model, alone, count):
    answer = model.generate(PROMPTS[0], max_new_tokens=count)
    assert answer.ids == alone[0].ids[:count]
    assert answer.finish_reason == "length"


def test_seeds_reproduce_and_a_batch_counts_up_from_its_seed(model):
    settings = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    together = model.generate(PROMPTS, seed=7, **settings)
    assert together == model.generate(PROMPTS, seed=7, **settings)
    assert together == [model.generate(p, seed=7 + i, **settings) for i, p in enumerate(PROMPTS)]
    assert together == model.generate(PROMPTS, seed=[7, 8, 9, 10], **settings)
    assert together != model.generate(PROMPTS, seed=8, **settings)


def test_streaming_gives_the_same_tokens_and_the_reason_last(model, alone):
    stopping = dataclasses.replace(model, eos_token_ids=(alone[0].ids[4],))
    for one in (model, stopping):
        *tokens, end = one.stream(PROMPTS[0], max_new_tokens=NEW)
        answer = one.generate(PROMPTS[0], max_new_tokens=NEW)
        assert [token.id for token in tokens] == answer.ids
        assert all(token.finish_reason is None for token in tokens)
        assert (end.id, end.finish_reason) == (None, answer.finish_reason)


def test_nothing_compiles_after_a_warm_up(model, compilations):
    for settings in ({}, {"temperature": 1}, {"temperature": 1, "top_p": 0.5}, {"logprobs": 0}):
        model.generate(prompt_of(20), max_new_tokens=4, **settings)
    warm = len(compilations)
    for length, settings in [
        (17, {}),
        (32, {"max_new_tokens": 9}),
        (25, {"temperature": 0.7, "seed": 1}),
        (31, {"temperature": 1.3, "top_k": 7, "top_p": 0.5, "min_p": 0.1, "max_new_tokens": 60}),
        (18, {"stop_at_eos": False}),
        (19, {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1}),
        (20, {"logit_bias": {5: -100.0}, "logprobs": 3}),
    ]:
        model.generate(prompt_of(length), **{"max_new_tokens": 4, **settings})
        list(model.stream(prompt_of(length), **{"max_new_tokens": 4, **settings}))
    # Another model of the same shapes, too.
    dense_model("everything").generate(prompt_of(20), max_new_tokens=4)
    assert len(compilations) == warm
    jax.jit(lambda x: x + warm)(1.0)
    assert len(compilations) == warm + 1


def test_log_probabilities_are_those_of_transformers(model, alone):
    import torch

    reference, _, _ = make("everything")
    answers = model.generate(
        PROMPTS[:3], max_new_tokens=6, logprobs=4, frequency_penalty=0.5, temperature=0.9, top_k=9, seed=1
    )
    for prompt, answer in zip(PROMPTS, answers, strict=False):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.double(), dim=-1).numpy()
        assert len(answer.logprobs) == len(answer.ids)
        for i, (token, entry) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
            assert entry.token == token
            assert abs(entry.logprob - expected[i, token]) < 1e-4
            order = np.argsort(-expected[i])[:4]
            assert [t for t, _ in entry.top] == order.tolist()
            np.testing.assert_allclose([p for _, p in entry.top], expected[i, order], atol=1e-4)
    assert alone[0].logprobs is None


def test_a_repetition_penalty_gives_the_tokens_of_transformers(model):
    import torch

    reference, _, _ = make("everything")
    for prompt in PROMPTS[:2]:
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            repetition_penalty=1.5,
            eos_token_id=None,
            pad_token_id=0,
        )
        answer = model.generate(prompt, max_new_tokens=NEW, repetition_penalty=1.5)
        assert answer.ids == out[0, len(prompt) :].tolist()


def test_a_bias_bans_and_forces_tokens(model, alone):
    banned = alone[0].ids[0]
    answer = model.generate(PROMPTS[0], max_new_tokens=NEW, logit_bias={banned: -1e9})
    assert banned not in answer.ids
    assert model.generate(PROMPTS[0], max_new_tokens=3, logit_bias={7: 1e9}).ids == [7, 7, 7]


def test_several_answers_to_a_prompt_are_those_of_their_seeds(model):
    settings = {"max_new_tokens": 8, "temperature": 1.5}
    three = model.generate(PROMPTS[0], n=3, seed=5, **settings)
    assert three == [model.generate(PROMPTS[0], seed=5 + i, **settings) for i in range(3)]
    assert len({tuple(answer.ids) for answer in three}) == 3
    ragged = model.generate(PROMPTS[:2], n=2, seed=5, **settings)
    assert ragged[0] == three[:2]
    assert ragged[1] == [model.generate(PROMPTS[1], seed=7 + i, **settings) for i in range(2)]


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(1, 16), (16, 16), (17, 32), (24, 32), (33, 48), (48, 48), (49, 64), (65, 96), (97, 128), (385, 512)],
)
def test_chunks_are_padded_to_a_few_lengths(tokens, length):
    assert chunk_length(tokens) == length


@pytest.mark.parametrize("tokens", [1, 128, 129, 192, 193, 256, 257, 384, 385, 5000])
def test_cache_capacities_come_from_a_short_list(tokens):
    capacity = cache_capacity(tokens)
    assert capacity >= max(tokens, 128)
    assert capacity < 1.5 * max(tokens, 128)
    assert capacity in {factor << k for factor in (2, 3) for k in range(6, 14)}


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (np.zeros(0, np.int32), {}, "at least one token long"),
        ([[1, 2], []], {}, "at least one token long"),
        ([1, 101], {}, r"token ids must be in \[0, 101\); got 101"),
        ([1, -1], {}, r"token ids must be in \[0, 101\); got -1"),
        ("text", {}, "has no tokenizer; give token ids"),
        ([1.5, 2.0], {}, "must be text or a list of token ids"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be an integer of at least 0; got -1"),
        ([1], {"max_new_tokens": 2.0}, "max_new_tokens must be an integer of at least 0; got 2.0"),
        ([1], {"temperature": -1.0}, "temperature must be"),
        ([1], {"n": 0}, "n must be an integer of at least 1; got 0"),
        ([1], {"stop": "a"}, "stop texts need a tokenizer"),
        ([1], {"logit_bias": {101: 1.0}}, r"logit_bias must be for token ids in \[0, 101\); got 101"),
    ],
)
def test_what_cannot_be_answered_is_refused(model, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **settings)


def test_an_empty_batch_has_no_answers(model):
    assert model.generate([]) == []


def test_ids_may_be_an_array(model, alone):
    assert model.generate(np.array(PROMPTS[0], np.uint16), max_new_tokens=NEW) == alone[0]
    assert model.generate([np.array(PROMPTS[0])], max_new_tokens=NEW) == alone[:1]


def test_ids_on_a_device_are_one_prompt(model, alone):
    ids = prompt_of(5)
    expected = model.generate(ids, max_new_tokens=3)
    assert model.generate(jnp.asarray(ids, jnp.int32), max_new_tokens=3) == expected


def test_more_tokens_than_the_model_has_positions_for_are_refused_before_memory_is_taken(model):
    with pytest.raises(
        ValueError, match=r"prompt of 5 tokens and max_new_tokens=10{12} exceed the \d+ positions"
    ):
        model.generate(prompt_of(5), max_new_tokens=10**12)
