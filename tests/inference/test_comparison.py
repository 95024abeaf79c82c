"""Divergence, agreement and weight errors against NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.hf_llama import dense_model, reference_logits
from oracle.mdcsr import decode_layer
from small_models import llama

from upg_jax import UPGDecompressor
from upg_jax.compress import Settings, compress_checkpoint
from upg_jax.inference import compare, weight_errors

IDS = np.random.default_rng(5).integers(0, 101, 50)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def changed_model():
    model = dense_model("everything")
    return dataclasses.replace(model, params={**model.params, "norm": model.params["norm"] * 0.7})


@pytest.mark.parametrize("window", [64, 16, 7])
def test_divergence_and_agreement_are_those_of_the_logits(window):
    model, other = changed_model(), dense_model("everything")
    found = compare(model, other, IDS, window=window)
    kl, same = [], []
    for start in range(0, len(IDS) - 1, window):
        part = IDS[None, start : start + window]
        q = log_softmax(reference_logits("everything", part)[0, :-1])
        p = log_softmax(np.asarray(model.forward(part)[0])[0, :-1])
        kl += (np.exp(q) * (q - p)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.tokens == len(kl)
    assert found.kl == pytest.approx(np.mean(kl), abs=2e-4)
    assert found.agreement == np.mean(same)
    assert found.window == window


def test_a_model_agrees_with_itself():
    model = dense_model("everything")
    found = compare(model, model, IDS, window=16)
    assert found.agreement == 1
    assert abs(found.kl) < 1e-6


def test_bad_arguments_are_refused():
    model = dense_model("everything")
    with pytest.raises(ValueError, match="at least two tokens; got 1"):
        compare(model, model, IDS[:1])
    with pytest.raises(ValueError, match="window must be at least 2"):
        compare(model, model, IDS, window=1)


def test_weight_errors_are_those_of_the_decoded_matrices(tmp_path):
    weights = llama.weights()
    source = llama.write_hugging_face(tmp_path / "hf", weights)
    compress_checkpoint(source, tmp_path / "m", Settings(density=0.4))
    found = {error.name: error for error in weight_errors(tmp_path / "m", source)}
    with UPGDecompressor.from_safetensors(tmp_path / "m") as file:
        matrices = [name for name in file.names() if file.info(name).kind == "mdcsr"]
        assert set(found) == set(matrices)
        for name in matrices:
            w = decode_layer(file.get_layer(name, device=False)).astype(np.float64)
            difference, error = w - weights[name], found[name]
            expected = np.linalg.norm(difference) / np.linalg.norm(weights[name])
            assert error.relative == pytest.approx(expected, rel=1e-4)
            assert error.largest == pytest.approx(np.abs(difference).max(), rel=1e-4)
            assert error.density == np.count_nonzero(w) / w.size
    llama.write_hugging_face(tmp_path / "other", {k: w for k, w in weights.items() if "q_proj" not in k})
    with pytest.raises(ValueError, match="has no matrix"):
        list(weight_errors(tmp_path / "m", tmp_path / "other"))
