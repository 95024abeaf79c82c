"""One step of training, compiled once."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._errors import MissingDependencyError
from upg_jax.train._loss import Losses, predicted, weighted_loss
from upg_jax.train._network import Student, Teacher

# Budgets are some hundreds of steps: a longer memory of squared gradients would outlast them.
_BETAS = (0.9, 0.98)
_POSITIONS = 128


def optimizer(clip: float) -> Any:
    """Adam on clipped gradients, without its learning rate, which follows the budget and not the step.

    Raises:
        MissingDependencyError: without optax.
    """
    try:
        import optax
    except ImportError as e:
        raise MissingDependencyError('recover: training needs optax; pip install "upg-jax[train]"') from e
    return optax.chain(optax.clip_by_global_norm(clip), optax.scale_by_adam(*_BETAS))


@partial(jax.jit, static_argnames=("weights", "clip"), donate_argnames=("trained", "state"))
def train_step(
    trained: Any,
    state: Any,
    rest: Student,
    teacher: Teacher,
    ids: jax.Array,
    learning_rate: jax.Array,
    *,
    weights: tuple[float, float],
    clip: float,
) -> tuple[Any, Any, Losses]:
    """Takes one step.

    Args:
        trained: what `Student.trained` returned; donated.
        state: of the optimizer; donated.
        rest: what `Student.without_trained` returned.
        teacher: the dense network.
        ids: int32 `(micro_batches, batch, window)`.
        learning_rate: float32 scalar.
        weights: of distillation and language model.
        clip: as for `optimizer`.
    """
    if ids.shape[0] == 1:
        gradients, losses = gradient(trained, rest, teacher, ids[0], weights)
    else:
        one = partial(gradient, trained, rest, teacher, weights=weights)

        def add(sums: Any, ids_of_one: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, one(ids_of_one)), None

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, ids[0]))
        sums, _ = jax.lax.scan(add, zeros, ids)
        gradients, losses = jax.tree.map(lambda a: a / ids.shape[0], sums)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, state = optimizer(clip).update(gradients, state)
    trained = jax.tree.map(lambda a, u: a - learning_rate.astype(a.dtype) * u, trained, updates)
    return trained, state, losses


def gradient(
    trained: Any, rest: Student, teacher: Teacher, ids: jax.Array, weights: tuple[float, float]
) -> tuple[Any, Losses]:
    """The gradient of `distillation_loss` for `trained`, and the losses; arguments as of `train_step`.

    Args:
        trained: see there.
        rest: see there.
        teacher: see there.
        ids: int32 `(batch, window)`.
        weights: see there.
    """
    hidden, pull_back = jax.vjp(lambda trained: rest.with_trained(trained).hidden(ids), trained)
    of_teacher = teacher.hidden(ids)
    losses, norm, of_hidden = _head_gradient(rest, teacher, trained["norm"], hidden, of_teacher, ids, weights)
    (found,) = pull_back(of_hidden)
    return {**found, "norm": found["norm"] + norm}, losses


def _head_gradient(
    student: Student,
    teacher: Teacher,
    norm: jax.Array,
    hidden: jax.Array,
    of_teacher: jax.Array,
    ids: jax.Array,
    weights: tuple[float, float],
) -> tuple[Losses, jax.Array, jax.Array]:
    """Losses and their gradients for `norm` and `hidden`, some positions at a time.

    The logits of all positions would be the largest arrays of a step by far, and leave every cache.
    """
    targets, share = predicted(ids)

    def loss(
        norm: jax.Array, x: jax.Array, x_of_teacher: jax.Array, targets: jax.Array, share: jax.Array
    ) -> tuple[jax.Array, Losses]:
        losses = weighted_loss(student.head(x, norm), teacher.head(x_of_teacher), targets, share, weights)
        return losses.total, losses

    differentiated = jax.grad(loss, argnums=(0, 1), has_aux=True)

    def add(sums: Any, positions: Any) -> tuple[Any, jax.Array]:
        (of_norm, of_x), losses = differentiated(norm, *positions)
        return jax.tree.map(jnp.add, sums, (losses, of_norm)), of_x

    def cut(a: jax.Array) -> jax.Array:
        flat = a.reshape(ids.size, *a.shape[2:])
        missing = -ids.size % _POSITIONS  # of no share
        padded = jnp.pad(flat, [(0, missing)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(-1, _POSITIONS, *flat.shape[1:])

    nothing = (Losses(*3 * (jnp.zeros(()),)), jnp.zeros_like(norm))
    (losses, of_norm), of_x = jax.lax.scan(
        add, nothing, tuple(map(cut, (hidden, of_teacher, targets, share)))
    )
    return losses, of_norm, of_x.reshape(-1, hidden.shape[-1])[: ids.size].reshape(hidden.shape)
