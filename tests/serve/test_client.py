"""What OpenAI's own client sees: the answers that `generate` gives, whole and in pieces."""

from __future__ import annotations

import math

import pytest

openai = pytest.importorskip("openai", reason='pip install "upg-jax[test]"')

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "he says é"}]
CHAT = {"model": "small", "messages": MESSAGES}


def expected(model, **settings):
    return model.generate(model.tokenizer.encode_chat(MESSAGES), **settings)


def test_a_chat_is_answered_as_by_generate(client, model):
    answer = client.chat.completions.create(**CHAT, max_tokens=12, temperature=0)
    own = expected(model, max_new_tokens=12)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", own.text)
    assert choice.finish_reason == own.finish_reason
    assert answer.object == "chat.completion"
    assert answer.model == "small"
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert usage == (own.prompt_tokens, len(own.ids), own.prompt_tokens + len(own.ids))


def test_a_streamed_chat_adds_up_to_the_whole_one(client):
    settings = {"temperature": 1.3, "seed": 5, "max_completion_tokens": 20, "n": 2}
    whole = client.chat.completions.create(**CHAT, **settings)
    pieces = list(
        client.chat.completions.create(
            **CHAT, **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({piece.id for piece in pieces}) == 1
    for index in range(2):
        mine = [p.choices[0] for p in pieces if p.choices and p.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == whole.choices[index].message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [whole.choices[index].finish_reason]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert pieces[-1].choices == []
    assert pieces[-1].usage == whole.usage


def test_the_settings_are_those_of_generate(client, model):
    shared = {"temperature": 1.5, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": -0.5, "seed": 9}
    others = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2}
    answer = client.chat.completions.create(
        **CHAT, **shared, extra_body={**others, "ignore_eos": True}, max_tokens=15, logit_bias={"70": 5}
    )
    own = expected(model, **shared, **others, max_new_tokens=15, logit_bias={70: 5.0}, stop_at_eos=False)
    assert answer.choices[0].message.content == own.text


def test_seeds_reproduce_and_their_absence_does_not(client):
    def said(**seed):
        answer = client.chat.completions.create(**CHAT, max_tokens=20, temperature=2, **seed)
        return answer.choices[0].message.content

    assert said(seed=1) == said(seed=1)
    assert len({said() for _ in range(3)}) > 1


def test_a_stop_text_ends_an_answer(client, model):
    text = expected(model, max_new_tokens=20).text
    stop = text[len(text) // 2 :][:2]
    assert len(stop) == 2
    for stream in (False, True):
        answer = client.chat.completions.create(
            **CHAT, max_tokens=20, temperature=0, stop=[stop], stream=stream
        )
        if stream:
            pieces = list(answer)
            said = "".join(p.choices[0].delta.content or "" for p in pieces)
            reason = pieces[-1].choices[0].finish_reason
        else:
            said, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (said, reason) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_come_with_tokens_and_bytes(client, model, stream):
    answer = client.chat.completions.create(
        **CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3, stream=stream
    )
    if stream:
        entries = [e for p in answer if p.choices[0].logprobs for e in p.choices[0].logprobs.content]
    else:
        entries = answer.choices[0].logprobs.content
    own = expected(model, max_new_tokens=6, logprobs=3)
    assert len(entries) == len(own.ids)
    for entry, mine in zip(entries, own.logprobs, strict=True):
        assert entry.logprob == pytest.approx(mine.logprob, abs=1e-4)
        assert bytes(entry.bytes) == model.tokenizer.token_bytes(mine.token)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            [p for _, p in mine.top], abs=1e-4
        )


def test_completions_take_texts_ids_and_lists_of_either(client, model):
    ids = model.tokenizer.encode("he he")
    own = model.generate("he he", max_new_tokens=16).text
    for prompt in ("he he", ids):
        assert client.completions.create(model="small", prompt=prompt, temperature=0).choices[0].text == own
    for prompt in (["he he", "x"], [ids, model.tokenizer.encode("x")]):
        answer = client.completions.create(model="small", prompt=prompt, temperature=0, n=2, max_tokens=16)
        assert [c.index for c in answer.choices] == [0, 1, 2, 3]
        other = model.generate("x", max_new_tokens=16).text
        assert [c.text for c in answer.choices] == [own, own, other, other]


def test_a_streamed_completion_with_echo_and_log_probabilities(client, model):
    own = model.generate("he he", max_new_tokens=8, logprobs=2)
    pieces = list(
        client.completions.create(
            model="small", prompt="he he", temperature=0, max_tokens=8, stream=True, echo=True
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces) == "he he" + own.text
    entries = client.completions.create(
        model="small", prompt="he he", temperature=0, max_tokens=8, logprobs=2
    )
    entries = entries.choices[0].logprobs
    assert entries.token_logprobs == pytest.approx([e.logprob for e in own.logprobs], abs=1e-4)
    assert all(math.isfinite(p) for top in entries.top_logprobs for p in top.values())
    assert entries.text_offset[0] == 0


def test_the_model_is_listed(client):
    assert [m.id for m in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("../../etc/passwd")


def test_an_answer_can_be_sent_back_as_it_came(client):
    answer = client.chat.completions.create(**CHAT, max_tokens=4).choices[0].message
    for said in (answer, answer.model_dump()):
        following = [*MESSAGES, said, {"role": "user", "content": "and?"}]
        assert client.chat.completions.create(model="small", messages=following, max_tokens=4).choices


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.NotFoundError, match="the model 'large' does not exist") as caught:
        client.chat.completions.create(model="large", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, max_tokens=120)
    assert caught.value.code == "context_length_exceeded"
