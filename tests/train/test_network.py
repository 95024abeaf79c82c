"""`Student` and `Teacher` compute what the model computes, and a student's gradient is that of the plain decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama

from upg_jax import CheckpointError, MdCSR, UPGModel, partition
from upg_jax.compress import Rule, Settings, compress_checkpoint
from upg_jax.models import forward
from upg_jax.train import Student, Teacher

IDS = np.random.default_rng(0).integers(0, llama.VOCABULARY, (2, 12))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return llama.write_hugging_face(
        tmp_path_factory.mktemp("hf") / "m", llama.weights(), attention_bias=False
    )


def compressed(source, directory, *rules, density=0.5):
    compress_checkpoint(source, directory, Settings(density=density, rules=rules))
    return UPGModel.from_file(directory, pack=False)


RULES = {
    "stacked": (),
    "one dense projection": (Rule.keep_dense("k_proj"),),
    "layers of both kinds": (Rule.keep_dense(r"layers\.0\.mlp\.up_proj"),),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_logits_are_the_models(source, tmp_path, rules):
    model = compressed(source, tmp_path / "m", *rules)
    expected = np.asarray(forward(model.params, model.config, jnp.asarray(IDS))[0])
    for network in (Student, Teacher):
        logits = network.from_model(model).logits(jnp.asarray(IDS))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_trained_leaves_go_round(source, tmp_path, rules):
    student = Student.from_model(compressed(source, tmp_path / "m", *rules))
    trained, rest = student.trained(), student.without_trained()
    assert len(jax.tree.leaves(trained)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(student))
    for a, b in zip(jax.tree.leaves(rest.with_trained(trained)), jax.tree.leaves(student), strict=True):
        assert a is b


def test_the_gradient_for_norms_is_that_of_the_plain_decoder(source, tmp_path):
    model = compressed(source, tmp_path / "m")
    student = Student.from_model(model)
    params, others = partition(model.params)

    def of_model(norm):
        from upg_jax import combine

        return jnp.sum(
            forward({**combine(params, others), "norm": norm}, model.config, jnp.asarray(IDS))[0] ** 2
        )

    def of_student(trained):
        return jnp.sum(student.with_trained(trained).logits(jnp.asarray(IDS)) ** 2)

    expected = jax.grad(of_model)(model.params["norm"])
    found = jax.grad(of_student)(student.trained())
    np.testing.assert_allclose(found["norm"], expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found))


def test_what_was_not_trained_is_encoded_as_it_was(source, tmp_path):
    model = compressed(source, tmp_path / "m")
    tensors = Student.from_model(model).tensors()
    stack = model.params["layers"]["down_proj"]
    for i in range(llama.LAYERS):
        layer = tensors[f"model.layers.{i}.mlp.down_proj.weight"]
        assert isinstance(layer, MdCSR)
        wanted = jax.tree.map(lambda a, i=i: a[i], stack).to_dense(jnp.float32)
        np.testing.assert_array_equal(layer.to_dense(jnp.float32), wanted)


def test_a_dense_model_has_nothing_to_recover(source):
    with pytest.raises(CheckpointError, match="no projection is compressed"):
        Student.from_model(UPGModel.from_file(source))


def test_bfloat16_products_are_near(source, tmp_path):
    model = compressed(source, tmp_path / "m")
    exact, rounded = (
        np.asarray(Student.from_model(model, precision=p).logits(jnp.asarray(IDS)))
        for p in ("float32", "bfloat16")
    )
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 0 < error < 0.05
