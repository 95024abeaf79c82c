"""Tokenizers rebuilt from GGUF metadata give the ids that independent readings of the same file give."""

from __future__ import annotations

import functools
import itertools
import json
import re
import unicodedata

import numpy as np
import pytest
from small_models import llama, smollm2
from small_models.texts import TEXTS

from upg_jax import CheckpointError
from upg_jax.io import open_checkpoint

tokenizers = pytest.importorskip("tokenizers", reason='pip install "upg-jax[hf]"')

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


@functools.cache
def byte_level_metadata(kind):
    """A small vocabulary trained on the texts, split as the kind does it so that merges are worth testing."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    return {
        "general.name": "small",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.token_type": [CONTROL] * len(SPECIAL)
        + [NORMAL] * (len(model["vocab"]) - len(SPECIAL)),
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}",
    }


def write(path, metadata):
    path.mkdir(exist_ok=True)
    return llama.write_gguf(path / "model.gguf", llama.weights(layers=1), metadata=metadata)


def rebuild(path, metadata):
    """The tokenizer that `write_tokenizer` leaves behind, and its configuration."""
    out = path / "tokenizer"
    out.mkdir(parents=True)
    written = open_checkpoint(write(path, metadata)).write_tokenizer(out)
    assert sorted(written) == sorted(p.name for p in out.iterdir())
    config = json.loads((out / "tokenizer_config.json").read_text())
    return tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")), config


def oracle(path):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="the oracle: pip install transformers torch")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode, tokenizer


def digits_apart(encode):
    """SmolLM's rule, which transformers does not know: every digit is split off before anything else."""

    def numeric(text):
        return re.split(
            "(" + "|".join({re.escape(c) for c in text if unicodedata.category(c)[0] == "N"}) + ")", text
        )

    def apart(text):
        pieces = numeric(text) if any(unicodedata.category(c)[0] == "N" for c in text) else [text]
        return [i for piece in pieces if piece for i in encode(piece)]

    return apart


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_ids_equal_those_of_transformers(tmp_path, kind):
    ours, _ = rebuild(tmp_path, byte_level_metadata(kind))
    encode, _ = oracle(tmp_path / "model.gguf")
    if kind == "smollm":
        encode = digits_apart(encode)
    assert len(TEXTS) >= 60
    for text in TEXTS:
        # Qwen2 normalizes its text; transformers leaves that out when it reads a GGUF file.
        given = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
        assert ours.encode(text).ids == encode(given), repr(text)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_decoding_gives_the_text_back(tmp_path, kind):
    ours, _ = rebuild(tmp_path, byte_level_metadata(kind))
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == expected


def test_special_tokens_are_whole_and_skipped_on_request(tmp_path):
    ours, config = rebuild(tmp_path, byte_level_metadata("smollm"))
    ids = ours.encode("<|im_start|>user").ids
    assert ids[0] == 1
    assert ours.decode(ids) == "user"
    assert config["bos_token"] == "<|im_start|>"
    assert config["eos_token"] == "<|im_end|>"
    assert config["chat_template"].startswith("{% for m in messages %}")


def test_user_defined_tokens_are_whole_but_not_special(tmp_path):
    metadata = dict(byte_level_metadata("gpt-2"))
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think> 中"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED]
    ours, _ = rebuild(tmp_path, metadata)
    ids = ours.encode("a<think> 中b").ids
    assert ids[1] == len(metadata["tokenizer.ggml.tokens"]) - 1
    assert ours.decode(ids) == "a<think> 中b"


@pytest.mark.parametrize(("kind", "whole"), [("llama-bpe", True), ("gpt-2", False)])
def test_llama3_prefers_a_whole_piece_to_its_merges(tmp_path, kind, whole):
    metadata = dict(byte_level_metadata(kind))
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "qzxj"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], NORMAL]
    ours, _ = rebuild(tmp_path, metadata)
    assert (ours.encode("qzxj").ids == [len(metadata["tokenizer.ggml.tokens"]) - 1]) is whole


@pytest.mark.parametrize("flags", [(True, False), (False, True), (True, True), (False, False)])
def test_begin_and_end_tokens_are_added_as_the_metadata_say(tmp_path, flags):
    bos, eos = flags
    metadata = {
        **byte_level_metadata("gpt-2"),
        "tokenizer.ggml.add_bos_token": bos,
        "tokenizer.ggml.add_eos_token": eos,
    }
    ours, config = rebuild(tmp_path, metadata)
    plain = ours.encode("Hello", add_special_tokens=False).ids
    assert ours.encode("Hello").ids == [1] * bos + plain + [2] * eos
    pair = ours.encode("Hello", "Hello")
    assert pair.ids == 2 * ([1] * bos + plain + [2] * eos)
    assert (config["add_bos_token"], config["add_eos_token"]) == flags


def test_llama3_adds_the_begin_token_where_the_metadata_are_silent(tmp_path):
    for kind, expected in (("llama-bpe", True), ("gpt-2", False)):
        metadata = dict(byte_level_metadata(kind))
        del metadata["tokenizer.ggml.add_bos_token"]
        _, config = rebuild(tmp_path / kind, metadata)
        assert config["add_bos_token"] is expected


def test_tokenizer_files_have_the_same_bytes_every_time(tmp_path):
    metadata = {
        **byte_level_metadata("gpt-2"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }
    rebuild(tmp_path / "a", metadata)
    rebuild(tmp_path / "b", metadata)
    for file in (tmp_path / "a" / "tokenizer").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "tokenizer" / file.name).read_bytes()


@functools.cache
def sentencepiece_metadata():
    """A SentencePiece-like vocabulary: bytes, characters, and pieces scored by the order they were learned "
    "in."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    latin = [t for t in TEXTS if t.isascii() and "<|" not in t and "\n" not in t]
    trained.train_from_iterator(latin, tokenizers.trainers.BpeTrainer(vocab_size=500, show_progress=False))
    vocabulary = trained.get_vocab()
    pieces = sorted((p for p in vocabulary if len(p) > 1), key=vocabulary.get)
    characters = [p for p in vocabulary if len(p) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *sorted(characters)]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentencepiece_by_hand(metadata, text, prefix):
    """SentencePiece's rule: join the neighbours whose piece scores best, the leftmost first, until none is "
    "left."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    pieces = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        joined = [
            (-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids
        ]
        if not joined:
            break
        _, i = min(joined)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [
        i
        for p in pieces
        for i in ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode("utf-8")])
    ]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_a_reading_by_hand(tmp_path, prefix):
    metadata = {**sentencepiece_metadata(), "tokenizer.ggml.add_space_prefix": prefix}
    ours, config = rebuild(tmp_path, metadata)
    assert config["add_bos_token"] is True
    for text in TEXTS:
        encoding = ours.encode(text)
        assert encoding.ids == [1, *sentencepiece_by_hand(metadata, text, prefix)], repr(text)
        assert ours.decode(encoding.ids) == text


def test_sentencepiece_special_tokens_are_whole(tmp_path):
    ours, _ = rebuild(tmp_path, sentencepiece_metadata())
    assert ours.encode("</s>").ids == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer.ggml.pre": "falcon"},
            r"pre-tokenizer 'falcon'; this build knows gpt-2, smollm, llama-bpe, qwen2",
        ),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer of kind 't5'"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "token twice"),
        ({"tokenizer.ggml.token_type": [1]}, "each of the 700 tokens a type"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "pairs of pieces"),
        ({"tokenizer.ggml.merges": [1, 2]}, "pairs of pieces"),
        ({"tokenizer.ggml.merges": ["nowhere tobefound"]}, "make no tokenizer"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "has no vocabulary"),
        ({"tokenizer.ggml.model": "llama"}, "a score for every token"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": ["x"] * 700}, "a score for every token"),
        ({"tokenizer.ggml.eos_token_id": 99_999}, "eos_token_id must be below the 700 tokens; got 99999"),
    ],
)
def test_tokenizers_it_cannot_build_are_refused_by_name(tmp_path, changes, message):
    checkpoint = open_checkpoint(write(tmp_path, {**byte_level_metadata("gpt-2"), **changes}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.write_tokenizer(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ids_of_the_real_model_equal_those_of_transformers(tmp_path):
    path = smollm2.path()
    checkpoint = open_checkpoint(path)
    checkpoint.write_tokenizer(tmp_path)
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encode, tokenizer = oracle(path)
    rng = np.random.default_rng(0)
    random_texts = [
        "".join(map(chr, rng.choice([*range(32, 127), 10, 0xE9, 0x4E2D], 60))) for _ in range(200)
    ]
    for text in (*TEXTS, *random_texts):
        assert ours.encode(text).ids == digits_apart(encode)(text), repr(text)
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    import transformers

    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert reloaded.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert reloaded("2 + 2 = 4")["input_ids"] == ours.encode("2 + 2 = 4").ids
    assert (reloaded.bos_token_id, reloaded.eos_token_id, reloaded.pad_token_id) == (1, 2, 2)
