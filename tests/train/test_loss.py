"""`distillation_loss` against its definition, differentiated by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upg_jax.train import distillation_loss


def definition(student, teacher, ids, distillation, language_model):
    log_p, log_q = jax.nn.log_softmax(student)[:, :-1], jax.nn.log_softmax(teacher)[:, :-1]
    kl = (jnp.exp(log_q) * (log_q - log_p)).sum(-1).mean()
    nll = -jnp.take_along_axis(log_p, ids[:, 1:, None], -1).mean()
    return distillation * kl + language_model * nll, kl, nll


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.75, 2.0)])
def test_value_and_gradient_are_those_of_the_definition(weights, rng):
    student, teacher = (jnp.asarray(rng.standard_normal((2, 5, 11)) * 3, jnp.float32) for _ in range(2))
    ids = jnp.asarray(rng.integers(0, 11, (2, 5)), jnp.int32)

    def ours(student):
        found = distillation_loss(student, teacher, ids, distillation=weights[0], language_model=weights[1])
        return 3 * found.total, found

    (value, found), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(student)

    def defined(student):
        parts = definition(student, teacher, ids, *weights)
        return 3 * parts[0], parts

    (wanted, parts), wanted_gradient = jax.jit(jax.value_and_grad(defined, has_aux=True))(student)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found, parts, rtol=1e-5)


def test_a_student_like_its_teacher_has_no_divergence_and_no_gradient(rng):
    logits = jnp.asarray(rng.standard_normal((1, 4, 9)), jnp.float32)
    ids = jnp.zeros((1, 4), jnp.int32)
    value, gradient = jax.jit(jax.value_and_grad(lambda s: distillation_loss(s, logits, ids).total))(logits)
    assert abs(float(value)) < 1e-6
    assert float(jnp.abs(gradient).max()) < 1e-6
