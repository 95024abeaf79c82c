"""`jax.export`: products saved as programs, and the reference's program for every other platform."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.backends import same_bits
from helpers.layers import Case

from upg_jax import MdCSR, sparse_dense, stack, use_backend

CASE = Case("random", (13, 13), "prime")
OTHERS = ("tpu", "cuda", "rocm")


def gradient(x, layer):
    return jax.vjp(lambda x: sparse_dense(x, layer), x)[1](x)[0]


FUNCTIONS = {
    "product": sparse_dense,
    "gradient": gradient,
    "decode": lambda x, layer: layer.to_dense(),
    "many vectors": lambda x, layer: sparse_dense(jnp.tile(x, (100, 1)), layer),
    "index": lambda x, layer: sparse_dense(x, stack([layer, layer]), index=jnp.array([0, 1, 1])),
}


@pytest.mark.parametrize("name", ["product", pytest.param("gradient", marks=same_bits), "decode"])
def test_round_trip_with_the_layer_as_argument(name):
    f = jax.jit(FUNCTIONS[name])
    with use_backend("reference"):
        exported = jax.export.export(f)(CASE.x(3), CASE.layer)
        restored = jax.export.deserialize(exported.serialize())
        y = restored.call(CASE.x(3), CASE.layer)
        np.testing.assert_array_equal(y, f(CASE.x(3), CASE.layer))


def test_round_trip_with_the_layer_closed_over():
    with use_backend("reference"):
        exported = jax.export.export(jax.jit(lambda x: sparse_dense(x, CASE.layer)))(CASE.x(3))
        restored = jax.export.deserialize(exported.serialize())
        np.testing.assert_array_equal(restored.call(CASE.x(3)), sparse_dense(CASE.x(3), CASE.layer))


@same_bits
def test_gradients_of_a_restored_program():
    with use_backend("reference"):
        exported = jax.export.export(jax.jit(lambda x: sparse_dense(x, CASE.layer)))(CASE.x(3))
        restored = jax.export.deserialize(exported.serialize(vjp_order=1))
        y_bar = CASE.cotangent(3)
        _, vjp = jax.vjp(restored.call, CASE.x(3))
        _, direct = jax.vjp(lambda x: sparse_dense(x, CASE.layer), CASE.x(3))
        np.testing.assert_array_equal(vjp(y_bar)[0], direct(y_bar)[0])


def test_a_symbolic_batch_size():
    with use_backend("reference"):
        (batch,) = jax.export.symbolic_shape("batch")
        x = jax.ShapeDtypeStruct((batch, 13), jnp.float32)
        exported = jax.export.export(jax.jit(lambda x: sparse_dense(x, CASE.layer)))(x)
        restored = jax.export.deserialize(exported.serialize())
        for n in (1, 5):
            np.testing.assert_allclose(
                restored.call(CASE.x(n)), sparse_dense(CASE.x(n), CASE.layer), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_is_plain_hlo_on_every_platform(name):
    with use_backend("reference"):
        exported = jax.export.export(jax.jit(FUNCTIONS[name]), platforms=OTHERS)(CASE.x(3), CASE.layer)
    assert set(exported.platforms) == set(OTHERS)
    assert "custom_call" not in exported.mlir_module()


def test_a_restored_program_names_the_layer_type_and_its_metadata():
    exported = jax.export.export(jax.jit(lambda layer: layer.scales))(CASE.layer)
    restored = jax.export.deserialize(exported.serialize())
    (args, _) = jax.tree.unflatten(restored.in_tree, range(restored.in_tree.num_leaves))
    assert isinstance(args[0], MdCSR)
    assert jax.tree.structure(args[0]) == jax.tree.structure(CASE.layer)
    with pytest.raises(ValueError, match=r"[Tt]ree|structure"):
        restored.call(Case("random", (13, 13), "prime", row_alignment=4).layer)
