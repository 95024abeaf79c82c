"""From a request's messages or prompts to token ids."""

from __future__ import annotations

from typing import Any

from upg_jax._errors import UPGError
from upg_jax.inference import Tokenizer, UPGModel
from upg_jax.serve._errors import bad
from upg_jax.serve._fields import Fields

# Not "tool": there is none without "tools", which are refused.
_ROLES = ("system", "developer", "user", "assistant")


def chat_prompt(fields: Fields, model: UPGModel) -> list[int]:
    """Reads `messages` and renders them.

    Raises:
        ApiError: naming the field.
    """
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("messages", "'messages' must be a list of at least one message")
    tokenizer = _tokenizer(model, "messages")
    plain = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    try:
        return model.encode(tokenizer.encode_chat(plain))
    # The model's template has rules of its own, and a tokenizer may have more tokens than the model.
    except (UPGError, ValueError) as e:
        raise bad("messages", str(e)) from e


def _message(message: Any, where: str) -> dict[str, str]:
    fields = _object(message, where)
    role, content = fields.text("role"), fields.get("content")
    if role not in _ROLES:
        raise fields.bad("role", f"must be one of {', '.join(_ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise fields.bad("content", "must be a string or a list of parts")
    _check_unicode(content, f"{where}.content")
    # What templates of models do not show, or tools would need. Clients send answers back as they came, nulls included.
    for feature in ("name", "refusal", "audio", "function_call", "tool_call_id"):
        fields.neutral(feature)
    for feature in ("tool_calls", "annotations"):
        fields.neutral(feature, [])
    fields.finish()
    # "developer" is OpenAI's newer name for what templates call "system".
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: Any, where: str) -> str:
    fields = _object(part, where)
    if fields.get("type") != "text":
        raise fields.bad("type", "must be 'text'; this model reads nothing else")
    text = fields.text("text")
    fields.finish()
    return text


def _object(value: Any, where: str) -> Fields:
    if not isinstance(value, dict):
        raise bad(where, f"{where} must be an object")
    return Fields(value, f"{where}.")


def completion_prompts(fields: Fields) -> list[Any]:
    """Reads `prompt`, which may be several."""
    prompt = fields.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


def encode_prompt(prompt: Any, model: UPGModel) -> list[int]:
    """Turns one of them, a text or token ids, into token ids.

    Raises:
        ApiError: naming the field.
    """
    ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if not isinstance(prompt, str) and not ids:
        raise bad("prompt", "'prompt' must be a string, a list of token ids, or a list of either")
    if isinstance(prompt, str):
        _tokenizer(model, "prompt")
        _check_unicode(prompt, "prompt")
    elif any(not 0 <= i < model.config.vocab_size for i in prompt):
        raise bad("prompt", f"token ids must be in [0, {model.config.vocab_size})")
    if not prompt:
        raise bad("prompt", "'prompt' must not be empty")
    try:
        return model.encode(prompt)
    except ValueError as e:
        raise bad("prompt", str(e)) from e


def _check_unicode(text: str, param: str) -> None:
    # JSON can spell halves of characters, which no tokenizer takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad(param, f"{param} has a lone surrogate, which is no character") from None


def _tokenizer(model: UPGModel, param: str) -> Tokenizer:
    if model.tokenizer is None:
        raise bad(param, "this model has no tokenizer; send token ids to /v1/completions")
    return model.tokenizer
