"""From a request's body to prompts and settings."""

from __future__ import annotations

import dataclasses
from typing import Any

from upg_jax._errors import UPGError
from upg_jax.inference import GenerationSettings, Tokenizer, UPGModel
from upg_jax.serve._errors import ApiError, bad
from upg_jax.serve._fields import Fields

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SEEDS = 2**63


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a client wants.

    Attributes:
        chat: which of the two interfaces it uses.
        prompts: token ids of each.
        settings: for all answers; their seeds count up from its seed.
        n: answers to each prompt.
        stream: send what there is.
        include_usage: end a stream with the numbers of tokens.
        echo: begin answers with the prompt (completions only).
    """

    chat: bool
    prompts: list[list[int]]
    settings: GenerationSettings
    n: int
    stream: bool
    include_usage: bool
    echo: bool = False


def parse_chat(values: dict[str, Any], model: UPGModel, name: str, context: int, choices: int) -> Job:
    """Reads a body of `/v1/chat/completions`.

    Raises:
        ApiError: naming the field.
    """
    fields = Fields(values)
    _check_model(fields, name)
    prompt = _chat_prompt(fields, model)
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 20)
    if top is not None and not wanted:
        raise bad("top_logprobs", "'top_logprobs' needs 'logprobs': true")
    limit = fields.integer("max_completion_tokens", 1, context)
    older = fields.integer("max_tokens", 1, context)
    for feature, neutral in (("tools", []), ("functions", []), ("modalities", ["text"]), ("audio", None)):
        fields.neutral(feature, neutral)
    fields.neutral("response_format", {"type": "text"})
    fields.neutral("tool_choice", "none", "auto")
    fields.neutral("function_call", "none", "auto")
    fields.ignore("parallel_tool_calls", "reasoning_effort", "verbosity", "prediction")
    return _job(fields, model, context, choices, [prompt], limit or older, wanted, top or 0, chat=True)


def parse_completion(values: dict[str, Any], model: UPGModel, name: str, context: int, choices: int) -> Job:
    """Reads a body of `/v1/completions`.

    Raises:
        ApiError: naming the field.
    """
    fields = Fields(values)
    _check_model(fields, name)
    prompts = _prompts(fields, model)
    top = fields.integer("logprobs", 0, 5)
    limit = fields.integer("max_tokens", 1, context, 16)
    fields.neutral("suffix", "")
    echo = fields.flag("echo")
    if echo and top is not None:
        raise bad("echo", "'echo' together with 'logprobs' is not supported by this server")
    n = fields.get("n")
    fields.neutral("best_of", 1, n)
    return _job(
        fields, model, context, choices, prompts, limit, top is not None, top or 0, chat=False, echo=echo
    )


def _job(
    fields: Fields,
    model: UPGModel,
    context: int,
    choices: int,
    prompts: list[list[int]],
    limit: int | None,
    wanted: bool,
    top: int,
    *,
    chat: bool,
    echo: bool = False,
) -> Job:
    n = fields.integer("n", 1, choices, 1)
    assert n is not None
    if n * len(prompts) > choices:
        raise bad(
            "n", f"one request may ask for {choices} answers; got {n} to each of {len(prompts)} prompts"
        )
    stream = fields.flag("stream")
    options = fields.get("stream_options")
    if options is not None and (not stream or not isinstance(options, dict)):
        raise bad("stream_options", "'stream_options' must be an object, and needs 'stream': true")
    inner = Fields(options or {})
    include_usage = inner.flag("include_usage")
    inner.ignore("include_obfuscation")
    inner.finish()
    longest = max(map(len, prompts))
    if longest + (limit or 1) > context:
        raise bad(
            "messages" if chat else "prompt",
            f"this model's maximum context length is {context} tokens; the prompt has {longest} and "
            f"{limit or 'at least 1'} were asked for",
            "context_length_exceeded",
        )
    settings: dict[str, Any] = {
        "max_new_tokens": limit or context - longest,
        "temperature": fields.number("temperature", 0, 2, 1.0),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", -1, 2**31 - 1),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100, 1.0),
        "presence_penalty": fields.number("presence_penalty", -2, 2, 0.0),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2, 0.0),
        "logit_bias": _logit_bias(fields, model),
        "seed": fields.integer("seed", -_SEEDS, _SEEDS - 1),
        "logprobs": top if wanted else None,
        "stop": fields.strings("stop", 16),
        "stop_at_eos": not fields.flag("ignore_eos"),
    }
    if settings["top_k"] in (-1, 0):  # what clients of other servers send for "all"
        settings["top_k"] = None
    if settings["top_p"] == 0:
        settings["top_k"], settings["top_p"] = 1, None
    fields.ignore("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
    fields.finish()
    try:
        checked = GenerationSettings(**settings)
    except ValueError as e:
        raise ApiError(400, str(e)) from e
    return Job(
        chat=chat,
        prompts=prompts,
        settings=checked,
        n=n,
        stream=stream,
        include_usage=include_usage,
        echo=echo,
    )


def _check_model(fields: Fields, name: str) -> None:
    asked = fields.text("model")
    if asked != name:
        raise ApiError(
            404,
            f"the model {asked[:200]!r} does not exist; this server has {name!r}",
            param="model",
            code="model_not_found",
        )


def _chat_prompt(fields: Fields, model: UPGModel) -> list[int]:
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
    if not isinstance(message, dict):
        raise bad(where, f"{where} must be an object")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise bad(f"{where}.role", f"{where}.role must be one of {', '.join(_ROLES)}")
    if isinstance(content, list):
        for i, part in enumerate(content):
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                at = f"{where}.content[{i}]"
                raise bad(
                    at, f"{at} must be an object of type 'text' with a 'text'; this model reads nothing else"
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise bad(f"{where}.content", f"{where}.content must be a string or a list of parts")
    _check_unicode(content, f"{where}.content")
    # "developer" is OpenAI's newer name for what templates call "system".
    return {"role": "system" if role == "developer" else role, "content": content}


def _prompts(fields: Fields, model: UPGModel) -> list[list[int]]:
    prompt = fields.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    prompts = prompt if several else [prompt]
    if len(prompts) > 1024:
        raise bad("prompt", "'prompt' has too many prompts")
    found = []
    for one in prompts:
        ids = isinstance(one, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in one)
        if not isinstance(one, str) and not ids:
            raise bad("prompt", "'prompt' must be a string, a list of token ids, or a list of either")
        if isinstance(one, str):
            _tokenizer(model, "prompt")
            _check_unicode(one, "prompt")
        elif any(not 0 <= i < model.config.vocab_size for i in one):
            raise bad("prompt", f"token ids must be in [0, {model.config.vocab_size})")
        if not one:
            raise bad("prompt", "'prompt' must not be empty")
        try:
            found.append(model.encode(one))
        except ValueError as e:
            raise bad("prompt", str(e)) from e
    return found


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


def _logit_bias(fields: Fields, model: UPGModel) -> dict[int, float]:
    value = fields.get("logit_bias")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad("logit_bias", "'logit_bias' must be an object from token ids to numbers")
    found = {}
    for key, bias in value.items():
        known = key.isascii() and key.isdigit() and len(key) < 10 and int(key) < model.config.vocab_size
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool) and -100 <= bias <= 100
        if not known or not number:
            raise bad(
                "logit_bias",
                f"'logit_bias' must have numbers in [-100, 100] by token ids in [0, {model.config.vocab_size})",
            )
        found[int(key)] = float(bias)
    return found


def settings_of(job: Job, choice: int) -> GenerationSettings:
    """The settings of one answer: a job's seed is that of its first, and the others count up from it."""
    seed = job.settings.seed
    return dataclasses.replace(job.settings, seed=None if seed is None else seed + choice)
