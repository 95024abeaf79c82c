"""Answers as they grow: stop texts wherever tokens are cut, EOS tokens, limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upg_jax.inference import GenerationSettings
from upg_jax.inference._answer import Answer


class Letters:
    """A tokenizer whose token `i` is text `i` of a list."""

    special_ids = frozenset()

    def __init__(self, texts):
        self.texts = texts

    def knows(self, token):
        return token < len(self.texts)

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(self.texts[i] for i in ids)


def answered(texts, eos=(), **settings):
    """The pieces shown, and the answer."""
    answer = Answer(Letters(texts), GenerationSettings(max_new_tokens=len(texts), **settings), eos)
    pieces = []
    for token in range(len(texts)):
        shown = answer.push(token)
        pieces += [shown.text] if shown else []
        if answer.finish_reason:
            break
    return [*pieces, answer.finish().text], answer


@pytest.mark.parametrize(
    ("texts", "stop", "shown", "reason"),
    [
        (["a", "b", "c"], "x", ["a", "b", "c", ""], "length"),
        (["a", "b", "c"], "b", ["a", "", ""], "stop"),
        (["a", "b", "c", "d"], "bc", ["a", "", "", ""], "stop"),
        (["a", "b", "d"], "bc", ["a", "", "bd", ""], "length"),
        (["a", "b", "b", "c"], "bc", ["a", "", "b", "", ""], "stop"),
        (["abcd", "e"], "bc", ["a", ""], "stop"),
        (["a", "\n"], "\n\n", ["a", "", "\n"], "length"),
        (["a", "\n", "\n"], ["x", "\n\n"], ["a", "", "", ""], "stop"),
        (["aab", "aac"], "aabaac", ["", "", ""], "stop"),
    ],
)
def test_text_stops_before_a_stop_text_and_no_part_of_it_is_shown(texts, stop, shown, reason):
    pieces, answer = answered(texts, stop=stop)
    assert pieces == shown
    assert answer.finish_reason == reason


@given(
    st.text("ab", min_size=1, max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.data(),
)
def test_a_stop_text_is_found_however_tokens_cut_it(text, stops, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(text) - 1, 1)))))
    tokens = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True) if i < j]
    pieces, answer = answered(tokens, stop=stops)
    # The first token with which any stop text is complete ends the answer.
    for count in range(1, len(tokens) + 1):
        said = "".join(tokens[:count])
        found = [said.index(stop) for stop in stops if stop in said]
        if found:
            assert ("".join(pieces), answer.finish_reason) == (said[: min(found)], "stop")
            assert len(answer.ids) == count
            break
    else:
        assert ("".join(pieces), answer.finish_reason) == (text, "length")


def test_an_eos_token_ends_an_answer_and_is_not_shown():
    pieces, answer = answered(["a", "b", "c"], eos=(1, 7))
    assert (pieces, answer.ids, answer.finish_reason) == (["a", ""], [0], "stop")
    pieces, answer = answered(["a", "b"], eos=(1,), stop_at_eos=False)
    assert (pieces, answer.ids, answer.finish_reason) == (["a", "b", ""], [0, 1], "length")


def test_what_may_have_begun_a_stop_text_is_shown_when_the_model_ends():
    pieces, answer = answered(["a", "b", "!"], eos=(2,), stop="bc")
    assert (pieces, answer.finish_reason) == (["a", "", "b"], "stop")


def test_stop_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop texts need a tokenizer"):
        Answer(None, GenerationSettings(stop="x"), ())
