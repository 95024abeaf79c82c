"""`recover`, `eval --against` and `report` as a user runs them."""

from __future__ import annotations

import base64
import json
import re
import sys

import numpy as np
import pytest

from upg_jax.cli._report_page import frontier
from upg_jax.compress import Settings, compress_checkpoint

TEXT = "he says that he is here, and she says that she is there. " * 8


@pytest.fixture(scope="module")
def models(gguf_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for density in (0.25, 0.5):
        compress_checkpoint(gguf_model, directory / f"half-{density}", Settings(density=density))
    return directory


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return "text.txt"


def test_recover_trains_and_says_what_it_did(upg_jax, gguf_model, models, text, tmp_path):
    arguments = ("--dense", gguf_model, "--text", text, "--tokens", "640", "--window", "32", "--batch", "2")
    result = upg_jax("recover", models / "half-0.5", *arguments, "--out", "better", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["steps"], found["tokens"]) == (10, 640)
    assert "recover: 100%, step 10, 640 tokens" in result.stderr
    again = upg_jax("recover", models / "half-0.5", *arguments, "--out", "better")
    assert again.returncode == 1
    assert "--force" in again.stderr
    evaluated = upg_jax("eval", "better", "--text", text, "--against", gguf_model, "--window", "32", "--json")
    (row,) = json.loads(evaluated.stdout)
    assert row["against"]["kl"] > 0


def test_recover_without_a_budget_is_refused(upg_jax, gguf_model, models, text):
    result = upg_jax("recover", models / "half-0.5", "--dense", gguf_model, "--text", text, "--out", "m")
    assert result.returncode == 1
    assert "give minutes or tokens" in result.stderr


def test_eval_prints_the_distance_from_the_dense_model(upg_jax, gguf_model, models, text):
    result = upg_jax(
        "eval", models / "half-0.5", "--text", text, "--against", gguf_model, "--window", "32", "--weights"
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"divergence from the dense model \d\.\d{4} nats", result.stdout)
    assert "model.layers.0.mlp.down_proj.weight" in result.stdout
    alone = upg_jax("eval", models / "half-0.5", "--text", text, "--weights")
    assert alone.returncode == 1
    assert "--against" in alone.stderr


def test_report_is_one_page_with_every_model(upg_jax, gguf_model, models, text, tmp_path):
    result = upg_jax(
        "report", models, "--dense", gguf_model, "--text", text, "--window", "32", "--out", "r.html", "--json"
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["models"]
    assert [row["name"] for row in rows] == ["small.gguf", "half-0.25", "half-0.5"]
    dense, quarter, half = rows
    assert dense["kl"] is None
    assert half["kl"] < quarter["kl"]
    assert quarter["bits_per_weight"] < half["bits_per_weight"]
    assert half["perplexity"]["text.txt"] == pytest.approx(half["geometric_mean"])
    assert all(row["tokens_per_second"] > 0 for row in rows)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(row["name"] in page for row in rows)
    assert not re.search(r'(src|href)="(?!data:)', page)
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(image)[:4] for image in images] == [b"\x89PNG"] * 2


def test_report_says_before_it_measures_that_it_could_not_write_its_page(upg_jax, models, monkeypatch):
    monkeypatch.setattr("upg_jax.inference.UPGModel.from_file", lambda *args, **more: pytest.fail("measured"))
    result = upg_jax("report", models, "--out", "nowhere/r.html")
    assert result.returncode == 1
    assert "nowhere/r.html" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = upg_jax("report", models, "--out", "r.html")
    assert result.returncode == 1
    assert "upg-jax[report]" in result.stderr


def test_an_interrupted_report_leaves_the_page_as_it_was(upg_jax, models, tmp_path, monkeypatch):
    def interrupted(path, *ignored):
        path.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "r.html").write_text("before")
    monkeypatch.setattr("upg_jax.cli._report.write_page", interrupted)
    monkeypatch.setattr("upg_jax.cli._report._measure", lambda *ignored: {})
    assert upg_jax("report", models, "--out", "r.html").returncode == 130
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("r.html", "before")]


def test_the_frontier_has_the_points_that_none_beats():
    points = [(8.0, 30.0), (5.0, 60.0), (6.0, 61.0), (8.0, 29.0), (12.0, 29.5)]
    assert frontier(points, more_is_better=False) == [(5.0, 60.0), (8.0, 29.0)]
    assert frontier(points, more_is_better=True) == [(8.0, 29.0), (12.0, 29.5)]
    np.testing.assert_array_equal(frontier([], more_is_better=False), [])
