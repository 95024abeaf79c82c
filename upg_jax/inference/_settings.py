"""What a caller may ask of an answer, checked before anything is computed."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAX_LOGPROBS = 20
"""Alternatives that a step computes where log-probabilities are asked for."""

ASKED = ("penalties", "draws", "top_k", "top_p", "logprobs")
"""What a step computes only where a row asks for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How an answer is chosen, and where it ends.

    What is left of a distribution is decided in this order: repetition penalty, frequency and presence penalties, bias,
    temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: tokens to generate at most.
        temperature: 0 always takes the most likely token; otherwise what the logits are divided by.
        top_k: choose among this many of the most likely tokens.
        top_p: choose among the fewest of the most likely tokens whose probabilities add up to this.
        min_p: choose among tokens at least this times as likely as the most likely one.
        repetition_penalty: divides the logits above zero of tokens in prompt or answer, and multiplies those below
            (Keskar et al., 2019); 1 does nothing.
        frequency_penalty: taken from a token's logit each time it is in the answer.
        presence_penalty: taken from a token's logit if it is in the answer.
        logit_bias: added to the logits of tokens, by id.
        seed: makes random choices reproducible; None takes a fresh one.
        logprobs: record each token's log-probability and those of this many of the most likely ones, 0 to 20, as the
            model has them before any other setting.
        stop: texts that end an answer, and are not part of it.
        stop_at_eos: end an answer at one of the model's `eos_token_ids`.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    logprobs: int | None = None
    stop: str | Sequence[str] = ()
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        stop = tuple(self.stop) if isinstance(self.stop, list | tuple) else (self.stop,)
        biases = dict(self.logit_bias or {})
        rules = [
            ("max_new_tokens", _is_int(self.max_new_tokens, 0), "an integer of at least 0"),
            ("temperature", _is_number(self.temperature, 0), "finite and at least 0"),
            ("top_k", self.top_k is None or _is_int(self.top_k, 1), _TOP_K),
            ("top_p", self.top_p is None or _is_number(self.top_p, _ABOVE_0, 1), "in (0, 1]"),
            ("min_p", self.min_p is None or _is_number(self.min_p, 0, 1), "in [0, 1]"),
            ("repetition_penalty", _is_number(self.repetition_penalty, _ABOVE_0), "finite and above 0"),
            ("frequency_penalty", _is_number(self.frequency_penalty), "a finite number"),
            ("presence_penalty", _is_number(self.presence_penalty), "a finite number"),
            (
                "logit_bias",
                all(_is_int(k) and _is_number(v) for k, v in biases.items()),
                "finite numbers by token id",
            ),
            ("seed", self.seed is None or _is_int(self.seed), "an integer"),
            (
                "logprobs",
                self.logprobs is None or _is_int(self.logprobs, 0, MAX_LOGPROBS),
                f"in [0, {MAX_LOGPROBS}]",
            ),
            ("stop", all(isinstance(s, str) and s for s in stop), "texts of at least one character"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"generate: {name} must be {rule}; got {getattr(self, name)!r}")
        object.__setattr__(self, "stop", stop)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return self.stop  # type: ignore[return-value]  # made so above

    @property
    def asked(self) -> frozenset[str]:
        """What a step has to do beside finding the likeliest token, by the names in `ASKED`."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        given = {
            "penalties": penalties != (1, 0, 0) or bool(self.logit_bias),
            "draws": self.temperature > 0,
            "top_k": self.temperature > 0 and self.top_k is not None,
            "top_p": self.temperature > 0 and self.top_p is not None,
            "logprobs": self.logprobs is not None,
        }
        return frozenset(name for name in given if given[name])

    def with_seed(self, seed: int) -> GenerationSettings:
        """The same with another seed; nothing is checked again."""
        other = copy.copy(self)
        object.__setattr__(other, "seed", seed)
        return other

    def check_vocabulary(self, vocab_size: int) -> None:
        """Checks what depends on the model.

        Raises:
            ValueError: for a token of `logit_bias` outside the vocabulary.
        """
        for token in (min(self.logit_bias), max(self.logit_bias)) if self.logit_bias else ():
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"generate: logit_bias must be for token ids in [0, {vocab_size}); got {token}"
                )

    def bias(self, vocab_size: int) -> np.ndarray:
        """`logit_bias` for every token, float32 `(vocab_size,)`; errors are those of `check_vocabulary`."""
        self.check_vocabulary(vocab_size)
        found = np.zeros(vocab_size, np.float32)
        for token, bias in (self.logit_bias or {}).items():
            found[token] = bias
        return found


_TOP_K = "an integer of at least 1, or None to keep all tokens"
_ABOVE_0 = 5e-324
_LARGEST = 1e38  # what is larger may become infinite in float32


def _is_int(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and low <= int(value) <= high


def _is_number(value: Any, low: float = -_LARGEST, high: float = _LARGEST) -> bool:
    return _is_int(value, low, high) or (
        isinstance(value, (float, np.floating)) and low <= float(value) <= high
    )
