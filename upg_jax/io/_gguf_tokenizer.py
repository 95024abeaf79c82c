"""The tokenizer that a GGUF file's metadata describes, as Hugging Face files.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) instead of describing it; the patterns here are
those of the original models' `tokenizer.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from upg_jax._errors import CheckpointError, MissingDependencyError

# Meanings of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTE_LEVEL_KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def tokenizer_files(metadata: dict[str, Any], where: Path) -> dict[str, str]:
    """Builds the tokenizer and returns the text of its files by name.

    Args:
        metadata: a GGUF file's metadata.
        where: the file, for messages.

    Raises:
        CheckpointError: if the kind of tokenizer is not known.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise CheckpointError(
            f"{where}: has no vocabulary (tokenizer.ggml.tokens); give the Hugging Face checkpoint"
        )
    if model == "gpt2":
        tokenizer = _byte_level(metadata, tokens, where)
        add_bos = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens, where)
        add_bos = True
    else:
        raise CheckpointError(
            f"{where}: has a tokenizer of kind {model!r}; this build knows 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece BPE); use the model's Hugging Face checkpoint instead"
        )
    kinds = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.token_type must give each of the {len(tokens)} tokens a type"
        )
    _add_special_tokens(tokenizer, tokens, kinds)
    roles = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    found = {f"{role}_token": _token(metadata, key, tokens, where) for role, key in roles}
    special = {role: token for role, token in found.items() if token is not None}
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)) and "bos_token" in special
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in special
    _add_template(tokenizer, special, add_bos, add_eos)
    config: dict[str, Any] = {
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get("llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _import_tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.processors
    except ImportError as e:
        raise MissingDependencyError(
            'a GGUF file\'s tokenizer needs the package tokenizers; pip install "upg-jax[hf]"'
        ) from e
    return tokenizers


def _token(metadata: dict[str, Any], role: str, tokens: list[str], where: Path) -> str | None:
    """The token with a role, by the id that the metadata give; None where they give none."""
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in metadata:
        return None
    token_id = metadata[key]
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{where}: {key} must be below the {len(tokens)} tokens; got {token_id!r}")
    return tokens[token_id]


def _merges(metadata: dict[str, Any], where: Path) -> list[tuple[str, ...]]:
    stored = metadata.get("tokenizer.ggml.merges")
    merges = [tuple(str(m).split(" ")) for m in stored] if isinstance(stored, list) else []
    if not merges or any(len(m) != 2 for m in merges):
        raise CheckpointError(f"{where}: tokenizer.ggml.merges must hold pairs of pieces split by one space")
    return merges


def _build_bpe(tk: Any, where: Path, tokens: list[str], merges: list[tuple[str, ...]], **options: Any) -> Any:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{where}: the vocabulary (tokenizer.ggml.tokens) has a token twice")
    try:
        return tk.Tokenizer(tk.models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as e:  # tokenizers raises bare exceptions
        raise CheckpointError(f"{where}: the vocabulary and merges make no tokenizer ({e})") from e


def _byte_level(metadata: dict[str, Any], tokens: list[str], where: Path) -> Any:
    kind = metadata.get("tokenizer.ggml.pre")
    if kind not in _BYTE_LEVEL_KINDS:
        raise CheckpointError(
            f"{where}: splits text by the pre-tokenizer {kind!r}; this build knows "
            f"{', '.join(_BYTE_LEVEL_KINDS)}; use the model's Hugging Face checkpoint instead"
        )
    tk = _import_tokenizers()
    # Llama 3 takes a piece that is in the vocabulary whole, even where the merges would not build it.
    tokenizer = _build_bpe(tk, where, tokens, _merges(metadata, where), ignore_merges=kind == "llama-bpe")
    pre = tk.pre_tokenizers
    split = {"llama-bpe": _LLAMA3_SPLIT, "qwen2": _QWEN2_SPLIT}.get(kind)
    steps = [pre.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, pre.Split(tk.Regex(split), behavior="isolated"))
    elif kind == "smollm":
        steps.insert(0, pre.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    if kind == "qwen2":
        tokenizer.normalizer = tk.normalizers.NFC()
    tokenizer.decoder = tk.decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], where: Path) -> Any:
    tk = _import_tokenizers()
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or [type(s) for s in scores] != [float] * len(tokens):
        raise CheckpointError(f"{where}: a SentencePiece vocabulary needs a score for every token")
    tokenizer = _build_bpe(
        tk,
        where,
        tokens,
        _merges_of_scores(tokens, scores),
        unk_token=_token(metadata, "unknown", tokens, where) or tokens[0],
        fuse_unk=True,
        byte_fallback=True,
    )
    # SentencePiece always puts its dummy space in front, also where the text begins with one.
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps = [tk.normalizers.Replace(" ", "▁")]
    decoding = [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    if prefix:
        steps.insert(0, tk.normalizers.Prepend("▁"))
        decoding.append(tk.decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = tk.normalizers.Sequence(steps)
    tokenizer.decoder = tk.decoders.Sequence(decoding)
    return tokenizer


def _merges_of_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, ...]]:
    """The merges that join two tokens into a third, best score first, as SentencePiece prefers them."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for i, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]


def _add_special_tokens(tokenizer: Any, tokens: list[str], kinds: list[int]) -> None:
    """Marks the tokens that are matched whole in the text, before any splitting."""
    tk = _import_tokenizers()
    tokenizer.add_tokens(
        [
            tk.AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )


def _add_template(tokenizer: Any, special: dict[str, str], add_bos: bool, add_eos: bool) -> None:
    if not (add_bos or add_eos):
        return
    tk = _import_tokenizers()
    before = [special["bos_token"]] if add_bos else []
    after = [special["eos_token"]] if add_eos else []

    def template(sequence: str, type_id: int) -> list[str]:
        return [f"{piece}:{type_id}" for piece in (*before, sequence, *after)]

    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single=template("$A", 0),
        pair=template("$A", 0) + template("$B", 1),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in sorted({*before, *after})],
    )
