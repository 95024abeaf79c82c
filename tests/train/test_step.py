"""The gradient of a training step against JAX's of the whole loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama

from upg_jax import UPGModel
from upg_jax.compress import Settings, compress_checkpoint
from upg_jax.train import Student, Teacher, distillation_loss
from upg_jax.train._step import _POSITIONS, gradient


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("step")
    source = llama.write_hugging_face(directory / "hf", llama.weights(), attention_bias=False)
    compress_checkpoint(source, directory / "m", Settings(density=0.5))
    student = Student.from_model(UPGModel.from_file(directory / "m", pack=False))
    return student, Teacher.from_model(UPGModel.from_file(source))


@pytest.mark.parametrize("tokens", [7, 70])
def test_the_gradient_is_that_of_the_loss_of_all_positions(networks, tokens):
    student, teacher = networks
    ids = jnp.asarray(np.random.default_rng(0).integers(0, llama.VOCABULARY, (2, tokens)))
    assert (ids.size > _POSITIONS) == (tokens == 70)

    @jax.jit
    def plainly(trained, student, teacher):
        def loss(trained):
            logits = student.with_trained(trained).logits(ids)
            found = distillation_loss(logits, teacher.logits(ids), ids, language_model=0.25)
            return found.total, found

        return jax.grad(loss, has_aux=True)(trained)

    trained = student.trained()
    expected, losses = plainly(trained, student, teacher)
    found, found_losses = jax.jit(gradient, static_argnames="weights")(
        trained, student.without_trained(), teacher, ids, weights=(1.0, 0.25)
    )
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Sums of some hundred rounded terms in another order.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))
