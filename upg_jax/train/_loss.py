"""Distillation and language-model loss, with the gradient in closed form."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Losses(NamedTuple):
    """Means over the predicted tokens, in nats.

    Attributes:
        total: what is minimized.
        kl: `KL(teacher || student)`.
        nll: negative log-likelihood of the text's next token.
    """

    total: jax.Array
    kl: jax.Array
    nll: jax.Array


def distillation_loss(
    student: jax.Array,
    teacher: jax.Array,
    ids: jax.Array,
    *,
    distillation: float = 1.0,
    language_model: float = 0.0,
) -> Losses:
    """`distillation * KL(teacher || student) + language_model * nll`, over all positions but the last.

    Differentiable with respect to `student`, through `total`.

    Args:
        student: logits, float32 `(batch, tokens, vocab)`.
        teacher: logits of the same shape.
        ids: integers `(batch, tokens)`.
        distillation: weight of the divergence (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at
            temperature 1).
        language_model: weight of the text itself.
    """
    return weighted_loss(student, teacher, *predicted(ids), (distillation, language_model))


def predicted(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is predicted at each position of `ids (batch, tokens)`, and its share in a mean: float32, 0 at the last."""
    batch, tokens = ids.shape
    counted = (jnp.arange(tokens) < tokens - 1).astype(jnp.float32)
    share = counted / (batch * max(tokens - 1, 1))
    return jnp.roll(ids, -1, axis=1), jnp.broadcast_to(share, ids.shape)


def weighted_loss(
    student: jax.Array, teacher: jax.Array, targets: jax.Array, share: jax.Array, weights: tuple[float, float]
) -> Losses:
    """`distillation_loss` of some positions.

    Args:
        student: logits, float32 `(..., vocab)`.
        teacher: like `student`.
        targets: integers `(...)`, the next tokens.
        share: float32 `(...)`, of each position in the means.
        weights: of distillation and language model.
    """
    total, (kl, nll) = _loss(student, teacher, targets, share, *weights)
    return Losses(total, kl, nll)


@jax.custom_vjp
def _loss(
    student: Any, teacher: Any, targets: Any, share: Any, distillation: float, language_model: float
) -> Any:
    return _forward(student, teacher, targets, share, distillation, language_model)[0]


def _forward(
    student: Any, teacher: Any, targets: Any, share: Any, distillation: float, language_model: float
) -> Any:
    log_p = student - jax.nn.logsumexp(student, axis=-1, keepdims=True)
    log_q = teacher - jax.nn.logsumexp(teacher, axis=-1, keepdims=True)
    q = jnp.exp(log_q)
    kl = jnp.sum(share * jnp.sum(q * (log_q - log_p), axis=-1))
    nll = -jnp.sum(share * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])
    # Kept for the way back: one array of the logits' size instead of two.
    chosen = jax.nn.one_hot(targets, student.shape[-1], dtype=jnp.bool_)
    wanted = distillation * q + language_model * chosen.astype(jnp.float32)
    gradient = share[..., None] * ((distillation + language_model) * jnp.exp(log_p) - wanted)
    return (distillation * kl + language_model * nll, (kl, nll)), gradient


def _backward(gradient: Any, cotangent: Any) -> Any:
    return cotangent[0] * gradient, None, None, None, None, None


_loss.defvjp(_forward, _backward)
