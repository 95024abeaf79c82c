"""A compression stopped anywhere goes on, and ends with the bytes of one that was not stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.stopping import StopError, stop_after
from small_models import llama

from upg_jax import CheckpointError
from upg_jax.compress import Settings, compress_checkpoint

HALF = Settings(density=0.5)


@pytest.fixture
def source(tmp_path):
    return llama.write_hugging_face(tmp_path / "hf", llama.weights(), dtype=ml_dtypes.bfloat16)


@pytest.fixture
def stopped(tmp_path, source):
    with pytest.raises(StopError):
        compress_checkpoint(source, tmp_path / "out", HALF, progress=stop_after(5))
    assert not (tmp_path / "out").exists()
    return tmp_path / "out.partial"


def test_stopped_run_goes_on_where_it_was(tmp_path, source, stopped):
    first = {}

    def report(progress):
        first.setdefault(progress.stage, progress)

    report = compress_checkpoint(source, tmp_path / "out", HALF, progress=report)
    assert report.resumed == 5
    assert "hash" not in first  # unchanged sources are not hashed again
    assert first["encode"].done > 0
    assert not stopped.exists()
    undisturbed = compress_checkpoint(source, tmp_path / "other", HALF)
    assert undisturbed.resumed == 0
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "other")]
    assert files[0] == files[1]


def test_other_settings_are_refused_unless_it_begins_anew(tmp_path, source, stopped):
    other = Settings(density=0.4)
    with pytest.raises(CheckpointError, match=r"another settings: .*0\.5.*, now .*0\.4.* --restart"):
        compress_checkpoint(source, tmp_path / "out", other)
    assert stopped.exists()
    assert compress_checkpoint(source, tmp_path / "out", other, restart=True).resumed == 0
    assert not stopped.exists()


def test_changed_sources_are_refused_unless_it_begins_anew(tmp_path, source, stopped):
    file = source / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="source files are not those"):
        compress_checkpoint(source, tmp_path / "out", HALF)
    assert compress_checkpoint(source, tmp_path / "out", HALF, restart=True).resumed == 0


def test_touched_but_equal_sources_are_hashed_again_and_accepted(tmp_path, source, stopped):
    os.utime(source / "model.safetensors", (1, 1))
    stages = set()
    report = compress_checkpoint(source, tmp_path / "out", HALF, progress=lambda p: stages.add(p.stage))
    assert report.resumed == 5
    assert "hash" in stages


def test_another_version_of_the_tool_begins_anew(tmp_path, source, stopped):
    state = json.loads((stopped / "state.json").read_text())
    (stopped / "state.json").write_text(json.dumps(state | {"tool": "upg_jax 0.0.1"}))
    with pytest.raises(CheckpointError, match=r"another tool: 'upg_jax 0\.0\.1'"):
        compress_checkpoint(source, tmp_path / "out", HALF)


def test_damaged_state_is_not_taken_for_ours(tmp_path, source, stopped):
    (stopped / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="not an unfinished compression"):
        compress_checkpoint(source, tmp_path / "out", HALF, restart=True)


def killed_runs(source, directory, mode, points):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("killed_runs.py")
    run = [sys.executable, str(script), str(source), str(directory), mode, points]
    result = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def check(outcome, mode):
    report, errors = outcome
    for result in report["results"]:
        assert result["killed"] == -signal.SIGKILL, errors
        # A reader finds what was there before, or the finished model, or (only while one directory takes the
        # other's place) nothing.
        assert result["left"] in {"new": ("nothing", "new"), "force": ("old", "nothing", "new")}[mode], result
        assert (result["finished"], result["after"], result["traces"]) == (0, "new", []), (result, errors)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork (POSIX)")


@needs_fork
@pytest.mark.parametrize("mode", ["new", "force"])
def test_run_killed_at_random_points_ends_with_the_same_bytes(tmp_path, mode):
    source = llama.write_hugging_face(tmp_path / "hf", llama.weights(layers=1), dtype=ml_dtypes.bfloat16)
    # The last operations move the result into place, so all of them are tried.
    points = [*np.random.default_rng(0).integers(1, 70, 3).tolist(), *range(-16, 0)]
    outcome = killed_runs(source, tmp_path / "work", mode, json.dumps(points))
    assert outcome[0]["operations"] > 70
    check(outcome, mode)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["new", "force"])
def test_run_killed_at_every_point_ends_with_the_same_bytes(tmp_path, mode):
    source = llama.write_hugging_face(tmp_path / "hf", llama.weights(layers=1), dtype=ml_dtypes.bfloat16)
    check(killed_runs(source, tmp_path / "work", mode, "all"), mode)
