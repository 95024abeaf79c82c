"""Penalties and biases: what a row's tokens so far, and its caller, take from or add to its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax.inference._sampling import Sampling
from upg_jax.inference._settings import GenerationSettings


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class History:
    """What penalties have to know of each row.

    Attributes:
        prompt: bool `(batch, vocab)`, tokens that the prompt has.
        counts: int32 `(batch, vocab)`, how often the answer has each token.
        bias: float32 `(batch, vocab)`.
    """

    prompt: Any
    counts: Any
    bias: Any

    @classmethod
    def create(
        cls, prompts: Sequence[Sequence[int]], settings: GenerationSettings, vocab_size: int
    ) -> History:
        """The beginning of answers to prompts, on the host."""
        prompt = np.zeros((len(prompts), vocab_size), np.bool_)
        for row, ids in enumerate(prompts):
            prompt[row, list(ids)] = True
        bias = np.broadcast_to(settings.bias(vocab_size), prompt.shape)
        return cls(prompt=prompt, counts=np.zeros(prompt.shape, np.int32), bias=np.ascontiguousarray(bias))

    def add(self, tokens: jax.Array, done: jax.Array) -> History:
        """Counts each row's new token, but for rows that are done."""
        rows = jnp.arange(tokens.shape[0])
        counts = jnp.asarray(self.counts).at[rows, tokens].add((~done).astype(jnp.int32))
        return dataclasses.replace(self, counts=counts)


jax.tree_util.register_dataclass(History, data_fields=["prompt", "counts", "bias"], meta_fields=[])


def penalized(logits: jax.Array, sampling: Sampling, history: History) -> jax.Array:
    """Applies the repetition penalty, frequency and presence penalties, and the bias, in this order.

    Each row's result depends on nothing of the others.

    Args:
        logits: float32 `(batch, vocab)`.
        sampling: the rows' settings.
        history: what they have said.
    """

    def apply() -> jax.Array:
        used = history.prompt | (history.counts > 0)
        factor = jnp.where(used, sampling.repetition_penalty[:, None], 1.0)
        scores = jnp.where(logits > 0, logits / factor, logits * factor)
        scores -= history.counts.astype(jnp.float32) * sampling.frequency_penalty[:, None]
        scores -= (history.counts > 0).astype(jnp.float32) * sampling.presence_penalty[:, None]
        return scores + history.bias

    anything = (
        jnp.any(sampling.repetition_penalty != 1)
        | jnp.any(sampling.frequency_penalty != 0)
        | jnp.any(sampling.presence_penalty != 0)
        | jnp.any(sampling.biased)
    )
    # A row without settings passes unchanged through both branches: x / 1, x * 1, x - 0 and x + 0 are exact.
    return sampling.where_asked("penalties", anything, apply, lambda: logits)
