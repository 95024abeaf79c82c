"""Packing a model: the same matrices in fewer products, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_llama import compressed_model, dense_model
from oracle.mdcsr import decode_layer

from upg_jax import MdCSR, pack
from upg_jax.inference import UPGModel
from upg_jax.models import _packing, decoded_rows, forward, is_stacked, pack_params
from upg_jax.models._packing import can_join, join_rows

IDS = np.random.default_rng(0).integers(0, 101, (2, 11))
TOLERANCE = 1e-4  # of logits whose products are summed in another order, as in test_compressed.py
compiled = jax.jit(forward, static_argnames="config")


def layer(rows: int, density: float, manifold: str = "unit", index: str = "delta8", **settings: Any) -> MdCSR:
    w = np.random.default_rng(rows).normal(size=(rows, 600)).astype(np.float32)
    w[:, :300] *= rows % 3 != 0  # gaps with fillers
    one = MdCSR.from_dense(w, density=density, manifold=manifold, **settings)
    return jax.tree.map(np.asarray, pack(one, index))


@pytest.mark.parametrize("index", ["delta8", "mask", "dense"])
@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("row_alignment", [1, 8])
def test_joined_rows_are_the_rows_in_order(index, manifold, row_alignment):
    # Tails of zeros lie behind the rows of every part.
    settings = {"manifold": manifold, "index": index, "row_alignment": row_alignment, "capacity": 9600}
    parts = [
        layer(9, 0.1, **settings),
        layer(1, 0.9, **settings),
        layer(3, 0.0, **settings),
        layer(5, 0.1, **settings),
    ]
    assert can_join(parts)
    joined = join_rows(parts).validate("full")
    assert joined.shape == (18, 600)
    np.testing.assert_array_equal(
        decode_layer(joined), np.concatenate([decode_layer(part) for part in parts])
    )


@pytest.mark.parametrize(
    "other",
    [layer(3, 0.5, "prime"), layer(3, 0.5, index="mask"), layer(3, 0.5, row_alignment=8), np.zeros((3, 600))],
    ids=["manifold", "index", "row-alignment", "dense"],
)
def test_matrices_of_other_kinds_are_not_joined(other):
    assert not can_join([layer(3, 0.5), other])


def params_of(model: UPGModel) -> Any:
    return pack_params(model.params)


def logits(model: UPGModel, params: Any) -> np.ndarray:
    return np.asarray(compiled(params, model.config, jnp.asarray(IDS))[0])


@pytest.mark.parametrize("name", ["everything", "grouped-query"])
@pytest.mark.parametrize(
    ("density", "manifold"), [(0.1, "unit"), (0.5, "unit"), (1.0, "unit"), (0.5, "prime")]
)
def test_a_packed_model_computes_the_same_with_four_products_a_layer(name, density, manifold):
    model = compressed_model(name, density, manifold)
    packed = params_of(model)
    matrices = {key for key, value in packed["layers"].items() if isinstance(value, MdCSR)}
    assert matrices == {"q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"}
    assert is_stacked(packed["layers"])
    np.testing.assert_allclose(logits(model, packed), logits(model, model.params), atol=TOLERANCE, rtol=0)


def test_matrices_stored_one_by_one_are_joined_too():
    model = compressed_model("everything")
    layers = dict(model.params["layers"])
    for name, weights in layers.items():
        if isinstance(weights, MdCSR):
            layers[name] = tuple(
                jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], weights)
                for i in range(weights.stack_size)
            )
    layers["k_proj"] = (layers["k_proj"][0], jnp.asarray(decode_layer(layers["k_proj"][1])))
    params = {**model.params, "layers": layers}
    packed = pack_params(params)
    # One layer's keys are dense: nothing of the attention's inputs is joined.
    assert {"q_proj", "k_proj", "v_proj", "gate_proj+up_proj"} < packed["layers"].keys()
    assert isinstance(packed["layers"]["gate_proj+up_proj"], MdCSR)
    np.testing.assert_allclose(logits(model, packed), logits(model, params), atol=TOLERANCE, rtol=0)


def test_a_layer_that_no_other_index_can_hold_keeps_its_own(monkeypatch):
    monkeypatch.setattr(_packing, "pack", lambda layer: pack(layer, "mask"))
    model = compressed_model("grouped-query")
    layers = dict(model.params["layers"])
    deltas = np.array(layers["o_proj"].delta_indices)
    deltas[0, 1] = 0  # two entries of the first row on one column: structurally valid, and added up
    layers["o_proj"] = dataclasses.replace(layers["o_proj"], delta_indices=jnp.asarray(deltas)).validate()
    params = {**model.params, "layers": layers}
    packed = pack_params(params)
    assert packed["layers"]["o_proj"].index == "delta8"
    assert packed["layers"]["down_proj"].index == "mask"
    np.testing.assert_allclose(logits(model, packed), logits(model, params), atol=TOLERANCE, rtol=0)


def test_a_dense_model_stays_as_it_is():
    model = dense_model("everything")
    before, after = jax.tree.leaves(model.params), jax.tree.leaves(params_of(model))
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_a_compressed_head_is_packed_and_the_embedding_left_for_looking_up():
    model = compressed_model("grouped-query")
    rows = {
        name: MdCSR.from_dense(np.asarray(model.params[name]), index="dense")
        for name in ("embed_tokens", "lm_head")
    }
    model = dataclasses.replace(model, params={**model.params, **rows})
    packed = params_of(model)
    assert packed["embed_tokens"] is rows["embed_tokens"]
    np.testing.assert_array_equal(decode_layer(packed["lm_head"]), decode_layer(rows["lm_head"]))
    np.testing.assert_allclose(logits(model, packed), logits(model, model.params), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("alignment", [1, 16])
def test_rows_of_an_embedding_decode_to_the_array_they_are(alignment):
    w = np.random.default_rng(0).standard_normal((9, 21)).astype(np.float32)
    rows = pack(MdCSR.from_dense(w, row_alignment=alignment), "dense")
    np.testing.assert_array_equal(decoded_rows(rows, jnp.float32), rows.to_dense(np.float32))
    assert decoded_rows(rows, jnp.bfloat16).dtype == jnp.bfloat16
    mask = pack(rows, "mask")
    assert decoded_rows(mask, jnp.float32) is mask
