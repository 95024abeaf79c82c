"""Prompts in, tokens out: batches, stopping, and turning tokens into results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
import numpy as np

from upg_jax.inference._sampling import Sampling
from upg_jax.inference._steps import CHUNK, cache_capacity, chunk_length, decode, first_tokens, prefill
from upg_jax.inference._tokenizer import TextStream

if TYPE_CHECKING:
    from upg_jax.inference._model import UPGModel

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        ids: its tokens; the one that ended it is not among them.
        text: its text without special tokens; None for a model without a tokenizer.
        prompt_tokens: how many tokens the prompt had.
        finish_reason: `"stop"` if the model ended its answer, `"length"` if `max_new_tokens` did.
    """

    ids: list[int]
    text: str | None
    prompt_tokens: int
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True)
class StreamedToken:
    """One token of an answer as it comes.

    Attributes:
        id: the token; None in the last item if that only brings what is left of the text.
        text: what can be shown now; empty while a character is incomplete, and for a model without a tokenizer.
        finish_reason: set in the last item.
    """

    id: int | None
    text: str
    finish_reason: FinishReason | None = None


def generate(
    model: UPGModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_at_eos: bool,
) -> list[Generation]:
    """Answers a batch of prompts of any lengths."""
    rows: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    stop_ids = model.eos_token_ids if stop_at_eos else ()
    for tokens in token_batches(model, prompts, max_new_tokens, sampling, stop_ids):
        for row, token in enumerate(tokens.tolist()):
            stopped[row] = stopped[row] or token in stop_ids
            if not stopped[row]:
                rows[row].append(token)
        if all(stopped):
            break
    return [
        Generation(
            ids=ids,
            text=None if model.tokenizer is None else model.tokenizer.decode(ids),
            prompt_tokens=len(prompt),
            finish_reason="stop" if stop else "length",
        )
        for ids, prompt, stop in zip(rows, prompts, stopped, strict=True)
    ]


def stream(
    model: UPGModel, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stop_at_eos: bool
) -> Iterator[StreamedToken]:
    """Answers one prompt token by token; the pieces of text add up to `Generation.text`."""
    text = None if model.tokenizer is None else TextStream(model.tokenizer)
    stop_ids = model.eos_token_ids if stop_at_eos else ()
    reason: FinishReason = "length"
    for tokens in token_batches(model, [prompt], max_new_tokens, sampling, stop_ids):
        token = int(tokens[0])
        if token in stop_ids:
            reason = "stop"
            break
        yield StreamedToken(token, "" if text is None else text.push(token))
    yield StreamedToken(None, "" if text is None else text.finish(), reason)


def token_batches(
    model: UPGModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> Iterator[np.ndarray]:
    """Yields the next token of every row, int32 `(batch,)`, `max_new_tokens` times.

    A row that has come to one of `stop_ids` repeats it. The step after the one whose tokens are yielded is already
    running then, so that what the caller does with them costs no time.
    """
    if max_new_tokens == 0:
        return
    # Padded, so that models with a few more or fewer share compiled steps.
    stops = np.full(-(-max(len(stop_ids), 1) // 8) * 8, -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    lengths = [len(prompt) for prompt in prompts]
    limit = model.config.max_position_embeddings
    if max(lengths) + max_new_tokens > limit:
        raise ValueError(
            f"generate: a prompt of {max(lengths)} tokens and max_new_tokens={max_new_tokens} exceed the {limit} "
            "positions that the model was made for; shorten the prompt or lower max_new_tokens"
        )
    cache = model.init_cache(len(prompts), cache_capacity(max(lengths) + max_new_tokens))
    logits = jnp.zeros((len(prompts), model.config.vocab_size), jnp.float32)
    for start in range(0, max(lengths), CHUNK):
        counts = np.clip(np.array(lengths) - start, 0, CHUNK).astype(np.int32)
        ids = np.zeros((len(prompts), chunk_length(int(counts.max()))), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : counts[row]] = prompt[start : start + counts[row]]
        logits, cache = prefill(model.params, model.config, ids, counts, cache, logits)
    tokens, done = first_tokens(logits, cache.lengths, sampling, stops)
    for _ in range(max_new_tokens - 1):
        following = decode(model.params, model.config, tokens, done, cache, sampling, stops)
        yield np.asarray(tokens)
        tokens, done, cache = following
    yield np.asarray(tokens)
