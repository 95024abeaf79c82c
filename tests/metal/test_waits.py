"""How often a decoding step waits for the GPU, and that its logits are those that the processor computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_llama import compressed_model

from upg_jax import MdCSR, use_backend
from upg_jax.models import forward, is_stacked

step = jax.jit(forward, static_argnames=("config", "last_only"))
IDS = jnp.asarray([[3, 1, 4, 1, 5]])


def unrolled(params):
    """The same parameters with a matrix for each layer and projection."""

    def singles(weights):
        if not isinstance(weights, MdCSR):
            return weights
        return tuple(
            jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], weights) for i in range(weights.stack_size)
        )

    return {**params, "layers": {name: singles(weights) for name, weights in params["layers"].items()}}


def products(params, layers: int) -> int:
    compressed = sum(isinstance(w, (MdCSR, tuple)) for w in params["layers"].values())
    return layers * compressed + isinstance(params.get("lm_head"), MdCSR)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_step_waits_four_times_for_each_layer(emulator, stacked):
    model = compressed_model("everything")
    params = model.params if stacked else unrolled(model.params)
    assert is_stacked(params["layers"]) == stacked
    layers, head = model.config.num_layers, isinstance(params.get("lm_head"), MdCSR)
    assert products(params, layers) == 7 * layers + head
    cache = model.init_cache(1, 8) if stacked else None
    jax.block_until_ready(step(params, model.config, IDS, cache))  # as many waits, and compiles
    before = emulator.command_buffers
    logits, _ = jax.block_until_ready(step(params, model.config, IDS, cache))
    assert emulator.command_buffers - before == 4 * layers + head
    with use_backend("auto"):
        expected, _ = step(model.params, model.config, IDS)
    # Activations are of order 1 to 10, and both sides round their products differently.
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_generation_in_the_emulator_answers_as_the_processor_does(emulator):
    model = compressed_model("everything")
    answer = model.generate([3, 1, 4], max_new_tokens=3)
    with use_backend("auto"):
        assert answer.ids == model.generate([3, 1, 4], max_new_tokens=3).ids
