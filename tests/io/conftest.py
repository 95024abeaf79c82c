"""Fixtures of the file tests."""

from __future__ import annotations

import pickle

import pytest

from upg_jax import UPGDecompressor
from upg_jax.io import convert_v1


@pytest.fixture
def convert(tmp_path):
    """Pickles tensors as a version 1 file, converts it, and returns the open result."""

    def convert(tensors: dict, protocol=4, **options) -> UPGDecompressor:
        src, dst = tmp_path / "model.upg", tmp_path / "model.safetensors"
        content = {"model_type": "llama", "source": "tests", "compression_method": "prime_sparse_v1"}
        src.write_bytes(pickle.dumps({**content, "tensors": tensors}, protocol=protocol))
        report = convert_v1(src, dst, **options)
        assert (report.source_bytes, report.written_bytes) == (src.stat().st_size, dst.stat().st_size)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "model.upg"]
        f = UPGDecompressor.from_safetensors(dst)
        f.verify()
        assert report.compressed + report.dense == len(f.names()) == len(tensors)
        return f

    return convert
