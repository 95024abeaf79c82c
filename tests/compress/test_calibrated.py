"""Calibrated compression of a whole model: order of the network, inputs of compressed layers, going on after a stop."""

from __future__ import annotations

import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers.stopping import StopError, stop_after
from oracle.mdcsr import decode_layer
from small_models import llama

from upg_jax import CheckpointError, EncodingError, UPGDecompressor, UPGModel
from upg_jax.compress import Calibration, Rule, Settings, compress_checkpoint, plan, prune_mask, sparsegpt
from upg_jax.io import open_checkpoint

IDS = np.random.default_rng(5).integers(0, llama.VOCABULARY, (12, 32))
CALIBRATION = Calibration(IDS, "random tokens")


def settings(method="sparsegpt", **changes):
    return Settings(**{"density": 0.5, "method": method, "embedding": "float", **changes})


@pytest.fixture(scope="module")
def weights():
    """A random model whose features are of very different size, as those of trained models are."""
    rng = np.random.default_rng(1)
    found = llama.weights()
    for name, w in found.items():
        if "layernorm" in name:
            found[name] = w * np.exp(rng.normal(size=w.shape)).astype(np.float32)
    return found


@pytest.fixture
def source(tmp_path, weights):
    return llama.write_hugging_face(tmp_path / "hf", weights, dtype=ml_dtypes.bfloat16)


def compress(source, destination, chosen, **options):
    return compress_checkpoint(source, destination, chosen, calibration=CALIBRATION, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights):
    """What SparseGPT makes of the model when nothing stops it."""
    directory = tmp_path_factory.mktemp("whole")
    source = llama.write_hugging_face(directory / "hf", weights, dtype=ml_dtypes.bfloat16)
    compress(source, directory / "out", settings())
    return directory / "out"


def assert_same_files(ours, expected):
    assert [path.name for path in sorted(ours.iterdir())] == [
        path.name for path in sorted(expected.iterdir())
    ]
    for file in expected.iterdir():
        assert file.read_bytes() == (ours / file.name).read_bytes()


def decoded(directory):
    with UPGDecompressor.from_safetensors(directory) as model:
        infos = {name: model.info(name) for name in model.names()}
        return {
            name: decode_layer(model.get_layer(name, device=False))
            if info.kind == "mdcsr"
            else np.asarray(model.get_array(name, device=False), np.float32)
            for name, info in infos.items()
        }


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def rotate(x):
    """`x (windows, tokens, heads, dim)` with positions from 0."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def inputs_of_projections(w, ids):
    """A Llama's forward pass in NumPy: the input of every projection, by name, `(windows * tokens, features)`."""
    found = {}
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    x = w["model.embed_tokens.weight"][ids]

    def project(y, name):
        found[name] = y.reshape(-1, y.shape[-1])
        return y @ w[name].T

    for layer in range(llama.LAYERS):
        at = f"model.layers.{layer}."
        y = rms_norm(x, w[f"{at}input_layernorm.weight"])
        q, k, v = (
            project(y, f"{at}self_attn.{n}_proj.weight").reshape(*ids.shape, -1, llama.HEAD_DIM)
            for n in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(t, llama.HEADS // llama.KV_HEADS, axis=2) for t in (k, v))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(llama.HEAD_DIM)
        scores = np.where(np.tri(ids.shape[1], dtype=bool), scores, -np.inf)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        out = np.einsum("bhqk,bkhd->bqhd", share, v).reshape(*ids.shape, -1)
        x = x + project(out, f"{at}self_attn.o_proj.weight")
        y = rms_norm(x, w[f"{at}post_attention_layernorm.weight"])
        gate, up = (project(y, f"{at}mlp.{n}_proj.weight") for n in ("gate", "up"))
        x = x + project(gate / (1 + np.exp(-gate)) * up, f"{at}mlp.down_proj.weight")
    found["lm_head.weight"] = rms_norm(x, w["model.norm.weight"]).reshape(-1, x.shape[-1])
    return found


def agreement(ours, expected):
    """Share of weights kept or not alike."""
    return ((ours != 0) == expected).mean()


@pytest.fixture
def exact(monkeypatch):
    """Products in float32, as where bfloat16 is not faster."""
    monkeypatch.setattr("upg_jax.compress._calibrated.best_precision", lambda: "float32")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("rules", [(), (Rule("lm_head", 0.5), Rule.keep_dense(r"layers\.0\.mlp\.up_proj"))])
def test_each_matrix_is_pruned_by_the_inputs_that_the_compressed_ones_before_it_leave(
    tmp_path, source, weights, rules
):
    compress(source, tmp_path / "out", settings("wanda", rules=rules))
    result = decoded(tmp_path / "out")
    # In the compressed model, a projection's input depends on those before it only.
    inputs = inputs_of_projections(result, IDS)
    pruned = [name for name in inputs if (result[name] == 0).mean() > 0.3]
    assert len(pruned) == 14  # with rules the head instead of the projection that is kept
    for name in pruned:
        w = weights[name].astype(ml_dtypes.bfloat16)
        norms = np.sqrt((inputs[name] ** 2).sum(axis=0))
        expected = prune_mask(w, 0.5, "wanda", norms=norms)
        # Nearly equal scores may fall the other way; bfloat16 weights have few exact ties once multiplied.
        assert agreement(result[name], expected) > 0.99


@pytest.mark.usefixtures("exact")
def test_sparsegpt_uses_those_inputs_too(tmp_path, source, weights):
    compress(source, tmp_path / "out", settings())
    result = decoded(tmp_path / "out")
    for name, x in inputs_of_projections(result, IDS).items():
        if name == "lm_head.weight":
            continue
        w = weights[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        scales = np.abs(w).max(axis=1) / np.float32(127)
        expected = sparsegpt(w, x.T @ x, 0.5, scales=scales)
        assert agreement(result[name], expected.mask & (expected.levels != 0)) > 0.99


def test_calibrated_methods_change_the_outputs_less(tmp_path, source, weights):
    """In the order that the papers report, on tokens that were not calibrated on."""
    ids = np.random.default_rng(6).integers(0, llama.VOCABULARY, (4, 32))
    dense = np.asarray(UPGModel.from_file(source).forward(ids)[0])
    error = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        calibration = None if method == "magnitude" else CALIBRATION
        compress_checkpoint(source, tmp_path / method, settings(method), calibration=calibration)
        logits = np.asarray(UPGModel.from_file(tmp_path / method).forward(ids)[0])
        error[method] = np.linalg.norm(logits - dense)
    assert error["sparsegpt"] < error["wanda"] < error["magnitude"]


def test_activations_on_disk_give_the_same_bytes_and_leave_no_file(tmp_path, source, whole):
    compress(source, tmp_path / "out", settings(), spill=True)
    assert_same_files(tmp_path / "out", whole)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


@pytest.mark.parametrize("stops", [(1,), (3, 10)])
def test_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(tmp_path, source, whole, stops):
    for encoded in stops:
        with pytest.raises(StopError):
            compress(source, tmp_path / "out", settings(), progress=stop_after(encoded))
    report = compress(source, tmp_path / "out", settings())
    assert report.resumed == sum(stops)
    assert_same_files(tmp_path / "out", whole)


KILLED = """
import os, signal, sys
import numpy as np
from upg_jax.compress import Calibration, Settings, compress_checkpoint

seen = []
def kill(progress):
    if progress.stage == "encode" and progress.name:
        seen.append(progress.name)
        if len(seen) == 9:
            os.kill(os.getpid(), signal.SIGKILL)

compress_checkpoint(
    sys.argv[1], sys.argv[2], Settings(density=0.5, method="wanda", embedding="float"), spill=True,
    calibration=Calibration(np.load(sys.argv[3]), "random tokens"), progress=kill,
)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_run_that_was_killed_in_the_middle_of_a_block_goes_on(tmp_path, source):
    np.save(tmp_path / "ids.npy", IDS)
    paths = [str(source), str(tmp_path / "out"), str(tmp_path / "ids.npy")]
    run = subprocess.run([sys.executable, "-c", KILLED, *paths], check=False, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (tmp_path / "out").exists()
    assert compress(source, tmp_path / "out", settings("wanda")).resumed == 9
    compress(source, tmp_path / "whole", settings("wanda"))
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_other_calibration_does_not_go_on_with_the_work_of_the_first(tmp_path, source):
    with pytest.raises(StopError):
        compress(source, tmp_path / "out", settings(), progress=stop_after(1))
    other = Calibration(IDS[:, ::-1], "other tokens")
    with pytest.raises(CheckpointError, match="a run with another settings"):
        compress_checkpoint(source, tmp_path / "out", settings(), calibration=other)


def test_provenance_says_what_was_calibrated_on(tmp_path, source):
    compress(source, tmp_path / "out", settings("wanda"))
    with UPGDecompressor.from_safetensors(tmp_path / "out") as model:
        made = model.provenance["settings"]
    assert (made["method"], made["pattern"]) == ("wanda", "row")
    assert made["calibration"] == CALIBRATION.to_json()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_prime_manifold_and_patterns_are_kept(tmp_path, source, method):
    compress(source, tmp_path / "out", settings(method, manifold="prime", pattern="2:4"))
    for name, w in decoded(tmp_path / "out").items():
        if "_proj" in name:
            assert ((w.reshape(-1, 4) != 0).sum(axis=1) <= 2).all()
            assert (w != 0).mean() > 0.499


def test_token_rows_and_a_second_copy_of_a_tied_head_are_encoded(tmp_path):
    tensors = llama.weights(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = llama.write_hugging_face(tmp_path / "hf", tensors, tie_word_embeddings=True)
    report = compress(source, tmp_path / "out", settings("wanda", embedding="int8"))
    assert len(report.compressed) == 16
    UPGModel.from_file(tmp_path / "out")


def test_calibration_is_asked_for_where_it_is_needed_and_only_there(tmp_path, source):
    with pytest.raises(EncodingError, match="'sparsegpt' without"):
        compress_checkpoint(source, tmp_path / "out", settings())
    with pytest.raises(EncodingError, match="'magnitude' with it"):
        compress(source, tmp_path / "out", settings("magnitude"))
    foreign = Calibration(IDS + llama.VOCABULARY, "another tokenizer's")
    with pytest.raises(EncodingError, match=r"must be in \[0, 320\), the model's vocabulary"):
        compress_checkpoint(source, tmp_path / "out", settings(), calibration=foreign)
    with pytest.raises(
        EncodingError, match=r"down_proj.*: pattern 5:10 needs a multiple of 10 columns; got 96"
    ):
        plan(open_checkpoint(source), settings(pattern="5:10"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_weight_that_is_no_number_is_named_with_tensor_row_and_column(tmp_path, weights, method):
    weights = {n: w.copy() for n, w in weights.items()}
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = np.nan
    source = llama.write_hugging_face(tmp_path / "hf", weights)
    said = r"q_proj\.weight': .* weights must be finite in float32; got nan at row 3, column 5"
    with pytest.raises(EncodingError, match=said):
        compress(source, tmp_path / "out", settings(method))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_no_numbers_are_refused_by_the_matrix_that_gets_them(tmp_path, weights, method):
    """Norms stay as they are, so that nothing else looks at their values."""
    broken = np.full_like(weights["model.layers.0.input_layernorm.weight"], np.nan)
    source = llama.write_hugging_face(
        tmp_path / "hf", weights | {"model.layers.0.input_layernorm.weight": broken}
    )
    said = r"layers\.0\.self_attn\.._proj\.weight': .* must be finite; .* no numbers before this matrix"
    with pytest.raises(EncodingError, match=said):
        compress(source, tmp_path / "out", settings(method))


def test_matrix_that_the_model_never_uses_is_named(tmp_path, weights):
    extra = {"model.layers.0.mlp.extra_proj.weight": np.ones((4, 4), np.float32)}
    source = llama.write_hugging_face(tmp_path / "hf", weights | extra)
    with pytest.raises(EncodingError, match=r"never reaches tensor .*extra_proj"):
        compress(source, tmp_path / "out", settings())
