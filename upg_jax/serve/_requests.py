"""From a request's body to prompts and settings."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from upg_jax.inference import GenerationSettings, UPGModel
from upg_jax.serve._errors import ApiError, bad
from upg_jax.serve._fields import Fields
from upg_jax.serve._prompts import chat_prompt, completion_prompts, encode_prompt

_SEEDS = 2**63
_STOPS, _STOP_LENGTH = 16, 128  # OpenAI takes 4
_BIASES = 1024  # OpenAI takes 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a client wants.

    Attributes:
        chat: which of the two interfaces it uses.
        prompts: token ids of each.
        settings: of each answer; their seeds count up from the request's.
        n: answers to each prompt.
        stream: send what there is.
        include_usage: end a stream with the numbers of tokens.
        echo: begin answers with the prompt (completions only).
    """

    chat: bool
    prompts: list[list[int]]
    settings: list[GenerationSettings]
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
    n = _choices(fields, choices, 1)
    prompt = chat_prompt(fields, model)
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
    return _job(fields, model, context, n, [prompt], limit or older, wanted, top or 0, chat=True)


def parse_completion(values: dict[str, Any], model: UPGModel, name: str, context: int, choices: int) -> Job:
    """Reads a body of `/v1/completions`.

    Raises:
        ApiError: naming the field.
    """
    fields = Fields(values)
    _check_model(fields, name)
    texts = completion_prompts(fields)
    # Before any is tokenized, which takes a while.
    n = _choices(fields, choices, len(texts))
    prompts = [encode_prompt(text, model) for text in texts]
    top = fields.integer("logprobs", 0, 5)
    limit = fields.integer("max_tokens", 1, context, 16)
    fields.neutral("suffix", "")
    echo = fields.flag("echo")
    if echo and top is not None:
        raise bad("echo", "'echo' together with 'logprobs' is not supported by this server")
    fields.neutral("best_of", 1, n)
    return _job(fields, model, context, n, prompts, limit, top is not None, top or 0, chat=False, echo=echo)


def _job(
    fields: Fields,
    model: UPGModel,
    context: int,
    n: int,
    prompts: list[list[int]],
    limit: int | None,
    wanted: bool,
    top: int,
    *,
    chat: bool,
    echo: bool = False,
) -> Job:
    stream = fields.flag("stream")
    options = fields.get("stream_options")
    if options is not None and (not stream or not isinstance(options, dict)):
        raise bad("stream_options", "'stream_options' must be an object, and needs 'stream': true")
    inner = Fields(options or {}, "stream_options.")
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
        "seed": fields.integer("seed", -_SEEDS, _SEEDS - 1, secrets.randbits(63)),
        "logprobs": top if wanted else None,
        "stop": fields.strings("stop", _STOPS, _STOP_LENGTH),
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
        settings=[checked.with_seed(settings["seed"] + choice) for choice in range(n * len(prompts))],
        n=n,
        stream=stream,
        include_usage=include_usage,
        echo=echo,
    )


def _choices(fields: Fields, most: int, prompts: int) -> int:
    """Answers to each prompt, if all prompts together ask for no more than may be."""
    n = fields.integer("n", 1, most, 1)
    assert n is not None
    if n * prompts > most:
        raise bad("n", f"one request may ask for {most} answers; got {n} to each of {prompts} prompts")
    return n


def _check_model(fields: Fields, name: str) -> None:
    asked = fields.text("model")
    if asked != name:
        raise ApiError(
            404,
            f"the model {asked[:200]!r} does not exist; this server has {name!r}",
            param="model",
            code="model_not_found",
        )


def _logit_bias(fields: Fields, model: UPGModel) -> dict[int, float]:
    value = fields.get("logit_bias")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad("logit_bias", "'logit_bias' must be an object from token ids to numbers")
    if len(value) > _BIASES:
        raise bad("logit_bias", f"'logit_bias' may have {_BIASES} tokens; got {len(value)}")
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
