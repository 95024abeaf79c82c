"""The decoder on compressed layers: equal to the decoder on their decoded weights, however they are stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_llama import Weights, compressed_model, compressed_weights, dense_model, make, repeated
from oracle.mdcsr import decode_layer

from upg_jax import MdCSR, combine, partition
from upg_jax.models import forward, is_stacked, load, parse_config

IDS = np.random.default_rng(0).integers(0, 101, (2, 11))
compiled = jax.jit(forward, static_argnames=("config", "last_only"))
# The products of both sides round differently; activations are of order 1 to 10, as in the comparison with
# transformers, whose tolerance this is.
TOLERANCE = 1e-4


def decoded_logits(name, density, manifold="unit"):
    weights = {
        key: decode_layer(value) if isinstance(value, MdCSR) else value
        for key, value in compressed_weights(name, density, manifold).items()
    }
    config = parse_config(make(name)[1])
    params = load(config, Weights(weights), jnp.dtype("float32"))
    return compiled(params, config, jnp.asarray(IDS))[0]


@pytest.mark.parametrize(("manifold", "density"), [("unit", 1.0), ("prime", 0.3)])
def test_compressed_layers_compute_what_their_decoded_weights_do(manifold, density):
    model = compressed_model("everything", density, manifold)
    assert is_stacked(model.params["layers"])
    logits, _ = compiled(model.params, model.config, jnp.asarray(IDS))
    np.testing.assert_allclose(
        logits, decoded_logits("everything", density, manifold), atol=TOLERANCE, rtol=0
    )


def test_prime_manifold_at_density_one_is_the_dense_model():
    dense, prime = dense_model("everything"), compressed_model("everything", 1.0, "prime")
    expected, _ = compiled(dense.params, dense.config, jnp.asarray(IDS))
    logits, _ = compiled(prime.params, prime.config, jnp.asarray(IDS))
    # FORMAT: mean relative error of a weight 1e-6 to 3e-6.
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(jnp.argmax(logits, -1), jnp.argmax(expected, -1))


@pytest.mark.parametrize("storage", ["mixed", "dense-first-layer"])
def test_unrolled_storage_computes_the_same_as_one_loop(storage):
    model = compressed_model("everything")
    layers = dict(model.params["layers"])
    for name, weights in layers.items():
        if not isinstance(weights, MdCSR) or (storage == "mixed" and name in ("q_proj", "down_proj")):
            continue
        singles = [
            jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], weights) for i in range(weights.stack_size)
        ]
        if storage == "dense-first-layer":
            singles[0] = jnp.asarray(decode_layer(singles[0]))
        layers[name] = tuple(singles)
    assert not is_stacked(layers)
    params = {**model.params, "layers": layers}
    expected, _ = compiled(model.params, model.config, jnp.asarray(IDS))
    logits, _ = compiled(params, model.config, jnp.asarray(IDS))
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def test_a_compressed_head_works():
    _, hf, weights = make("grouped-query")
    weights = dict(weights)
    weights["lm_head.weight"] = MdCSR.from_dense(weights["lm_head.weight"])
    config = parse_config(hf)
    params = load(config, Weights(weights), jnp.dtype("float32"))
    assert isinstance(params["lm_head"], MdCSR)
    logits, _ = compiled(params, config, jnp.asarray(IDS))
    params["lm_head"] = jnp.asarray(decode_layer(params["lm_head"]))
    expected, _ = compiled(params, config, jnp.asarray(IDS))
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def test_the_program_has_one_layer_and_few_arguments_however_deep_the_model_is():
    model = compressed_model()

    def lowered(layers):
        deep = repeated(model, layers)
        text = compiled.lower(deep.params, deep.config, jnp.asarray(IDS)).as_text()
        return len(text.splitlines()), len(jax.tree.leaves(deep.params))

    assert lowered(2) == lowered(20)


def test_scales_can_be_trained_through_the_model():
    model = compressed_model("grouped-query")
    floats, rest = partition(model.params)

    def loss(floats):
        logits, _ = forward(combine(floats, rest), model.config, jnp.asarray(IDS))
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    value, gradients = jax.jit(jax.value_and_grad(loss))(floats)
    scales = gradients["layers"]["up_proj"].scales
    assert scales.shape == (2, 80)
    assert np.isfinite(scales).all()
    # Finite differences along the gradient: the loss falls by its squared length, to first order.
    length = sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(gradients["layers"]["up_proj"]))
    step = 1e-3 / float(jnp.sqrt(length))
    moved = jax.tree.map(lambda leaf: leaf, floats)
    up = moved["layers"]["up_proj"]
    moved["layers"]["up_proj"] = jax.tree.map(lambda a, g: a - step * g, up, gradients["layers"]["up_proj"])
    fall = float(value - jax.jit(loss)(moved))
    assert fall == pytest.approx(step * float(length), rel=0.05)
