"""Log-probabilities: what a step records of the distribution that it chose from."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from upg_jax.inference._sampling import Sampling
from upg_jax.inference._settings import MAX_LOGPROBS


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Chosen:
    """What a step chose for each row, and how likely it was; zeros where log-probabilities are not wanted.

    Attributes:
        tokens: int32 `(batch,)`.
        logprobs: float32 `(batch,)`, of the tokens.
        top_tokens: int32 `(batch, most)`, the most likely ones in falling order; `most` is `MAX_LOGPROBS`, or the
            vocabulary's size if that is less.
        top_logprobs: float32 `(batch, most)`.
    """

    tokens: Any
    logprobs: Any
    top_tokens: Any
    top_logprobs: Any


jax.tree_util.register_dataclass(
    Chosen, data_fields=["tokens", "logprobs", "top_tokens", "top_logprobs"], meta_fields=[]
)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability under the model, before any setting changed its distribution.

    Attributes:
        token: the token.
        logprob: natural logarithm of its probability.
        top: the most likely tokens with theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def recorded(logits: jax.Array, tokens: jax.Array, sampling: Sampling) -> Chosen:
    """Records `tokens` and, if any row wants them, log-probabilities.

    Args:
        logits: float32 `(batch, vocab)`, the model's own.
        tokens: int32 `(batch,)`, what was chosen.
        sampling: the rows' settings.
    """
    batch, vocabulary = logits.shape
    most = min(MAX_LOGPROBS, vocabulary)

    def compute() -> tuple[jax.Array, jax.Array, jax.Array]:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        top, top_tokens = lax.top_k(logits, most)
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
        return (chosen - total)[:, 0], top_tokens, top - total

    def nothing() -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.zeros(batch), jnp.zeros((batch, most), jnp.int32), jnp.zeros((batch, most))

    logprobs, top_tokens, top = sampling.where_asked("logprobs", jnp.any(sampling.logprobs), compute, nothing)
    return Chosen(tokens=tokens, logprobs=logprobs, top_tokens=top_tokens, top_logprobs=top)


class HostChoices:
    """A step's `Chosen` on the host; waits for the step, and fetches log-probabilities only where they are read."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen = chosen
        self.tokens: list[int] = np.asarray(chosen.tokens).tolist()

    def logprobs(self, row: int, alternatives: int | None) -> TokenLogprobs | None:
        """A row's log-probabilities; None if it wants none."""
        if alternatives is None:
            return None
        host: Chosen = jax.tree.map(np.asarray, self._chosen)
        top = zip(
            host.top_tokens[row, :alternatives].tolist(),
            host.top_logprobs[row, :alternatives].tolist(),
            strict=True,
        )
        return TokenLogprobs(self.tokens[row], float(host.logprobs[row]), tuple(top))
