"""One step of training, compiled once."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._errors import MissingDependencyError
from upg_jax.train._loss import Losses, distillation_loss
from upg_jax.train._network import Student, Teacher

# Budgets are some hundreds of steps: a longer memory of squared gradients would outlast them.
_BETAS = (0.9, 0.98)


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

    def loss(trained: Any, ids: jax.Array) -> tuple[jax.Array, Losses]:
        student = rest.with_trained(trained).logits(ids)
        losses = distillation_loss(
            student,
            jax.lax.stop_gradient(teacher.logits(ids)),
            ids,
            distillation=weights[0],
            language_model=weights[1],
        )
        return losses.total, losses

    gradient = jax.grad(loss, has_aux=True)
    if ids.shape[0] == 1:
        gradients, losses = gradient(trained, ids[0])
    else:

        def add(sums: Any, ids_of_one: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(trained, ids_of_one)), None

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, trained, ids[0]))
        sums, _ = jax.lax.scan(add, zeros, ids)
        gradients, losses = jax.tree.map(lambda a: a / ids.shape[0], sums)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, state = optimizer(clip).update(gradients, state)
    trained = jax.tree.map(lambda a, u: a - learning_rate.astype(a.dtype) * u, trained, updates)
    return trained, state, losses
