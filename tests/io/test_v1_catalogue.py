"""Version 1 files that list tensors and hold none: filled from the original checkpoint."""

from __future__ import annotations

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.v1 import decoded

from upg_jax import FormatError, UPGDecompressor
from upg_jax.io import convert_v1


class Source:
    """A checkpoint in memory."""

    def __init__(self, tensors: dict) -> None:
        self.config = {"model_type": "llama", "num_hidden_layers": 1}
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]


def listed(name: str, shape, sparsity=0.5, manifold=False, **changes) -> dict:
    facts = {"name": name, "shape": shape, "dtype": "float32", "original_bytes": 4, "compressed_bytes": 1}
    facts |= {"compression_method": "prime_sparse_v1", "sparsity_level": sparsity, "quantization": "int8"}
    return {**facts, "manifold_encoded": manifold, **changes}


@pytest.fixture
def checkpoint():
    rng = np.random.default_rng(0)
    return Source(
        {
            "up": rng.standard_normal((40, 30)).astype(np.float32),
            "down": rng.standard_normal((30, 40)).astype(ml_dtypes.bfloat16),
            "full": rng.standard_normal((10, 30)).astype(np.float16),
            "norm": rng.standard_normal(30).astype(np.float32),
            "unlisted": rng.standard_normal((5, 5)).astype(np.float32),
        }
    )


@pytest.fixture
def catalogue(tmp_path):
    def write(*tensors, **content) -> Path:
        files = [{"filename": f"{i}.safetensors", "tensors": [tensor]} for i, tensor in enumerate(tensors)]
        path = tmp_path / "model.upg"
        path.write_bytes(pickle.dumps({"files": files, **content}))
        return path

    return write


def test_a_catalogue_without_its_source_says_how_to_go_on(catalogue, tmp_path):
    path = catalogue(listed("up", (40, 30)), listed("down", (30, 40)))
    with pytest.raises(FormatError) as caught:
        convert_v1(path, tmp_path / "model.safetensors")
    for part in (str(path), "only a catalogue of 2 tensors, no weights", "--source DIR", "open_checkpoint"):
        assert part in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]


def test_a_catalogue_with_its_source_is_really_compressed(catalogue, checkpoint, tmp_path):
    path = catalogue(
        listed("up", (40, 30), 0.75),
        listed("down", [30, 40], 0.5, manifold=True),
        listed("full", (10, 30), 0.0, manifold=True),
        listed("norm", (30,), 0.5),
    )
    report = convert_v1(path, tmp_path / "model.safetensors", source=checkpoint)
    assert (report.kind, report.compressed, report.dense) == ("catalogue", 3, 2)
    f = UPGDecompressor.from_safetensors(tmp_path / "model.safetensors")
    f.verify()
    assert f.model == checkpoint.config
    for name, density, manifold in (("up", 0.25, "unit"), ("down", 0.5, "prime"), ("full", 1.0, "prime")):
        original = checkpoint.tensors[name].astype(np.float32)
        info = f.info(name)
        assert (info.manifold, info.dtype) == (manifold, checkpoint.tensors[name].dtype.name)
        w = decoded(f, name)
        threshold = np.sort(np.abs(original), axis=None)[-round(density * original.size)]
        assert (np.abs(original)[w != 0] >= threshold).all()
        assert np.count_nonzero(w) == round(density * original.size)
        largest = np.abs(original).max(axis=1, keepdims=True)
        close = np.abs(w - original) <= np.broadcast_to(largest / 127, w.shape)
        assert close[w != 0].all()
    for name in ("norm", "unlisted"):
        np.testing.assert_array_equal(f.get_array(name), checkpoint.tensors[name])


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (listed("ghost", (1, 1)), "tensor 'ghost': is listed, but the source checkpoint does not have it"),
        (
            listed("up", (30, 40)),
            "tensor 'up': shape must be that of the source checkpoint, (40, 30); got (30, 40)",
        ),
        (listed("up", None), "tensor 'up': shape must be"),
        (listed("up", (40, 30), 50), "tensor 'up': sparsity_level must be a fraction in [0, 1]; got 50"),
        (listed("up", (40, 30), -0.1), "sparsity_level must be a fraction"),
        (listed("up", (40, 30), "half"), "sparsity_level must be a fraction"),
        (listed("up", (40, 30), float("nan")), "sparsity_level must be a fraction"),
        (listed(3, (40, 30)), "must be a dict with a name; got 3"),
        ("up", "must be a dict with a name"),
    ],
)
def test_a_bad_catalogue_entry_is_refused(catalogue, checkpoint, tmp_path, tensor, said):
    path = catalogue(tensor)
    with pytest.raises(FormatError) as caught:
        convert_v1(path, tmp_path / "model.safetensors", source=checkpoint)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]


@pytest.mark.parametrize("files", [None, {}, [1], [{}], [{"tensors": 3}]])
def test_a_bad_list_of_files_is_refused(catalogue, checkpoint, tmp_path, files):
    with pytest.raises(FormatError, match="files"):
        convert_v1(catalogue(files=files), tmp_path / "model.safetensors", source=checkpoint)


def test_a_tensor_listed_twice_is_refused(catalogue, checkpoint, tmp_path):
    path = catalogue(listed("up", (40, 30)), listed("up", (40, 30)))
    with pytest.raises(FormatError, match="tensor 'up': is listed more than once"):
        convert_v1(path, tmp_path / "model.safetensors", source=checkpoint)


def test_a_matrix_that_cannot_be_encoded_is_named(catalogue, checkpoint, tmp_path):
    checkpoint.tensors["up"][3, 4] = np.nan
    with pytest.raises(FormatError, match=r"tensor 'up': .*row 3, column 4"):
        convert_v1(catalogue(listed("up", (40, 30))), tmp_path / "model.safetensors", source=checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        lambda w: w * np.float32(1.1),
        lambda w: np.where(np.abs(w) == np.abs(w).max(), 0, w),
        lambda w: np.where(w == 0, 0.1, w).astype(np.float32),
        lambda w: w * 0,
    ],
    ids=["scaled", "largest-dropped", "more-kept", "nothing-kept"],
)
def test_a_wrong_compression_is_caught(catalogue, checkpoint, tmp_path, monkeypatch, damage):
    from upg_jax.io import _v1_jobs

    encode = _v1_jobs.encode_dense

    def wrong(w, *, density, manifold):
        pruned = np.asarray(encode(w, density=density, manifold=manifold).to_dense())
        return encode(damage(pruned).astype(np.float32), density=1.0, manifold=manifold)

    monkeypatch.setattr(_v1_jobs, "encode_dense", wrong)
    with pytest.raises(FormatError, match="tensor 'up': verification:"):
        convert_v1(catalogue(listed("up", (40, 30))), tmp_path / "model.safetensors", source=checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == ["model.upg"]


def test_a_catalogue_is_filled_from_a_real_checkpoint(catalogue, tmp_path):
    """A Hugging Face directory through `open_checkpoint`, as the command line does it."""
    import json

    from safetensors.numpy import save_file

    from upg_jax.io import open_checkpoint

    directory = tmp_path / "hf"
    directory.mkdir()
    w = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    save_file({"up": w, "norm": w[0]}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    source = open_checkpoint(directory)
    convert_v1(catalogue(listed("up", (40, 30))), tmp_path / "out.safetensors", source=source)
    f = UPGDecompressor.from_safetensors(tmp_path / "out.safetensors")
    assert f.info("up").true_nnz == 600
    assert f.model["model_type"] == "llama"
    assert f.provenance["sources"][0]["name"] == "model.upg"
    assert len(f.provenance["sources"]) == 1 + len(source.source_files())
