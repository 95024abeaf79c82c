"""The frontier's table and plot: a row for each model, and nothing of two models in one."""

from __future__ import annotations

import json
import sys

import pytest

frontier_report = pytest.importorskip("benchmarks.frontier_report", reason="needs a checkout of the sources")

ONE_SHOT = {"name": "half", "bits_per_weight": 8.0, "recovered": False, "geometric_mean": 90.0}


def test_speed_joins_the_quality_of_its_model():
    speed = {"name": "half", "tokens_per_second": 120.0}
    assert frontier_report.models([{"commit": "abc"}, ONE_SHOT, speed]) == [ONE_SHOT | speed]


def test_a_recovered_and_a_one_shot_model_of_one_name_are_refused():
    for first in (True, False):
        rows = [ONE_SHOT | {"recovered": first}, ONE_SHOT | {"recovered": not first}]
        with pytest.raises(ValueError, match="'half' is a recovered model in one row"):
            frontier_report.models(rows)


def test_rows_without_the_dense_model_are_refused_in_words(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ONE_SHOT) + "\n")
    monkeypatch.setattr(sys, "argv", ["frontier_report", str(rows), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="must have one of the dense model"):
        frontier_report.main()
    assert not (tmp_path / "out").exists()
