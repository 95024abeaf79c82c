"""Continuous batching: every answer is the one that the request gets alone, and no row is ever lost."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers.engines import Client, answered, idle
from helpers.hf_llama import dense_model

from upg_jax import _native
from upg_jax.inference import Engine, EngineBusyError, EngineClosedError

SETTINGS = [
    {},
    {"temperature": 1.2, "seed": 3},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 4},
    {"repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.7, "frequency_penalty": 0.2, "seed": 5},
    {"logit_bias": {4: 3.0, 9: -100.0}, "logprobs": 0},
]


def prompt_of(length):
    return np.random.default_rng(length).integers(0, 101, length).tolist()


@pytest.fixture(scope="module")
def model():
    return dense_model("everything")


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, slots=3, context=160, chunk=32, max_waiting=40)
    engine.warm_up()
    yield engine
    engine.close()


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_answers_are_those_of_generate(model, engine, settings):
    # Longer than a chunk; other chunks and another batch only round differently.
    expected = model.generate(prompt_of(70), max_new_tokens=8, **settings)
    ids, logprobs, reason = answered(engine, prompt_of(70), max_new_tokens=8, **settings)
    assert (ids, reason) == (expected.ids, "length")
    if settings.get("logprobs") is not None:
        ours, theirs = ([entry.logprob for entry in entries] for entries in (logprobs, expected.logprobs))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert [len(entry.top) for entry in logprobs] == [settings["logprobs"]] * 8


@pytest.mark.skipif(
    _native.load() is None,
    reason="attention in plain XLA reads as much as the longest sequence has, and rounds so",
)
def test_answers_are_the_same_bits_in_any_company_and_nothing_compiles(engine, compilations):
    wanted = [
        (
            prompt_of(length),
            {**SETTINGS[i % len(SETTINGS)], "max_new_tokens": new, "logprobs": 1 if i % 3 else None},
        )
        for i, (length, new) in enumerate(
            [(5, 60), (100, 3), (33, 20), (1, 9), (70, 40), (16, 1), (120, 30), (8, 12), (40, 50), (2, 25)]
        )
    ]
    alone = [answered(engine, prompt, **settings) for prompt, settings in wanted]
    before = len(compilations)
    clients = [Client(prompt, **settings) for prompt, settings in wanted]
    for client in reversed(clients):
        engine.submit([client.request])
    together = [client.result() for client in clients]
    assert together == alone
    assert idle(engine)
    assert len(compilations) == before
    jax.jit(lambda x: x + before)(1.0)
    assert len(compilations) == before + 1


def test_equal_prompts_are_computed_once(engine, monkeypatch):
    from upg_jax.inference import _prompt_cache

    calls = []
    prefill = _prompt_cache.prefill
    monkeypatch.setattr(_prompt_cache, "prefill", lambda *args: calls.append(1) or prefill(*args))
    clients = [Client(prompt_of(50), max_new_tokens=4, temperature=1.0, seed=i) for i in range(5)]
    engine.submit([client.request for client in clients])
    answers = [client.result() for client in clients]
    assert len(calls) == 2
    assert answers == [
        answered(engine, prompt_of(50), max_new_tokens=4, temperature=1.0, seed=i) for i in range(5)
    ]


def test_what_a_prompt_begins_with_as_the_one_before_is_not_computed_again(engine, monkeypatch):
    from upg_jax.inference import _prompt_cache

    calls = []
    prefill = _prompt_cache.prefill
    monkeypatch.setattr(
        _prompt_cache, "prefill", lambda *args: calls.append(args[2].shape[1]) or prefill(*args)
    )
    base = prompt_of(120)
    settings = {"max_new_tokens": 5, "logprobs": 3}
    answered(engine, prompt_of(20), **settings)
    for prompt, lengths in [
        (base[:70], [32, 32, 16]),
        (base[:100], [32, 16]),
        ([*base[:64], 7, 8], [16]),
        (base[:64], [32]),
        ([*base[:40], 5, *base[41:]], [32, 32, 32]),
    ]:
        calls.clear()
        found = answered(engine, prompt, **settings)
        assert calls == lengths
        answered(engine, prompt_of(20), **settings)
        assert answered(engine, prompt, **settings) == found
        # As before it.
        answered(engine, prompt, **{**settings, "max_new_tokens": 1})


def test_a_cancelled_request_frees_its_row_at_once_and_others_go_on(engine):
    forever = [Client(prompt_of(3), max_new_tokens=150) for _ in range(3)]
    engine.submit([client.request for client in forever])
    waits = Client(prompt_of(4), max_new_tokens=2)
    engine.submit([waits.request])
    never = Client(prompt_of(6), max_new_tokens=2)
    engine.submit([never.request])
    for client in forever:
        client.events.get(timeout=60)
    engine.cancel(never.request)
    assert engine.waiting == 1
    engine.cancel(forever[1].request)
    assert waits.result() == answered(engine, prompt_of(4), max_new_tokens=2)
    assert len(forever[0].result()[0]) == 149  # one was read above
    engine.cancel(forever[2].request)
    assert idle(engine)
    assert never.events.empty()


def test_too_many_requests_are_refused_all_or_none(model):
    engine = Engine(model, slots=1, context=64, chunk=16, max_waiting=1)
    clients = [Client(prompt_of(3), max_new_tokens=4) for _ in range(3)]
    with pytest.raises(EngineBusyError, match="try again later"):
        engine.submit([client.request for client in clients])
    engine.submit([client.request for client in clients[:2]])
    assert [len(client.result()[0]) for client in clients[:2]] == [4, 4]
    engine.close()


def test_one_slot_without_a_queue_takes_one_request_after_another(model):
    engine = Engine(model, slots=1, context=64, chunk=16, max_waiting=0)
    # Whoever has the last token may ask again, before the engine has tidied up.
    assert [len(answered(engine, prompt_of(3), max_new_tokens=2)[0]) for _ in range(20)] == [2] * 20
    engine.close()


def test_a_token_that_the_model_does_not_have_is_refused_and_harms_nobody(model):
    """As of a tokenizer with more tokens than the model."""
    engine = Engine(model, slots=1, context=64, chunk=16)
    with pytest.raises(ValueError, match="token ids must be in"):
        engine.submit([Client([1, model.config.vocab_size], max_new_tokens=1).request])
    assert engine.alive
    assert len(answered(engine, prompt_of(3), max_new_tokens=1)[0]) == 1
    engine.close()


def test_closing_finishes_what_it_may_and_ends_the_rest(model):
    engine = Engine(model, slots=1, context=64, chunk=16)
    first, second = (Client(prompt_of(3), max_new_tokens=n) for n in (5, 6))
    engine.submit([first.request, second.request])
    engine.close(timeout=60)
    assert [len(client.result()[0]) for client in (first, second)] == [5, 6]
    with pytest.raises(EngineClosedError, match="takes no more requests"):
        engine.submit([Client(prompt_of(3), max_new_tokens=1).request])
    engine = Engine(model, slots=1, context=160, chunk=16)
    endless = Client(prompt_of(3), max_new_tokens=150)
    engine.submit([endless.request])
    endless.events.get(timeout=60)
    engine.close()
    with pytest.raises(EngineClosedError, match="before the answer was finished"):
        endless.result()


def test_a_failure_of_the_device_reaches_everybody_who_waits(model, monkeypatch):
    from upg_jax.inference import _slots

    engine = Engine(model, slots=1, context=64, chunk=16)
    monkeypatch.setattr(_slots, "advance", lambda *args: 1 / 0)
    clients = [Client(prompt_of(3), max_new_tokens=5) for _ in range(2)]
    engine.submit([client.request for client in clients])
    for client in clients:
        with pytest.raises(ZeroDivisionError):
            client.result()
    assert not engine.alive
    assert isinstance(engine.failure, ZeroDivisionError)
    engine.close()


def test_a_panic_below_python_reaches_who_waits(model, monkeypatch):
    """What Rust's libraries raise is no `Exception`."""
    from upg_jax.inference import _slots

    class PanicError(BaseException):
        pass

    def panic(*args):
        raise PanicError("called `Option::unwrap()` on a `None` value")

    engine = Engine(model, slots=1, context=64, chunk=16)
    monkeypatch.setattr(_slots, "advance", panic)
    client = Client(prompt_of(3), max_new_tokens=5)
    engine.submit([client.request])
    with pytest.raises(RuntimeError, match="PanicError: called"):
        client.result()
    assert not engine.alive
    engine.close()


def test_a_warm_up_that_fails_says_so(model, monkeypatch):
    from upg_jax.inference import _slots

    engine = Engine(model, slots=1, context=64, chunk=16)
    monkeypatch.setattr(_slots, "advance", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.warm_up()
    engine.close()


@pytest.mark.parametrize(
    ("prompt", "settings"), [([], {}), ([1], {"max_new_tokens": 0}), ([1] * 100, {"max_new_tokens": 61})]
)
def test_what_does_not_fit_is_refused(engine, prompt, settings):
    with pytest.raises(ValueError, match="at least 1 token each and at most 160 together"):
        engine.submit([Client(prompt, **settings).request])
