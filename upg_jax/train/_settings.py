"""How to recover, and how far a recovery is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    """How to train and when to stop.

    Attributes:
        minutes: of training, compilation included, loading and encoding not.
        tokens: to train on. One of the two must be given; with both, what is reached first ends it.
        learning_rate: at its highest. It rises over the first `warmup` of the budget and falls to 0 as a cosine.
        warmup: share of the budget, in `[0, 1)`.
        distillation: weight of the divergence from the dense model's predictions.
        language_model: weight of the text's own next tokens.
        window: tokens of a sequence.
        batch: sequences of a micro-batch.
        micro_batches: whose gradients are added up for one step.
        clip: largest norm of a step's gradient; longer ones are shortened to it.
        precision: of products, `"float32"` or `"bfloat16"`; None for bfloat16 where the device has it.
        seed: of the order of the text.
        checkpoint_minutes: between checkpoints.
    """

    minutes: float | None = None
    tokens: int | None = None
    learning_rate: float = 5e-4
    warmup: float = 0.05
    distillation: float = 1.0
    language_model: float = 0.25
    window: int = 512
    batch: int = 1
    micro_batches: int = 1
    clip: float = 1.0
    precision: str | None = None
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.minutes is None and self.tokens is None:
            raise ValueError("recover: give minutes or tokens, the budget of training")
        positive = (
            "minutes",
            "tokens",
            "learning_rate",
            "batch",
            "micro_batches",
            "clip",
            "checkpoint_minutes",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"recover: {name} must be above 0; got {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"recover: warmup must be in [0, 1); got {self.warmup}")
        if min(self.distillation, self.language_model) < 0 or self.distillation + self.language_model == 0:
            raise ValueError(
                "recover: distillation and language_model must not be negative, and not both 0; got "
                f"{self.distillation} and {self.language_model}"
            )
        if self.precision not in (None, "float32", "bfloat16"):
            raise ValueError(f"recover: precision must be float32 or bfloat16; got {self.precision!r}")

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.window * self.batch * self.micro_batches

    def spent(self, seconds: float, tokens: int) -> float:
        """The share of the budget that is spent; 1 and more at its end."""
        shares = [seconds / (60 * self.minutes)] if self.minutes is not None else []
        if self.tokens is not None:
            shares.append(tokens / self.tokens)
        return max(shares)

    def rate(self, spent: float) -> float:
        """The learning rate when this share of the budget is spent."""
        if spent < self.warmup:
            return self.learning_rate * spent / self.warmup
        progress = min((spent - self.warmup) / (1 - self.warmup), 1.0)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file's provenance."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class RecoveryProgress:
    """Where a training is, after a step.

    Attributes:
        step: steps done, those of an earlier run included.
        tokens: trained on.
        seconds: of training.
        spent: share of the budget.
        loss: what is minimized, on this step's text.
        kl: divergence from the dense model, in nats per token.
        nll: negative log-likelihood of the text, in nats per token.
        learning_rate: of this step.
        tokens_per_second: of this run, its compilation apart.
        remaining: seconds left; None until the rate is known.
    """

    step: int
    tokens: int
    seconds: float
    spent: float
    loss: float
    kl: float
    nll: float
    learning_rate: float
    tokens_per_second: float
    remaining: float | None
