"""`Student` and `Teacher` compute what the model computes, and a student's gradient is that of the plain decoder."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama

from upg_jax import CheckpointError, MdCSR, UPGModel, combine, partition
from upg_jax.compress import Rule, Settings, compress_checkpoint
from upg_jax.models import forward
from upg_jax.train import Student, Teacher
from upg_jax.train._recover import _write

IDS = jnp.asarray(np.random.default_rng(0).integers(0, llama.VOCABULARY, (2, 12)))
logits_of = jax.jit(lambda network: network.logits(IDS))
compiled_forward = jax.jit(forward, static_argnames="config")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return llama.write_hugging_face(
        tmp_path_factory.mktemp("hf") / "m", llama.weights(), attention_bias=False
    )


@pytest.fixture(scope="module")
def compressed(source, tmp_path_factory):
    """The model at density 0.5 with some rules, each made once."""

    @functools.cache
    def model(*rules):
        directory = tmp_path_factory.mktemp("compressed") / "m"
        compress_checkpoint(source, directory, Settings(density=0.5, rules=rules))
        return UPGModel.from_file(directory, pack=False)

    return model


RULES = {
    "stacked": (),
    "one dense projection": (Rule.keep_dense("k_proj"),),
    "layers of both kinds": (Rule.keep_dense(r"layers\.0\.mlp\.up_proj"),),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_logits_are_the_models(compressed, rules):
    model = compressed(*rules)
    expected = np.asarray(compiled_forward(model.params, model.config, IDS)[0])
    for network in (Student, Teacher):
        logits = logits_of(network.from_model(model))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_trained_leaves_go_round(compressed, rules):
    student = Student.from_model(compressed(*rules))
    trained, rest = student.trained(), student.without_trained()
    assert len(jax.tree.leaves(trained)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(student))
    for a, b in zip(jax.tree.leaves(rest.with_trained(trained)), jax.tree.leaves(student), strict=True):
        assert a is b


def test_the_gradient_for_norms_is_that_of_the_plain_decoder(compressed):
    model = compressed()
    student = Student.from_model(model)
    params, others = partition(model.params)

    @jax.jit
    def of_model(norm, params, others):
        def loss(norm):
            return jnp.sum(forward({**combine(params, others), "norm": norm}, model.config, IDS)[0] ** 2)

        return jax.grad(loss)(norm)

    @jax.jit
    def of_student(trained, student):
        return jax.grad(lambda trained: jnp.sum(student.with_trained(trained).logits(IDS) ** 2))(trained)

    expected = of_model(model.params["norm"], params, others)
    found = of_student(student.trained(), student)
    np.testing.assert_allclose(found["norm"], expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found))


def test_what_was_not_trained_is_encoded_as_it_was(compressed):
    model = compressed()
    tensors = Student.from_model(model).tensors()
    stack = model.params["layers"]["down_proj"]
    for i in range(llama.LAYERS):
        layer = tensors[f"model.layers.{i}.mlp.down_proj.weight"]
        assert isinstance(layer, MdCSR)
        wanted = jax.tree.map(lambda a, i=i: np.asarray(a)[i], stack).to_dense(jnp.float32)
        np.testing.assert_array_equal(layer.to_dense(jnp.float32), wanted)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_student_of_few_bits_computes_with_the_weights_that_will_be_written(source, tmp_path, rules, rng):
    settings = Settings(density=0.5, rules=rules, value_bits=3, group_size=32)
    compress_checkpoint(source, tmp_path / "m", settings)
    student = Student.from_model(UPGModel.from_file(tmp_path / "m", pack=False))
    moved = jax.tree.map(
        lambda w: jax.device_put((w * rng.uniform(0.7, 1.2, w.shape)).astype(np.float32)), student.trained()
    )
    trained = student.with_trained(moved)
    _write(tmp_path / "m", tmp_path / "better", trained.tensors(), {})
    written = Student.from_model(UPGModel.from_file(tmp_path / "better", pack=False))
    expected = np.asarray(logits_of(written))
    assert np.abs(logits_of(student) - expected).max() > 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(logits_of(trained), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_dense_model_has_nothing_to_recover(source):
    with pytest.raises(CheckpointError, match="no projection is compressed"):
        Student.from_model(UPGModel.from_file(source))


def test_bfloat16_products_are_near(compressed):
    exact, rounded = (
        np.asarray(logits_of(Student.from_model(compressed(), precision=p))) for p in ("float32", "bfloat16")
    )
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 0 < error < 0.05
