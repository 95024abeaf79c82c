"""The tokenizer's files, and text that comes token by token."""

from __future__ import annotations

import errno
import functools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models.texts import TEXTS

from upg_jax import CheckpointError, MissingDependencyError
from upg_jax.inference import TextStream, Tokenizer
from upg_jax.inference._tokenizer import _byte_level

tokenizers = pytest.importorskip("tokenizers", reason='pip install "upg-jax[hf]"')


@functools.cache
def byte_level():
    """A byte-level BPE, small enough that most characters beyond ASCII take several tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@functools.cache
def byte_fallback():
    """In the manner of Llama 2: words begin with a mark, the first space of a text goes, bytes stand in."""
    words = ["▁", "▁the", "▁capital", "a", "b", "é", "s", ".", "▁a"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + words:
        vocabulary[token] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_streamed_text_is_the_text_and_never_has_half_a_character(text):
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 399), max_size=30))
def test_streaming_any_ids_gives_what_decoding_them_gives(ids):
    tokenizer = Tokenizer(byte_level())
    ids = [i % tokenizer.vocab_size for i in ids]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(
    parts=st.lists(
        st.one_of(st.sampled_from(["▁the", "▁capital", "▁", "é", "a"]), st.characters(codec="utf-8"))
    )
)
def test_streaming_words_and_characters_spelled_in_bytes_gives_what_decoding_gives(parts):
    tokenizer = Tokenizer(byte_fallback())
    ids = []
    for part in parts:
        known = tokenizer.token_id(part)
        ids += [tokenizer.token_id(f"<0x{b:02X}>") for b in part.encode()] if known is None else [known]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_with_its_last_byte():
    tokenizer = Tokenizer(byte_fallback())
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "a🙂".encode()]
    assert streamed(tokenizer, ids) == ["a", "", "", "", "🙂", ""]


def test_bytes_that_never_become_a_character_come_at_the_end():
    tokenizer = Tokenizer(byte_fallback())
    ids = [tokenizer.token_id("a"), tokenizer.token_id("<0xF0>")]
    assert streamed(tokenizer, ids) == ["a", "", "\ufffd"]


@functools.cache
def pieces_of_characters():
    """A byte-level vocabulary of whole characters and of pieces that begin or end within one."""
    pieces = [b"a", "\u4e2d".encode(), b"\x80", b"\x80\xe4", b"\xe4\xb8", b"\xad", b"\xf0\x9f", b"\x90\x80"]
    spelled = {byte: character for character, byte in _byte_level().items()}
    vocabulary = {"".join(spelled[byte] for byte in piece): i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(tokenizer)


@given(
    ids=st.lists(st.integers(0, 7), max_size=6), times=st.integers(1, 20), then=st.lists(st.integers(0, 7))
)
def test_long_runs_of_bytes_that_are_no_characters_give_what_decoding_gives(ids, times, then):
    tokenizer, ids = pieces_of_characters(), ids * times + then
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("spelled", ["<0x80>", "<s>"])
def test_a_token_takes_the_same_time_however_many_came_before_that_show_nothing(spelled):
    class Counting(Tokenizer):
        longest = 0

        def decode(self, ids, **more):
            ids = list(ids)
            self.longest = max(self.longest, len(ids))
            return super().decode(ids, **more)

    tokenizer = Counting(byte_fallback())
    pieces = streamed(tokenizer, [tokenizer.token_id(spelled)] * 400)
    assert "".join(pieces) == ("\ufffd" * 400 if spelled == "<0x80>" else "")
    assert tokenizer.longest <= 32


def test_ids_without_a_token_are_not_kept():
    tokenizer = Tokenizer(byte_level())
    stream, word = TextStream(tokenizer), tokenizer.encode("he")
    assert [stream.push(tokenizer.vocab_size + i) for i in range(100)] == [""] * 100
    assert stream._ids == []
    assert "".join([*map(stream.push, word), stream.finish()]) == "he"


def test_a_words_leading_space_is_kept_and_the_texts_is_not():
    tokenizer = Tokenizer(byte_fallback())
    ids = [tokenizer.token_id("▁the"), tokenizer.token_id("▁capital"), tokenizer.token_id("s")]
    assert streamed(tokenizer, ids) == ["the", " capital", "s", ""]


def test_special_tokens_are_not_shown():
    tokenizer = Tokenizer(byte_level())
    ids = [tokenizer.token_id("<s>"), *tokenizer.encode("hello"), tokenizer.token_id("</s>")]
    assert "".join(streamed(tokenizer, ids)) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hello</s>"


def write(directory, **files):
    byte_level().save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        name = name.replace("__", ".")
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_a_directory_gives_tokens_special_tokens_and_template(tmp_path):
    write(
        tmp_path,
        special_tokens_map__json={"bos_token": "<old>", "unk_token": "<s>"},
        tokenizer_config__json={
            "bos_token": {"content": "<s>", "lstrip": False},
            "eos_token": "</s>",
            "pad_token": None,
            "add_bos_token": True,
            "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        },
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "<s>Hi"
    assert tokenizer.encode_chat([{"role": "user", "content": "Hi"}]) == [0, *tokenizer.encode("Hi")]


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": "right", "tokenizer_config__json": {"chat_template": "wrong"}},
        {"chat_template__json": {"chat_template": "right"}},
        {
            "tokenizer_config__json": {
                "chat_template": [
                    {"name": "tool_use", "template": "wrong"},
                    {"name": "default", "template": "right"},
                ]
            }
        },
    ],
    ids=["jinja file", "json file", "list of templates"],
)
def test_a_chat_template_is_found_wherever_it_may_be(tmp_path, files):
    assert Tokenizer.from_directory(write(tmp_path, **files)).render_chat([]) == "right"


def test_special_tokens_are_added_as_the_tokenizer_says(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_str(byte_level().to_str())
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_directory(tmp_path)
    assert loaded.encode("hello")[0] == 0
    assert loaded.encode("hello", add_special_tokens=False) == loaded.encode("hello")[1:]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config__json": "{"}, r"tokenizer_config.json: is not JSON"),
        ({"tokenizer_config__json": "[]"}, r"tokenizer_config.json: must hold a JSON object"),
        ({"tokenizer__json": "{}"}, r"tokenizer.json: is not a tokenizer that"),
        ({"tokenizer_config__json": {"chat_template": 3}}, r"chat_template must be text; got int"),
        (
            {"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "x"}]}},
            r"must have a template named 'default'; got names \['rag'\]",
        ),
        (
            {"tokenizer_config__json": {"chat_template": ["x", 1, {"name": []}, {"name": "default"}]}},
            r"must have a template named 'default'; got names \['default'\]",
        ),
        (
            {"tokenizer_config__json": {"chat_template": [{"name": "default", "template": 1}]}},
            r"text; got int",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, files, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(write(tmp_path, **files))


def test_a_file_of_others_is_not_called_broken(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_a_directory_without_a_tokenizer_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; convert the tokenizer with"):
        Tokenizer.from_directory(tmp_path)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "upg-jax\[hf\]"'):
        Tokenizer.from_directory(tmp_path)


def test_the_bytes_of_tokens_add_up_to_those_of_a_text():
    for tokenizer, text in [(byte_level(), "naïve 🙂 中文 text"), (byte_fallback(), "ab é 🙂")]:
        ours = Tokenizer(tokenizer)
        found = b"".join(ours.token_bytes(token) for token in ours.encode(text))
        assert found.decode().replace(" ", "") == text.replace(" ", "")


def test_text_that_is_not_unicode_is_refused():
    """What Python makes of a terminal's bytes that are not UTF-8."""
    with pytest.raises(ValueError, match="valid Unicode"):
        Tokenizer(byte_level()).encode("a\udcffb")


def test_truncation_and_padding_that_a_file_brings_cut_and_fill_nothing(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_str(byte_level().to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = " ".join(TEXTS)
    assert Tokenizer.from_directory(tmp_path).encode(text) == byte_level().encode(text).ids
    assert len(byte_level().encode(text).ids) > 4
