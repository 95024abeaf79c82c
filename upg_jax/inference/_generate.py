"""Prompts in, tokens out: batches, stopping, and turning tokens into results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax.inference._answer import Answer, Generation, StreamedToken
from upg_jax.inference._logprobs import Chosen, HostChoices
from upg_jax.inference._penalties import History
from upg_jax.inference._rows import repeat_rows
from upg_jax.inference._sampling import Sampling
from upg_jax.inference._settings import GenerationSettings
from upg_jax.inference._steps import (
    CHUNK,
    advance,
    cache_capacity,
    choose,
    chunk_length,
    narrowed,
    prefill,
)

if TYPE_CHECKING:
    from upg_jax.inference._model import UPGModel


def generate(
    model: UPGModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    seed: int | Sequence[int] | None,
    n: int,
) -> list[Generation]:
    """Answers a batch of prompts of any lengths `n` times each; the answers to one lie together."""
    rows = [prompt for prompt in prompts for _ in range(n)]
    answers = [Answer(model.tokenizer, settings, model.eos_token_ids) for _ in rows]
    shown: list[list[StreamedToken]] = [[] for _ in rows]
    for step in steps(model, prompts, settings, seed, n):
        for row, answer in enumerate(answers):
            if answer.finish_reason is None:
                token = answer.push(step.tokens[row], step.logprobs(row, settings.logprobs))
                shown[row] += [token] if token is not None else []
        if all(answer.finish_reason for answer in answers):
            break
    return [
        _generation(answer, [*tokens, answer.finish()], len(prompt), model, settings)
        for answer, tokens, prompt in zip(answers, shown, rows, strict=True)
    ]


def _generation(
    answer: Answer,
    tokens: list[StreamedToken],
    prompt_tokens: int,
    model: UPGModel,
    settings: GenerationSettings,
) -> Generation:
    assert answer.finish_reason is not None
    return Generation(
        ids=answer.ids,
        text=None if model.tokenizer is None else "".join(token.text for token in tokens),
        prompt_tokens=prompt_tokens,
        finish_reason=answer.finish_reason,
        logprobs=None
        if settings.logprobs is None
        else [token.logprobs for token in tokens if token.logprobs is not None],
    )


def stream(model: UPGModel, prompt: Sequence[int], settings: GenerationSettings) -> Iterator[StreamedToken]:
    """Answers one prompt token by token; the pieces of text add up to `Generation.text`."""
    answer = Answer(model.tokenizer, settings, model.eos_token_ids)
    for step in steps(model, [prompt], settings, settings.seed, 1):
        token = answer.push(step.tokens[0], step.logprobs(0, settings.logprobs))
        if token is not None:
            yield token
        if answer.finish_reason is not None:
            break
    yield answer.finish()


def steps(
    model: UPGModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    seed: int | Sequence[int] | None,
    n: int,
) -> Iterator[HostChoices]:
    """Yields what each of `max_new_tokens` steps chooses for the `n` rows of each prompt.

    A row that has come to an EOS token repeats it. The step after the one that is yielded is already running then, so
    that what the caller does with it costs no time.
    """
    if settings.max_new_tokens == 0:
        return
    longest = max(map(len, prompts)) + settings.max_new_tokens
    limit = model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"generate: a prompt of {max(map(len, prompts))} tokens and max_new_tokens={settings.max_new_tokens} "
            f"exceed the {limit} positions that the model was made for; shorten the prompt or lower max_new_tokens"
        )
    choice = _Choice(model, [prompt for prompt in prompts for _ in range(n)], settings, seed)
    cache = model.init_cache(len(prompts), cache_capacity(longest))
    logits = jnp.zeros((len(prompts), model.config.vocab_size), jnp.float32)
    for ids, counts in chunks(prompts, CHUNK):
        logits, cache = prefill(model.params, model.config, ids, counts, cache, logits)
    if n > 1:
        logits, cache = repeat_rows(logits, cache, n)
    chosen = choice.next(logits, cache.lengths)
    for _ in range(settings.max_new_tokens - 1):
        logits, cache = advance(model.params, model.config, chosen.tokens, choice.done, cache)
        following = choice.next(logits, cache.lengths)
        yield HostChoices(chosen)
        chosen = following
    yield HostChoices(chosen)


class _Choice:
    """What choosing tokens needs to know of rows, on the device from the start: a copy in each step would cost time."""

    def __init__(
        self,
        model: UPGModel,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        seed: int | Sequence[int] | None,
    ) -> None:
        rows = len(prompts)
        sampling = dataclasses.replace(Sampling.of(rows, settings, seed), asked=narrowed(settings.asked))
        history = History.create(prompts, settings, model.config.vocab_size)
        stops = np.tile(stop_ids(model, settings), (rows, 1))
        state = (sampling, history, stops, np.zeros(rows, np.int32), np.zeros(rows, np.bool_))
        self._sampling, self._history, self._stops, self._tokens, self.done = jax.device_put(state)

    def next(self, logits: jax.Array, positions: jax.Array) -> Chosen:
        rows = (logits, self._stops, self._tokens, self.done)
        chosen, self.done, self._history = choose(*rows, positions, self._sampling, self._history)
        self._tokens = chosen.tokens
        return chosen


def stop_ids(model: UPGModel, settings: GenerationSettings) -> np.ndarray:
    """The tokens that end a row; padded, so that models with a few more or fewer share compiled steps."""
    ids = model.eos_token_ids if settings.stop_at_eos else ()
    found = np.full(-(-max(len(model.eos_token_ids), 1) // 8) * 8, -1, np.int32)
    found[: len(ids)] = ids
    return found


def chunks(prompts: Sequence[Sequence[int]], chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts prompts into what `prefill` takes: padded ids `(batch, length)`, and how many of each row are real."""
    lengths = np.array([len(prompt) for prompt in prompts])
    for start in range(0, int(lengths.max()), chunk):
        counts = np.clip(lengths - start, 0, chunk).astype(np.int32)
        ids = np.zeros((len(prompts), chunk_length(int(counts.max()))), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : counts[row]] = prompt[start : start + counts[row]]
        yield ids, counts
