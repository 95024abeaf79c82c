"""A checkpoint of Phi-4's real shapes, compressed in little memory and killed on the way. Needs 10 GB of disk."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import upg_jax
from benchmarks.checkpoint import done, memory_of, start, write_checkpoint
from upg_jax import UPGDecompressor, UPGModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]
LAYERS = 2
DENSITY = 0.5
GB = 10**9


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("phi4")
    yield write_checkpoint(directory / "source", LAYERS)
    shutil.rmtree(directory)


def digest(directory: Path) -> str:
    with (directory / "model.safetensors").open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def test_memory_stays_below_four_gigabytes_and_a_killed_run_ends_with_the_same_bytes(tmp_path, source):
    log, began = tmp_path / "log", time.monotonic()
    with start(source, tmp_path / "undisturbed", log, DENSITY) as process:
        peak = max(memory_of(process))
    seconds = time.monotonic() - began
    assert process.returncode == 0, log.read_text()
    assert peak < 4 * GB
    with UPGDecompressor.from_safetensors(tmp_path / "undisturbed") as file:
        assert file.info("model.layers.1.mlp.gate_up_proj.weight").shape == (35840, 5120)
    expected = digest(tmp_path / "undisturbed")
    shutil.rmtree(tmp_path / "undisturbed")

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    points, parts = random.Random(0), []

    # By progress, not by the clock: of ten matrices, this many are done, and the next is under way.
    for wanted in sorted(points.sample(range(9), 4)):
        with start(source, out, log, DENSITY) as process:
            while process.poll() is None and done(out) < wanted:
                time.sleep(0.01)
            time.sleep(points.uniform(0, 1))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, log.read_text()
        # Neither the destination nor what lies beside it passes for a model.
        assert not out.exists()
        with pytest.raises((upg_jax.UPGError, OSError)):
            UPGModel.from_file(partial)
        parts.append(done(out))
    with start(source, out, log, DENSITY) as process:
        process.wait()
    assert process.returncode == 0, log.read_text()
    assert parts == sorted(parts)  # no run undid what one before it had done
    assert parts[-1] > 0
    assert digest(out) == expected
    assert not partial.exists()
    print(f"\nundisturbed: {seconds:.0f} s, {peak / GB:.2f} GB; killed with so many tensors done: {parts}")
