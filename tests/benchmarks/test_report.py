"""Scripts write rows; tables, plots and verdicts come from rows alone."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from upg_jax import _native

ROOT = Path(__file__).parents[2]

_rows = pytest.importorskip("benchmarks._rows", reason="needs a checkout of the sources")
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs a checkout of the sources")


def run(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def product(density: float, batch: int, **milliseconds: float) -> dict:
    case = {"rows": 5120, "columns": 5120, "density": density, "batch": batch, "nnz": 1000}
    return {
        "topic": "product",
        "case": {**case, "pack": {"unit": "mask", "prime": "delta8"}},
        "per call": {"unit mask": 2},
        "bytes": {"unit mask": 10**6},
        "skipped": {"BCOO": "takes about 9 s"},
        "seconds": {name.replace("_", " "): [1e-3 * ms] * 3 for name, ms in milliseconds.items()},
    }


@pytest.fixture
def raw(tmp_path):
    environment = {
        "topic": "environment",
        "date": "2026-11-23",
        "commit": "abc",
        "kernels": "avx512",
        "threads": 2,
        "load": [0.5],
        "versions": {"jax": "0.10.2"},
        "peers": {},
        "machine": {"processor": "P", "system": "S"},
    }
    bandwidth = {"topic": "bandwidth", "bytes per second": {"read": 10e9, "copy": 8e9}}
    one = {
        "unit_mask": 1.0,
        "unit_delta8": 9.0,
        "prime_delta8": 0.7,
        "XLA_dense_float32": 3.5,
        "scipy_CSR": 1.0,
    }
    rows = [
        environment,
        bandwidth,
        product(0.1, 1, **one),
        product(0.5, 1, **{**one, "XLA_dense_float32": 1.0}),
    ]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


def test_floors_are_judged_by_the_form_that_pack_chooses(raw):
    lines = {line.split(" | ")[0]: line for line in run("benchmarks.floors", raw).splitlines()}
    # 3.5 ms against two products in 1 ms, of the mask and not of the slower deltas.
    assert (
        "| at least 6 | 7.00 | 7.00 to 7.00 | pass |"
        in lines["| 5120 x 5120, density 0.1, batch 1: times XLA's dense float32"]
    )
    assert "| at least 3 | 2.00 | 2.00 to 2.00 | **miss** |" in lines["| ... times scipy's CSR"]
    assert "| at least 3 | 2.00 | 2.00 to 2.00 | **miss** |" in lines["| density 0.5, batch 1: times dense"]
    # The worst of both densities counts; a ceiling is passed from below.
    assert (
        "| at least 1 | 2.00 | 2.00 to 2.00 | pass |"
        in lines["| 5120 x 5120, unit, every density, batch 1: times dense"]
    )
    prime = "| prime manifold, densities 0.1 and 0.5, batch 1: times unit's time"
    assert "| at most 1.5 | 1.40 | 1.40 to 1.40 | pass |" in lines[prime]
    assert "not measured" in lines["| ... times BCSR"]


def test_a_case_measured_twice_is_one_row_with_all_calls(raw, tmp_path):
    again = tmp_path / "again.jsonl"
    rows = [json.loads(line) for line in gzip.decompress(raw.read_bytes()).splitlines()]
    slow = [row | {"commit": "def", "native": "12ab"} for row in rows if row["topic"] == "environment"]
    for row in rows[2:]:
        slow.append(row | {"seconds": {name: [9.0] for name in row["seconds"]}})
        slow[-1]["seconds"]["scipy CSR"] = [1.5, 4.5]
    again.write_text("\n".join(map(json.dumps, slow)))
    once, both = (run("benchmarks.floors", *paths).splitlines() for paths in ([raw], [raw, again]))
    assert once[-1] == "All rows are of commit abc."
    assert both[-1] == (
        "**Measurements of several builds**, pooled within 2 of the cases: 2 of commit abc; "
        "2 of commit def, native library 12ab."
    )
    # One slow call among several moves no median, but is one of the turns: 1.5 s against two products in 9 s. A call
    # that had no counterpart is no turn.
    for before, after in zip(once[2:-2], both[2:-2], strict=True):
        assert before.split(" | ")[:3] == after.split(" | ")[:3]
    scipy = next(line for line in both if line.startswith("| ... times scipy's CSR"))
    assert "| 2.00 | 0.33 to 2.00 |" in scipy


def test_rows_say_what_was_measured(tmp_path, monkeypatch):
    library = tmp_path / "libupg_native.so"
    library.write_bytes(b"kernels")
    said = {"rev-parse": "abc", "status": " M plan.cc"}
    monkeypatch.setattr(_rows, "_output", lambda *command: said[command[3]])
    monkeypatch.setattr(_native, "library_path", lambda: library)
    _rows.built.cache_clear()
    try:
        _rows.Writer(tmp_path / "rows.jsonl").write({"topic": "t", "case": {}, "seconds": {"a": [1.0]}})
    finally:
        _rows.built.cache_clear()
    (row,) = _rows.read([tmp_path / "rows.jsonl"])
    build = {"commit": "abc", "dirty": True, "native": hashlib.sha256(b"kernels").hexdigest()[:12]}
    assert build.items() <= row.items()
    assert _rows.builds([row]) == (
        f"All rows are of commit abc with changes, native library {build['native']}.\n"
    )


def test_a_report_has_tables_and_plots_of_the_rows(raw, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'upg-jax[bench]')")
    run("benchmarks.report", raw, "-o", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    # 10**6 bytes in half a millisecond are 2 GB/s of 10.
    assert "| 1, 0.1 | 9 | 0.5 | 0.7 | mask | 20% | 7 | 2 |" in text
    assert "BCOO (takes about 9 s; 2 cases)" in text
    assert "2026-11-23, commit abc: P, 2 threads" in text
    assert "All rows are of commit abc." in text
    plots = sorted(path.name for path in (tmp_path / "report").glob("*.svg"))
    assert plots == ["batches.svg", "density-batch1.svg", "roofline.svg"]
    assert all(name in text for name in plots)
