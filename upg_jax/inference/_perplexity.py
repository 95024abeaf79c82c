"""How well a model predicts a text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax.inference._model import UPGModel
from upg_jax.models import DecoderConfig, Params, forward


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A measurement, with what is needed to repeat it.

    Attributes:
        nll: mean negative log-likelihood of the predicted tokens, in nats.
        tokens: how many tokens were predicted.
        windows: how many windows the text was cut into.
        window: tokens of a window, at most.
        stride: tokens from the beginning of one window to that of the next.
    """

    nll: float
    tokens: int
    windows: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """`exp(nll)`."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


def perplexity(
    model: UPGModel,
    text: str | Sequence[int] | np.ndarray,
    *,
    window: int = 512,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measures a model's perplexity on a text.

    The text is cut into windows that each stand alone. Every token is predicted once, in the first window that
    has it, except the first token of the text, and, if windows do not overlap, the first token of each.

    Args:
        model: the model.
        text: a text, or token ids.
        window: tokens that a prediction sees at most, the predicted one included; at least 2.
        stride: tokens from one window to the next, in `[1, window]`. `window` (the default) is fastest; a smaller
            one gives every prediction at least `window - stride` tokens of context.
        progress: called after each window with how many are done and how many there are.

    Raises:
        ValueError: for a text of fewer than two tokens, or a window or stride out of range.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(
            f"perplexity: window must be at least 2 and stride in [1, window]; got {window} and {stride}"
        )
    ids = model.encode(text)
    if len(ids) < 2:
        raise ValueError(f"perplexity: the text must have at least two tokens; got {len(ids)}")
    # A window is needed for the tokens beyond those of the window before, and for the first if it predicts any.
    overlap = max(window - stride, 1)
    starts = [start for start in range(0, len(ids), stride) if start + (overlap if start else 1) < len(ids)]
    total, count = 0.0, 0
    for done, start in enumerate(starts, 1):
        part = np.asarray(ids[start : start + window], np.int32)
        padded = np.zeros((1, window), np.int32)
        padded[0, : part.size] = part
        # What the window before has seen is only context, and a window's first token has none.
        first = overlap if start else 1
        total += float(_window_nll(model.params, model.config, padded, np.int32(first), np.int32(part.size)))
        count += part.size - first
        if progress is not None:
            progress(done, len(starts))
    return Perplexity(nll=total / count, tokens=count, windows=len(starts), window=window, stride=stride)


@partial(jax.jit, static_argnames="config")
def _window_nll(
    params: Params, config: DecoderConfig, ids: jax.Array, first: jax.Array, length: jax.Array
) -> jax.Array:
    """Sum of the negative log-likelihoods of tokens `first` to `length` of a window `(1, window)`."""
    logits, _ = forward(params, config, ids)
    logits, targets = logits[0, :-1], ids[0, 1:]
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    at = jnp.arange(1, ids.shape[1])
    return jnp.sum(jnp.where((at >= first) & (at < length), nll, 0.0))
