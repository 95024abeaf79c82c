"""GGUF files: weights against what was written and against transformers; refusals by name."""

from __future__ import annotations

import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from small_models import llama, smollm2

from upg_jax import CheckpointError
from upg_jax.io import open_checkpoint
from upg_jax.io._gguf import llama3_factors

DEQUANTIZABLE = sorted(
    kind.name for kind in gguf.quants._type_traits if kind not in (gguf.GGMLQuantizationType.BF16,)
)


def write(path, weights=None, **options):
    return llama.write_gguf(path / "model.gguf", weights or llama.weights(), **options)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", np.float32), ("F16", np.float16)])
def test_float_weights_come_back_as_written(tmp_path, kind, dtype):
    weights = llama.weights()
    checkpoint = open_checkpoint(write(tmp_path, weights, kind=kind))
    assert set(checkpoint.names()) == set(weights)
    for name, w in weights.items():
        w = w.astype(dtype) if w.ndim == 2 else w
        assert checkpoint.shape(name) == w.shape
        assert checkpoint.dtype(name) == w.dtype
        np.testing.assert_array_equal(checkpoint.read(name), w, strict=True)


def test_bfloat16_weights_come_back_as_bfloat16(tmp_path):
    weights = llama.weights()
    checkpoint = open_checkpoint(write(tmp_path, weights, kind="BF16"))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert checkpoint.dtype(name) == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        checkpoint.read(name), weights[name].astype(ml_dtypes.bfloat16), strict=True
    )


def test_names_are_in_layer_order_also_beyond_nine_layers(tmp_path):
    names = open_checkpoint(write(tmp_path, llama.weights(layers=12))).names()
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert names.index("model.embed_tokens.weight") < names.index("model.layers.0.mlp.up_proj.weight")
    assert names[-1] == "model.norm.weight"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_are_within_their_quantization_step(tmp_path, kind):
    weights = llama.weights()
    checkpoint = open_checkpoint(write(tmp_path, weights, kind=kind))
    levels = {"Q8_0": 254, "Q4_0": 15, "Q4_1": 15, "Q5_0": 31, "Q5_1": 31}[kind]
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        w = weights[name]
        blocks = w.reshape(-1, 32)
        # A whole step, since a type that is symmetric around zero clips its largest value by up to that much.
        step = 2 * np.abs(blocks).max(axis=1, keepdims=True) / levels
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        assert (np.abs(read.reshape(-1, 32) - blocks) <= step * 1.01).all()


@pytest.mark.parametrize("kind", DEQUANTIZABLE)
def test_every_quantization_that_the_package_decodes_can_be_read(tmp_path, kind):
    quantization = gguf.GGMLQuantizationType[kind]
    weights = llama.weights()
    name = "model.layers.0.mlp.gate_proj.weight"
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    raw = np.random.default_rng(1).integers(
        0, 64, (llama.INNER, llama.HIDDEN // block * block_bytes), np.uint8
    )
    del weights[name]
    checkpoint = open_checkpoint(
        write(tmp_path, weights, extra_quantized={llama.gguf_name(name): (raw, quantization)})
    )
    assert checkpoint.shape(name) == (llama.INNER, llama.HIDDEN)
    np.testing.assert_array_equal(checkpoint.read(name), gguf.dequantize(raw, quantization))


def test_config_is_rebuilt_from_the_metadata(tmp_path):
    metadata = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    checkpoint = open_checkpoint(write(tmp_path, metadata=metadata))
    assert checkpoint.config.items() >= llama.config().items()
    assert checkpoint.config["rope_scaling"] is None
    assert checkpoint.source_files() == [tmp_path / "model.gguf"]


def test_missing_output_matrix_means_tied_embeddings(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, llama.weights(tied=True)))
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.names()


def test_all_end_tokens_are_listed(tmp_path):
    metadata = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7}
    assert open_checkpoint(write(tmp_path, metadata=metadata)).config["eos_token_id"] == [2, 7]


def test_llama3_rotary_factors_become_rope_scaling(tmp_path):
    # By hand, from the wavelengths: 2 pi theta**(i / 8) against 8192 / 4 and 8192 / 1.
    wavelength = 2 * np.pi * 10000.0 ** (np.arange(8) / 8)
    smooth = (8192 / wavelength - 1) / 3
    factors = np.where(
        wavelength < 2048, 1.0, np.where(wavelength > 8192, 32.0, 1 / ((1 - smooth) / 32 + smooth))
    )
    extra = {"rope_freqs.weight": factors.astype(np.float32)}
    metadata = {"llama.attention.key_length": 16}
    checkpoint = open_checkpoint(write(tmp_path, extra_tensors=extra, metadata=metadata))
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.names()
    np.testing.assert_allclose(
        llama3_factors(16, 10000.0, checkpoint.config["rope_scaling"]), factors, rtol=1e-6
    )


def test_linear_rope_scaling_is_kept(tmp_path):
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    config = open_checkpoint(write(tmp_path, metadata=metadata)).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2moe"}, r"architecture 'qwen2moe'; this build reads llama"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
        (
            {"extra_tensors": {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}},
            "not those of Llama 3",
        ),
        (
            {"extra_tensors": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}},
            "'blk.0.attn_sinks.weight'",
        ),
        ({"metadata": {"llama.attention.key_length": 32}}, "rotates 16 of 32"),
    ],
)
def test_models_it_cannot_read_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path, **options))


def test_missing_tensor_and_wrong_shape_are_named(tmp_path):
    weights = llama.weights()
    weights["model.norm.weight"] = np.ones(3, np.float32)
    with pytest.raises(CheckpointError, match=r"model.norm.weight must have shape \(256,\).*got \(3,\)"):
        open_checkpoint(write(tmp_path, weights))
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.norm\.weight'"):
        open_checkpoint(write(tmp_path, weights))


def test_unknown_name_is_answered_with_the_closest(tmp_path):
    with pytest.raises(CheckpointError, match=r"closest are model\.norm\.weight"):
        open_checkpoint(write(tmp_path)).read("model.nrm.weight")


def test_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = write(tmp_path, llama.weights(layers=1))
    whole = path.read_bytes()
    header = whole.index(b"blk.0") + 64
    for size in [*range(4, header, 37), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            open_checkpoint(path)


def test_damaged_header_is_refused_or_read_but_never_crashes_or_hangs(tmp_path):
    path = write(tmp_path, llama.weights(layers=1))
    whole = path.read_bytes()
    end = whole.index(b"output_norm")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(whole)
        for position in rng.integers(4, end, rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.read(checkpoint.names()[0])
        except CheckpointError:
            refused += 1
    assert refused > 300


def _header(version=3, tensors=0, metadata=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, metadata) + body


def _string(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_header(version=1), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (_header(metadata=2**60), "truncated"),
        (_header(metadata=1, body=_string(b"k") + struct.pack("<IIQ", 9, 8, 2**60)), "truncated"),
        (_header(metadata=1, body=_string(b"k") + struct.pack("<IIQ", 9, 4, 2**60)), "truncated"),
        (_header(metadata=1, body=_string(b"k") + struct.pack("<I", 99)), "'k' is of unknown type 99"),
        (_header(metadata=1, body=_string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
        (_header(metadata=1, body=_string(b"\xff")), "not UTF-8"),
        (_header(metadata=2, body=2 * (_string(b"k") + struct.pack("<IB", 0, 1))), "'k' appears twice"),
        (_header(tensors=1, body=_string(b"t") + struct.pack("<I", 9)), "claims 9 dimensions"),
        (_header(tensors=1, body=_string(b"t") + struct.pack("<IQIQ", 1, 8, 999, 0)), "type 999"),
        (_header(tensors=1, body=_string(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0)), "not a multiple"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x80\x04}q\x00.", "pickle"),
    ],
)
def test_malformed_files_are_refused_by_rule(tmp_path, content, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_weights_equal_those_that_transformers_reads(tmp_path, kind):
    metadata = {"general.name": "small", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    _assert_equals_transformers(write(tmp_path, kind=kind, metadata=metadata))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_of_the_real_model_equal_those_that_transformers_reads():
    checkpoint = _assert_equals_transformers(smollm2.path())
    assert len(checkpoint.names()) == 272
    assert checkpoint.config["rope_theta"] == 100_000.0


def _assert_equals_transformers(path):
    for oracle in ("torch", "accelerate", "transformers"):
        pytest.importorskip(oracle, reason="the oracle: pip install transformers torch accelerate")
    import transformers

    checkpoint = open_checkpoint(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    )
    expected = {name: w.numpy() for name, w in model.state_dict().items()}
    if checkpoint.config["tie_word_embeddings"]:
        np.testing.assert_array_equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert expected.keys() == set(checkpoint.names())
    for name, w in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), w)
    ours, theirs = checkpoint.config, model.config.to_dict()
    for key in ours.keys() & theirs.keys() - {"architectures", "rope_scaling", "rope_theta", "rms_norm_eps"}:
        assert ours[key] == theirs[key], key
    assert theirs["rope_parameters"]["rope_theta"] == ours["rope_theta"]
    assert np.float32(theirs["rms_norm_eps"]) == np.float32(ours["rms_norm_eps"])
    return checkpoint
