"""Mapping a checkpoint's tensors to parameters: exact, or refused naming the tensor."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_llama import Weights
from oracle.mdcsr import decode_layer

from upg_jax import CheckpointError, MdCSR
from upg_jax.models import can_stack, is_stacked, load, parse_config, stack_layers
from upg_jax.models._embedding import look_up

HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
BLOCK = {
    "input_layernorm.weight": (12,),
    "post_attention_layernorm.weight": (12,),
    "self_attn.q_proj.weight": (12, 12),
    "self_attn.k_proj.weight": (12, 12),
    "self_attn.v_proj.weight": (12, 12),
    "self_attn.o_proj.weight": (12, 12),
    "mlp.gate_proj.weight": (20, 12),
    "mlp.up_proj.weight": (20, 12),
    "mlp.down_proj.weight": (12, 20),
}


def tensors(dtype=np.float32):
    shapes = {f"model.layers.{i}.{key}": shape for i in range(2) for key, shape in BLOCK.items()}
    shapes |= {"model.embed_tokens.weight": (11, 12), "model.norm.weight": (12,), "lm_head.weight": (11, 12)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def load_tensors(found, dtype="float32", **changes):
    return load(parse_config({**HF, **changes}), Weights(found), jnp.dtype(dtype))


def test_every_tensor_reaches_its_slot():
    found = tensors()
    params = load_tensors(found)
    assert set(params) == {"embed_tokens", "norm", "lm_head", "layers"}
    np.testing.assert_array_equal(params["embed_tokens"], found["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"], found["model.norm.weight"])
    np.testing.assert_array_equal(params["lm_head"], found["lm_head.weight"])
    slots = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    slots = {key: slots.get(name := key.split(".")[-2], name) for key in BLOCK}
    assert set(params["layers"]) == set(slots.values())
    for key in BLOCK:
        slot = params["layers"][slots[key]]
        for i in range(2):
            np.testing.assert_array_equal(slot[i], found[f"model.layers.{i}.{key}"])


def remove(name):
    return lambda found: found.pop(name)


def add(name, shape):
    return lambda found: found.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            remove("model.layers.1.mlp.up_proj.weight"),
            "the model needs tensor 'model.layers.1.mlp.up_proj.weight', which is missing",
        ),
        (remove("lm_head.weight"), "the model needs tensor 'lm_head.weight', which is missing"),
        (
            add("model.layers.2.mlp.up_proj.weight", (20, 12)),
            "tensor 'model.layers.2.mlp.up_proj.weight' is not part of the model",
        ),
        (
            add("model.layers.0.self_attn.q_proj.bias", 12),
            "tensor 'model.layers.0.self_attn.q_proj.bias' is not part of the model",
        ),
        (
            add("model.norm.weight", 13),
            "tensor 'model.norm.weight' must have shape (12,) by the configuration; got (13,)",
        ),
        (
            add("model.layers.0.mlp.down_proj.weight", (20, 12)),
            "tensor 'model.layers.0.mlp.down_proj.weight' must have shape (12, 20) by the configuration; got (20, 12)",
        ),
    ],
)
def test_a_missing_extra_or_misshaped_tensor_is_named(change, message):
    found = tensors()
    change(found)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_tensors(found)


def test_how_many_more_are_missing_is_said():
    with pytest.raises(
        CheckpointError, match=re.escape("'model.norm.weight', which is missing (and 1 more)")
    ):
        load_tensors({k: v for k, v in tensors().items() if k not in ("model.norm.weight", "lm_head.weight")})


def test_biases_are_expected_where_the_configuration_has_them():
    with pytest.raises(CheckpointError, match=r"needs tensor 'model.layers.0.self_attn.q_proj.bias'"):
        load_tensors(tensors(), attention_bias=True)
    found = tensors()
    for i in range(2):
        for name, size in (("gate_proj", 20), ("up_proj", 20), ("down_proj", 12)):
            found[f"model.layers.{i}.mlp.{name}.bias"] = np.full(size, i, np.float32)
    biases = load_tensors(found, mlp_bias=True)["layers"]["up_proj.bias"]
    np.testing.assert_array_equal(biases, [[0] * 20, [1] * 20])


def test_leftovers_of_old_checkpoints_are_ignored():
    found = tensors()
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    load_tensors(found)
    # A tied model that stores its head again.
    assert "lm_head" not in load_tensors(found, tie_word_embeddings=True)


def test_dense_weights_take_the_activations_dtype_and_a_looked_up_embedding_keeps_its_own():
    params = load_tensors(tensors(np.float32), "bfloat16")
    assert params["norm"].dtype == params["lm_head"].dtype == jnp.bfloat16
    assert params["layers"]["q_proj"][0].dtype == params["layers"]["attention_norm"].dtype == jnp.bfloat16
    assert params["embed_tokens"].dtype == jnp.float32
    # Tied, it is also the head.
    assert load_tensors(tensors(), "bfloat16", tie_word_embeddings=True)["embed_tokens"].dtype == jnp.bfloat16


class CompressedWeights(Weights):
    def shape(self, key):
        return tensors()[key].shape


def test_a_compressed_tensor_where_only_a_dense_one_works_is_named():
    name = "model.layers.1.input_layernorm.weight"
    found = tensors()
    found[name] = MdCSR.from_dense(np.atleast_2d(found[name]))
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {name!r} is compressed; it must be dense")):
        load(parse_config(HF), CompressedWeights(found), jnp.dtype("float32"))


@pytest.mark.parametrize(
    ("manifold", "index", "bits"),
    [("unit", "delta8", 8), ("unit", "mask", 8), ("prime", "dense", 8), ("unit", "dense", 4)],
)
def test_an_embedding_whose_rows_cannot_be_looked_up_is_refused(manifold, index, bits):
    name = "model.embed_tokens.weight"
    found = tensors()
    found[name] = MdCSR.from_dense(found[name], manifold=manifold, index=index, value_bits=bits)
    message = (
        f"tensor {name!r} is compressed with index {index!r} and {bits}-bit values on the {manifold} manifold"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(parse_config(HF), CompressedWeights(found), jnp.dtype("float32"))


@pytest.mark.parametrize("row_alignment", [1, 16])
@pytest.mark.parametrize("capacity", [None, 256])
def test_rows_looked_up_are_the_decoded_rows(row_alignment, capacity):
    w = np.random.default_rng(0).normal(size=(11, 12)).astype(np.float32)
    w[3] = 0
    rows = MdCSR.from_dense(w, index="dense", row_alignment=row_alignment, capacity=capacity)
    ids = jnp.asarray([[0, 3, 10], [7, 7, 1]])
    found = jax.jit(look_up)(rows, ids)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, decode_layer(rows)[np.asarray(ids)])
    # What is outside is treated as by arrays.
    outside = jnp.asarray([-1, 11, 99])
    np.testing.assert_array_equal(look_up(rows, outside), jnp.asarray(decode_layer(rows))[outside])


def layer_of(density, manifold="unit"):
    w = np.random.default_rng(0).normal(size=(20, 40))
    return MdCSR.from_dense(w.astype(np.float32), density=density, manifold=manifold)


def test_equal_layers_stack_and_little_padding_is_accepted():
    assert isinstance(stack_layers([layer_of(0.5), layer_of(0.5)]), MdCSR)
    assert isinstance(stack_layers([layer_of(0.5), layer_of(0.49)]), MdCSR)


@pytest.mark.parametrize(
    "layers",
    [
        [layer_of(0.5), layer_of(0.3)],
        [layer_of(0.5), layer_of(0.5, "prime")],
        [layer_of(0.5), np.zeros((20, 40), np.float32)],
    ],
    ids=["padding", "manifold", "dense"],
)
def test_layers_that_differ_stay_apart(layers):
    found = stack_layers(layers)
    assert isinstance(found, tuple)
    assert [a is b for a, b in zip(found, layers, strict=True)] == [True, True]
    assert not is_stacked({"q_proj": found})


@pytest.mark.parametrize(
    ("lengths", "allowed"),
    [((100, 95), True), ((100, 90), False), ((100, 100, 100, 79), False), ((100, 100, 100, 81), True)],
)
def test_padding_is_limited_to_five_percent_of_what_is_stored(lengths, allowed):
    # 100 and 95 are 200 padded over 195 stored, 2.6% more; 100 and 90 are 5.3% more.
    assert can_stack([layer_of(0.5)] * len(lengths), lengths) is allowed
