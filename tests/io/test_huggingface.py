"""Hugging Face directories: tensors as stored, and every mistake refused with what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_models import llama

import upg_jax
from upg_jax import CheckpointError, MdCSR
from upg_jax.io import open_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_come_back_as_stored(tmp_path, dtype, shards):
    weights = llama.weights()
    checkpoint = open_checkpoint(llama.write_hugging_face(tmp_path / "hf", weights, shards, dtype))
    assert set(checkpoint.names()) == set(weights)
    for name, w in weights.items():
        assert checkpoint.shape(name) == w.shape
        assert checkpoint.dtype(name) == dtype
        np.testing.assert_array_equal(checkpoint.read(name), w.astype(dtype), strict=True)
    assert checkpoint.config == llama.config()
    assert len(checkpoint.source_files()) == shards + 1
    assert all(file.is_file() for file in checkpoint.source_files())


def test_names_are_in_layer_order_also_across_shards(tmp_path):
    weights = llama.weights(layers=12)
    names = open_checkpoint(llama.write_hugging_face(tmp_path / "hf", weights, shards=4)).names()
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert layers[-1] == 11


def test_numbers_in_names_may_have_any_length(tmp_path):
    numbers = ["9" * 5000, "10", "9", "010", "0" * 5000]
    (tmp_path / "config.json").write_text("{}")
    save_file({f"a.{n}.w": np.ones(1, np.float32) for n in numbers}, tmp_path / "model.safetensors")
    names = open_checkpoint(tmp_path).names()
    assert [name.split(".")[1] for name in names] == ["0" * 5000, "9", "010", "10", "9" * 5000]


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_saves_can_be_read(tmp_path):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="the oracle: pip install transformers torch")
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{k: v for k, v in llama.config().items() if k != "architectures"})
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / INDEX).exists()
    checkpoint = open_checkpoint(tmp_path)
    expected = model.state_dict()
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read.view(np.int16), tensor.view(torch.int16).numpy())


def test_one_safetensors_file_of_any_name_is_the_model(tmp_path):
    path = llama.write_hugging_face(tmp_path / "hf", llama.weights())
    (path / "model.safetensors").rename(path / "weights.safetensors")
    assert "model.norm.weight" in open_checkpoint(path).names()


def test_tokenizer_files_are_copied_and_named(tmp_path):
    path = llama.write_hugging_face(tmp_path / "hf", llama.weights())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        (path / name).write_text(name)
    out = tmp_path / "out"
    out.mkdir()
    written = open_checkpoint(path).write_tokenizer(out)
    assert sorted(written) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert {p.name: p.read_text() for p in out.iterdir()} == {name: name for name in written}


def test_reading_a_tensor_takes_the_memory_of_that_tensor(tmp_path):
    size = 64 << 20
    (tmp_path / "config.json").write_text("{}")
    tensors = {f"t{i}.weight": np.ones((1024, size // 4096), np.float32) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    code = (
        "import resource, sys\n"
        "from upg_jax.io import open_checkpoint\n"
        "c = open_checkpoint(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in c.names(): c.read(name)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    added = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    # Two tensors at most: the one being read while the loop's last is dropped.
    assert added * unit < 2.5 * size


def write(tmp_path, **options):
    return llama.write_hugging_face(tmp_path / "hf", llama.weights(), **options)


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_missing_directory_says_what_is_expected(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"does not exist; give a Hugging Face directory .* or a \.gguf"
    ):
        open_checkpoint(tmp_path / "nowhere")


def test_missing_config_is_named_and_a_gguf_file_pointed_at(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"did you mean .*model-Q4\.gguf"):
        open_checkpoint(tmp_path)


def test_missing_weights_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="but no weights"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        open_checkpoint(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path):
    path = write(tmp_path, shards=3)
    (path / INDEX).unlink()
    with pytest.raises(
        CheckpointError, match=r"3 safetensors files .* but no model\.safetensors\.index\.json"
    ):
        open_checkpoint(path)


def test_missing_shard_is_named(tmp_path):
    path = write(tmp_path, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists model-00002-of-00003\.safetensors, which is missing"):
        open_checkpoint(path)


def test_shard_that_the_index_does_not_list_is_named(tmp_path):
    path = write(tmp_path, shards=2)
    shutil.copy(path / "model-00001-of-00002.safetensors", path / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"does not list model-00003-of-00003\.safetensors"):
        open_checkpoint(path)


def test_tensor_that_the_shard_lacks_is_named(tmp_path):
    path = write(tmp_path, shards=2)
    edit_index(path, lambda m: m.update({"model.extra.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(
        CheckpointError, match=r"00001-of-00002\.safetensors: has no tensor 'model\.extra\.weight'"
    ):
        open_checkpoint(path)


def test_tensor_that_the_index_lacks_is_named(tmp_path):
    path = write(tmp_path, shards=2)
    edit_index(path, lambda m: m.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"holds tensor 'model\.norm\.weight', which .* does not list"):
        open_checkpoint(path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_index_cannot_point_outside_the_directory(tmp_path, file):
    path = write(tmp_path, shards=2)
    edit_index(path, lambda m: m.update({"model.norm.weight": file}))
    with pytest.raises(CheckpointError, match=r"must have no directory|which is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize("weight_map", [[], {"a": 1}, None])
def test_index_of_another_shape_is_refused(tmp_path, weight_map):
    path = write(tmp_path, shards=2)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="must map tensor names to file names"):
        open_checkpoint(path)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_git_lfs_pointers_are_recognized(tmp_path, file):
    path = write(tmp_path)
    (path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match=rf"{file}.*git lfs pull"):
        open_checkpoint(path).write_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "\xff"])
def test_config_must_be_a_json_object(tmp_path, text):
    path = write(tmp_path)
    (path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(path)


def test_truncated_weights_are_refused(tmp_path):
    path = write(tmp_path)
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(path)


def test_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(tmp_path):
    path = write(tmp_path)
    checkpoint = open_checkpoint(path)
    os.truncate(path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="became shorter"):
        [checkpoint.read(name) for name in checkpoint.names()]


def test_quantized_checkpoint_is_refused_by_method(tmp_path):
    path = write(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="'gptq'"):
        open_checkpoint(path)


def test_model_that_is_compressed_already_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    layer = MdCSR.from_dense(np.eye(4, dtype=np.float32))
    upg_jax.save(tmp_path / "model.safetensors", {"a.weight": layer})
    with pytest.raises(CheckpointError, match=r"compressed already.*upg-jax generate"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.upg", b"\x80\x04}q\x00.", "upg-jax convert"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "give the directory that also holds"),
        ("pytorch_model.bin", b"PK\x03\x04....", "zip archive"),
        ("notes.txt", b"hello", "is not a checkpoint"),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes (POSIX)")
def test_pipes_are_refused_without_waiting(tmp_path):
    path = write(tmp_path)
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="FIFO"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="regular file"):
        open_checkpoint(path / "model.safetensors")
