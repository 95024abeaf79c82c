"""`UPGModel`: opening every kind of file, the pytree, and `forward`."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.hf_llama import compressed_model, dense_model, reference_logits
from oracle.mdcsr import decode_layer
from small_models import llama
from small_models.texts import TEXTS

import upg_jax
from upg_jax import CheckpointError, FormatError, MdCSR, UPGDecompressor, UPGModel
from upg_jax.compress import Rule, Settings, compress_checkpoint
from upg_jax.inference import _model
from upg_jax.models import is_stacked

tokenizers = pytest.importorskip("tokenizers", reason='pip install "upg-jax[hf]"')

IDS = np.random.default_rng(0).integers(0, llama.VOCABULARY, (1, 9))
MESSAGES = [{"role": "user", "content": "Hi"}]
TEMPLATE = "{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}"


@functools.cache
def tokenizer_json():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=llama.VOCABULARY,
        special_tokens=["<|end|>", "<|user|>", "<|stop|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def weights():
    return llama.weights()


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory, weights):
    path = llama.write_hugging_face(tmp_path_factory.mktemp("model") / "hf", weights)
    (path / "tokenizer.json").write_text(tokenizer_json())
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|end|>"})
    )
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return path


@pytest.fixture(scope="module")
def upg(hugging_face):
    path = hugging_face.with_name("upg")
    compress_checkpoint(hugging_face, path, Settings(density=1.0, manifold="prime"))
    return path


@pytest.fixture(scope="module")
def expected(hugging_face):
    return UPGModel.from_file(hugging_face).forward(IDS)[0]


def test_a_hugging_face_directory_gives_dense_layers(hugging_face, weights):
    model = UPGModel.from_file(hugging_face)
    down = model.params["layers"]["down_proj"]
    assert isinstance(down, tuple)
    np.testing.assert_array_equal(down[1], weights["model.layers.1.mlp.down_proj.weight"])
    assert model.dtype == jnp.float32
    assert model.eos_token_ids == (2, 0)
    assert model.name == str(hugging_face)


@pytest.mark.parametrize("what", ["directory", "file", "index"])
def test_a_upg_model_gives_stacks_and_the_same_answers(upg, hugging_face, expected, what):
    path = {
        "directory": upg,
        "file": upg / "model.safetensors",
        "index": upg / "model.safetensors.index.json",
    }[what]
    if what == "index":
        path = hugging_face.with_name("indexed") / path.name
        shutil.copytree(upg, path.parent, dirs_exist_ok=True)
        names = upg_jax.io._mapped.MappedFile(path.parent / "model.safetensors").header.tensors
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    model = UPGModel.from_file(path)
    assert is_stacked(model.params["layers"])
    logits, _ = model.forward(IDS)
    # The prime manifold's weights are good to a few parts in a million.
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)
    assert model.eos_token_ids == (2, 0)
    assert model.tokenizer.encode_chat(MESSAGES) == UPGModel.from_file(hugging_face).tokenizer.encode_chat(
        MESSAGES
    )
    text = model.generate("Hello", max_new_tokens=6)
    assert text == UPGModel.from_file(hugging_face).generate("Hello", max_new_tokens=6)
    assert text.text == model.tokenizer.decode(text.ids)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's maps")
def test_planes_of_a_upg_model_lie_in_the_map_of_its_file(upg):
    model = UPGModel.from_file(upg, pack=False)
    ranges = [
        [int(address, 16) for address in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(upg / "model.safetensors"))
    ]
    for name in ("q_proj", "down_proj"):
        stack = model.params["layers"][name]
        for plane in (stack.values, stack.delta_indices, stack.prime_indices):
            address = plane.unsafe_buffer_pointer()
            assert any(start <= address < stop for start, stop in ranges), name


def test_layers_that_were_kept_dense_or_pruned_differently_load_and_run(hugging_face, tmp_path, expected):
    rules = (Rule.keep_dense(r"layers\.0\.mlp"), Rule(r"layers\.1\.self_attn\.q_proj", 0.5))
    compress_checkpoint(hugging_face, tmp_path / "out", Settings(density=1.0, manifold="prime", rules=rules))
    as_it_lies = UPGModel.from_file(tmp_path / "out", pack=False)
    assert isinstance(as_it_lies.params["layers"]["q_proj"], tuple)
    assert isinstance(as_it_lies.params["layers"]["k_proj"], MdCSR)
    model = UPGModel.from_file(tmp_path / "out")
    np.testing.assert_allclose(as_it_lies.forward(IDS)[0], model.forward(IDS)[0], atol=1e-4, rtol=0)
    layers = model.params["layers"]
    assert [type(w) is MdCSR for w in layers["up_proj"]] == [False, True]
    # What is pruned differently can still be joined, and what is dense here and compressed there cannot.
    assert "q_proj+k_proj+v_proj" in layers
    logits, _ = model.forward(IDS)
    assert np.isfinite(logits).all()
    assert np.abs(logits - expected).max() > 1e-3
    assert np.corrcoef(np.ravel(logits), np.ravel(expected))[0, 1] > 0.9


def test_small_models_are_packed_at_load_and_large_ones_used_as_they_lie(tmp_path, hugging_face, monkeypatch):
    compress_checkpoint(hugging_face, tmp_path / "out", Settings(density=0.5))
    as_it_lies = UPGModel.from_file(tmp_path / "out", pack=False)
    assert "q_proj" in as_it_lies.params["layers"]
    assert set(as_it_lies.index_bytes) == {"delta8", "dense"}
    planes = sum(as_it_lies.index_bytes.values())
    for limit, packed in ((planes, True), (planes - 1, False)):
        monkeypatch.setattr(_model, "_PACK_BYTES", limit)
        model = UPGModel.from_file(tmp_path / "out")
        assert ("q_proj+k_proj+v_proj" in model.params["layers"]) == packed
        forced = UPGModel.from_file(tmp_path / "out", pack=not packed)
        assert ("q_proj+k_proj+v_proj" in forced.params["layers"]) == (not packed)
        np.testing.assert_allclose(model.forward(IDS)[0], forced.forward(IDS)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [Settings(density=0.5), Settings(density=0.5, pack=True)])
def test_int8_rows_answer_as_their_decoded_weights(tmp_path, hugging_face, weights, settings):
    """The independent side: the same file's weights, decoded by the oracle, as a model of dense layers."""
    compress_checkpoint(hugging_face, tmp_path / "out", settings)
    model = UPGModel.from_file(tmp_path / "out")
    assert model.params["embed_tokens"].index == model.params["lm_head"].index == "dense"
    with UPGDecompressor.from_safetensors(tmp_path / "out") as file:
        decoded = {
            name: decode_layer(file.get_layer(name, device=False))
            if file.info(name).kind == "mdcsr"
            else file.get_array(name, device=False)
            for name in file.names()
        }
    assert np.abs(decoded["lm_head.weight"] - weights["lm_head.weight"]).max() > 0
    dense = UPGModel.from_file(llama.write_hugging_face(tmp_path / "dense", decoded))
    np.testing.assert_allclose(model.forward(IDS)[0], dense.forward(IDS)[0], atol=1e-4, rtol=0)
    answer = model.generate(IDS[0], max_new_tokens=6)
    assert answer.ids == dense.generate(IDS[0], max_new_tokens=6).ids


def test_a_gguf_file_gives_the_model_and_a_tokenizer(hugging_face, tmp_path, weights, expected):
    pytest.importorskip("gguf", reason='pip install "upg-jax[hf]"')
    model = json.loads(tokenizer_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    found = UPGModel.from_file(llama.write_gguf(tmp_path / "model.gguf", weights, metadata=metadata))
    np.testing.assert_allclose(found.forward(IDS)[0], expected, atol=1e-5, rtol=0)
    assert found.eos_token_ids == (2,)
    reference = UPGModel.from_file(hugging_face)
    assert found.tokenizer.encode_chat(MESSAGES) == reference.tokenizer.encode_chat(MESSAGES)
    assert found.tokenizer.encode("Hello, world!") == reference.tokenizer.encode("Hello, world!")


@pytest.mark.parametrize("source", ["hugging_face", "upg"])
def test_bfloat16_activations(request, source, expected):
    path = request.getfixturevalue(source)
    model = UPGModel.from_file(path, dtype="bfloat16")
    assert model.dtype == ml_dtypes.bfloat16
    logits, cache = model.forward(IDS)
    assert logits.dtype == jnp.float32
    assert jax.tree.leaves(cache.keys)[0].dtype == jnp.bfloat16
    assert np.abs(logits - expected).mean() < 8 * 2**-8 * np.abs(expected).mean()


def refused(error, message, path, **settings):
    with pytest.raises(error, match=message):
        UPGModel.from_file(path, **settings)


def test_what_is_no_model_is_refused_saying_what_it_is(tmp_path, hugging_face, weights):
    refused(CheckpointError, "does not exist", tmp_path / "nowhere")
    refused(CheckpointError, "no config.json", tmp_path)
    refused(
        CheckpointError, "one file of a checkpoint; give the directory", hugging_face / "model.safetensors"
    )
    refused(ValueError, "dtype must be one of float32, bfloat16; got float16", hugging_face, dtype="float16")
    upg_jax.save(tmp_path / "layers.safetensors", {"w": np.zeros(3, np.float32)})
    refused(CheckpointError, "holds layers but no model configuration", tmp_path / "layers.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((hugging_face / "model.safetensors").read_bytes()[:1000])
    refused(FormatError, "cut.safetensors: .*truncated", tmp_path / "cut.safetensors")
    other = llama.write_hugging_face(tmp_path / "other", weights, architectures=["BertModel"])
    refused(CheckpointError, r"architecture \['BertModel'\] is not supported", other)


def test_a_tensor_that_does_not_belong_is_named_with_the_file(tmp_path, weights):
    extra = {**weights, "model.layers.0.extra.weight": np.zeros((2, 2), np.float32)}
    path = llama.write_hugging_face(tmp_path / "hf", extra)
    message = re.escape(f"{path}: tensor 'model.layers.0.extra.weight' is not part of the model")
    refused(CheckpointError, message, path)


def test_without_generation_defaults_the_configuration_names_the_end(tmp_path, weights):
    model = UPGModel.from_file(llama.write_hugging_face(tmp_path / "hf", weights, eos_token_id=5))
    assert model.eos_token_ids == (5,)
    assert model.tokenizer is None


def test_forward_grows_the_answer_without_touching_the_cache_it_is_given():
    model = dense_model("everything")
    ids = np.random.default_rng(1).integers(0, 101, (2, 30))
    expected = reference_logits("everything", ids)
    _, first = model.forward(ids[:, :10])
    before = jax.tree.map(np.array, first)
    for _ in range(2):
        logits, second = model.forward(jnp.asarray(ids[:, 10:]), first)
        np.testing.assert_allclose(logits, expected[:, 10:], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(second.lengths, [30, 30])
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, first))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"ids must be integers \(batch, tokens\); got int64 \(2,\)"),
        ([[1.0]], r"ids must be integers \(batch, tokens\); got float64 \(1, 1\)"),
        ([[101]], r"token ids must be in \[0, 101\); got 101"),
        ([[1], [2]], "the cache is for 1 sequences; got 2"),
        ([[1, 2, 3]], "the cache has room for 8 tokens; got 3 after 6"),
    ],
)
def test_forward_refuses_what_it_cannot_do(ids, message):
    model = dense_model("everything")
    _, cache = model.forward([[1, 2, 3, 4, 5, 6]], model.init_cache(1, 8))
    with pytest.raises(ValueError, match=message):
        model.forward(ids, cache)


@pytest.mark.parametrize("model", [dense_model, compressed_model])
def test_a_model_is_a_pytree_that_jit_takes_as_an_argument(model):
    model = model("everything")
    leaves, structure = jax.tree.flatten(model)
    again = jax.tree.unflatten(structure, leaves)
    assert (again.config, again.name) == (model.config, model.name)
    ids = jnp.asarray([[1, 2, 3]])
    expected, _ = model.forward(ids)
    logits, _ = jax.jit(lambda m, i: m.forward(i))(model, ids)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
    assert "embed_tokens" in jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(model)[0][0])


def test_repr_and_sizes_count_every_weight_once():
    dense = dense_model("grouped-query")
    count = 101 * 48 * 2 + 48 + 2 * (2 * 48 + 48 * 16 * (6 + 2 + 2 + 6) + 3 * 48 * 80)
    assert dense.num_weights == count
    assert dense.nbytes == 4 * count
    assert dense.bits_per_weight == 32
    assert repr(dense) == (
        f"UPGModel(grouped-query: LlamaForCausalLM, 2 layers, {count:,} weights, 32.00 bits per weight, 0.2 MiB, "
        "float32 activations)"
    )
    compressed = compressed_model("grouped-query")
    stacks = [w for w in compressed.params["layers"].values() if isinstance(w, MdCSR)]
    in_stacks = 2 * (48 * 16 * (6 + 2 + 2 + 6) + 3 * 48 * 80)
    assert compressed.num_weights == count
    assert compressed.nbytes == sum(stack.nbytes for stack in stacks) + 4 * (count - in_stacks)
    bits = 8 * sum(stack.nbytes for stack in stacks) / in_stacks
    expected = f"({bits:.2f} in the {in_stacks / count:.0%} that are compressed, index delta8)"
    assert expected in repr(compressed)
    assert compressed.index_bytes == {"delta8": sum(stack.nbytes for stack in stacks)}
    assert (
        repr(jax.tree.map(lambda leaf: None, dense)) == "UPGModel(grouped-query: LlamaForCausalLM, 2 layers)"
    )
