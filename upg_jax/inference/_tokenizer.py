"""Text to token ids and back, through Hugging Face's `tokenizers`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from upg_jax._errors import CheckpointError, MissingDependencyError
from upg_jax.inference._chat import ChatTemplate, Message

_FILE = "tokenizer.json"
# After so many tokens that complete no character, all bytes but those of the last U+FFFD, at most three, are in none.
# And the text of so many has the same end as that of all tokens, since a byte of UTF-8 shows whether it begins one.
_GARBAGE = 16


class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        special_tokens: text of the special tokens by role, e.g. `{"eos_token": "</s>"}`.
        chat_template: None if the model has none.
    """

    def __init__(
        self, tokenizer: Any, special_tokens: dict[str, str] | None = None, chat_template: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.special_tokens = special_tokens or {}
        self.chat_template = (
            None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        )

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` and what lies beside it.

        Raises:
            CheckpointError: if there is no `tokenizer.json`, or a file is not what it should be, naming it.
            OSError: if a file cannot be read.
            MissingDependencyError: if `tokenizers` is not installed.
        """
        directory = Path(directory)
        path = directory / _FILE
        if not path.is_file():
            raise CheckpointError(
                f"{directory}: has no {_FILE}; convert the tokenizer with "
                "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            import tokenizers
        except ImportError as e:
            raise MissingDependencyError(
                'tokenizer: needs the package tokenizers; pip install "upg-jax[hf]"'
            ) from e
        content = path.read_bytes()  # not by the package, whose errors tell no permission from bad JSON
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as e:  # the package raises plain Exception
            raise CheckpointError(f"{path}: is not a tokenizer that the package tokenizers reads: {e}") from e
        # Left in the file by training; a prompt is neither cut nor filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_json(directory / "tokenizer_config.json")
        special = _special_tokens(_read_json(directory / "special_tokens_map.json") | config)
        return cls(tokenizer, special, _chat_template(directory, config))

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self._tokenizer.get_vocab_size()

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `decode` leaves out unless told otherwise."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, content in added.items() if content.special)

    def knows(self, token: int) -> bool:
        """Whether an id is that of a token."""
        return self._tokenizer.id_to_token(token) is not None

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token's exact text, None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text.

        Args:
            text: special tokens in it are recognized.
            add_special_tokens: add what the model expects around a text (for many, a token at the beginning).

        Raises:
            ValueError: for text that is not Unicode, as of a terminal whose bytes are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError("Tokenizer.encode: text must be valid Unicode (is the input UTF-8?)") from e
        # As a batch, which lets other threads run meanwhile: a long text would hold up a server's other answers.
        return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes | None:
        """Returns the bytes that a token stands for, which may be part of a character; None if that is not known."""
        text = self.decode([token], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text.encode("utf-8")
        spelled = self._tokenizer.id_to_token(token) or ""
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", spelled):
            return bytes.fromhex(match[1])
        known = _byte_level()
        return bytes(known[c] for c in spelled) if all(c in known for c in spelled) else None

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Renders a conversation with the model's chat template.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with the beginning of the assistant's answer.

        Raises:
            CheckpointError: if the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise CheckpointError("chat: this model has no chat template; give it a plain prompt")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of a conversation; arguments and errors are those of `render_chat`."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)


class TextStream:
    """Turns token ids into text as they come.

    A character's bytes may be spread over tokens, so text is held back while it ends in an incomplete one. A token
    takes the same time however many came before.
    Together the pieces are what `Tokenizer.decode` makes of all ids. (Tokenizers that spell bytes as tokens judge a
    run of them as a whole: where the end of a run is no UTF-8, `decode` discards its beginning, too, which may have
    been shown.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Ids since the last piece but one: a token's text may depend on the one before (leading spaces).
        self._ids: list[int] = []
        self._new = 0  # how many of them came since the last piece
        self._shown = 0  # how much of their text was shown

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is complete now, often one word, sometimes nothing."""
        # An id without a token (a model may have more than its tokenizer) shows nothing either, and would be kept.
        if token in self._tokenizer.special_ids or not self._tokenizer.knows(token):
            return ""
        self._ids.append(token)
        self._new += 1
        text = self._tokenizer.decode(self._ids)
        held = text.endswith("\ufffd")
        piece = text[self._shown : len(text) - held]
        if not piece or (held and self._new < _GARBAGE):
            return ""
        self._ids, self._new = self._ids[-self._new :], 0
        self._shown = len(self._tokenizer.decode(self._ids)) - held
        return piece

    def finish(self) -> str:
        """Returns the text that was held back."""
        text, shown = self._tokenizer.decode(self._ids), self._shown
        self._ids, self._new, self._shown = [], 0, 0
        return text[shown:]


@functools.cache
def _byte_level() -> dict[str, int]:
    """The characters with which GPT-2's tokenizer and its successors spell bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{path}: is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The entries like `eos_token`, given as text or as an object with the text as its `content`."""
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_json(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        entries = [t for t in template if isinstance(t, dict) and isinstance(t.get("name"), str)]
        template = {t["name"]: t.get("template") for t in entries}.get("default")
        if template is None:
            raise CheckpointError(
                f"{directory}: chat_template is a list, which must have a template named 'default'; got names "
                f"{[t['name'] for t in entries]}; put the one to use into a file chat_template.jinja there"
            )
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{directory}: chat_template must be text; got {type(template).__name__}")
    return template
