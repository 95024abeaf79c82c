"""The text model of a checkpoint that reads images, too, against `transformers` on texts."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_families import CASES, SIZES, VOCABULARY, without_neutral_parameters

from upg_jax import CheckpointError, UPGModel
from upg_jax.compress import Settings, compress_checkpoint
from upg_jax.io import open_checkpoint
from upg_jax.models import forward

REASON = 'needs transformers and torch: pip install "upg-jax[oracle]"'
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The model of `transformers`, and the directory it saved itself to."""
    transformers = pytest.importorskip("transformers", reason=REASON)
    torch = pytest.importorskip("torch", reason=REASON)
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=SIZES | CASES["gemma3"][1],
        vision_config=VISION,
        mm_tokens_per_image=4,
        eos_token_id=[1, 7],
    )
    model = without_neutral_parameters(transformers.Gemma3ForConditionalGeneration(config).eval())
    directory = tmp_path_factory.mktemp("gemma")
    model.save_pretrained(directory)
    return model, directory


def test_texts_have_the_logits_of_transformers(gemma):
    import torch

    theirs, directory = gemma
    model = UPGModel.from_file(directory)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (2, 70))
    logits, _ = jax.jit(forward, static_argnames="config")(model.params, model.config, jnp.asarray(ids))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
    assert np.abs(expected).max() > 1, "logits this small would pass whatever is computed"
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert model.eos_token_ids == (1, 7)


def test_names_that_transformers_has_in_memory_are_read_too(gemma, tmp_path):
    from safetensors.torch import save_file

    theirs, directory = gemma
    names = {name for name, _ in theirs.named_parameters()}
    assert any(name.startswith("model.language_model.layers.") for name in names)
    save_file(
        {name: tensor.detach() for name, tensor in theirs.named_parameters()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    published, other = open_checkpoint(directory), open_checkpoint(tmp_path)
    assert other.names() == published.names()
    assert len(other.left_out) == len(published.left_out) > 0
    for name in published.names():
        np.testing.assert_array_equal(other.read(name), published.read(name))


def test_compressed_it_is_a_model_of_text_and_what_is_left_out_is_said(gemma, tmp_path):
    report = compress_checkpoint(gemma[1], tmp_path / "half", Settings(density=0.5))
    (said,) = [warning for warning in report.warnings if "left out" in warning]
    images = sum("vision" in name or "multi_modal" in name for name, _ in gemma[0].named_parameters())
    assert f": {images} tensors for reading images, from " in said
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert UPGModel.from_file(tmp_path / "half").generate([5, 6], max_new_tokens=2, stop_at_eos=False).ids


def test_without_a_description_of_the_text_model_it_is_refused(gemma, tmp_path):
    config = json.loads((gemma[1] / "config.json").read_text()) | {"text_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(gemma[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match="must have an object 'text_config'; got None"):
        open_checkpoint(tmp_path)


def test_two_tensors_that_would_be_one_of_the_text_model_are_named(gemma, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(gemma[1] / "model.safetensors")
    tensors["model.norm.weight"] = tensors["language_model.model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((gemma[1] / "config.json").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"language_model\.model\.norm\.weight and model\.norm\.weight are one"
    ):
        open_checkpoint(tmp_path)


def test_a_tensor_that_belongs_to_neither_part_is_named(gemma, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(gemma[1] / "model.safetensors") | {"audio_tower.weight": np.ones(2, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((gemma[1] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"tensor 'audio_tower\.weight' is not part of the model"):
        UPGModel.from_file(tmp_path)
