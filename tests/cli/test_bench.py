"""`upg-jax bench` on a small matrix."""

from __future__ import annotations

import json

import pytest

from upg_jax.cli import _bench


def test_bench_says_machine_and_ratios_as_json(upg_jax, monkeypatch):
    monkeypatch.setattr(_bench, "_REPEATS", 3)
    result = upg_jax("bench", "--size", "64", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress bar into a pipe
    report = json.loads(result.stdout)
    assert report["machine"]["read_bytes_per_second"] > 0
    assert report["machine"]["threads"] >= 1
    assert {(row["density"], row["batch"]) for row in report["rows"]} >= {(0.1, 1), (0.5, 16), (1.0, 64)}
    for row in report["rows"]:
        assert row["seconds"] > 0
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])


def test_the_table_says_what_ran_on_what(capsys):
    machine = {
        "processor": "P",
        "threads": 2,
        "jax": "0.10",
        "backend": "reference",
        "because": "no compiler",
    }
    rates = {"read_bytes_per_second": 30e9, "copy_bytes_per_second": 20e9}
    row = {"size": 64, "density": 0.1, "batch": 1, "index": "mask", "bits_per_weight": 1.6, "seconds": 1e-3}
    ratios = {"dense_seconds": 2.5e-3, "speedup": 2.5, "bandwidth_share": 0.31}
    _bench._print({**machine, **rates}, [{**row, **ratios}])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())  # no frame on a narrow terminal
    assert " 0.1 1.60 1 1.000 2.500 2.50 31% mask " in text
    assert "runs reference: no compiler" in text
    assert "read at 30.0 GB/s" in text


def test_a_size_that_is_too_small_is_wrong_usage(upg_jax):
    assert upg_jax("bench", "--size", "8").returncode == 2
