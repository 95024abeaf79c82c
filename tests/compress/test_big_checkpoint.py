"""A checkpoint of Phi-4's real shapes, compressed in little memory and killed on the way. Needs 10 GB of disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import upg_jax
from upg_jax import UPGDecompressor, UPGModel
from upg_jax.models import parse_config, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]
LAYERS = 2
EXAMPLE = Path(__file__).parents[2] / "examples" / "phi4_generate.py"
PHI_4 = runpy.run_path(str(EXAMPLE))["PHI_4"] | {"num_hidden_layers": LAYERS}
GB = 10**9


def write_checkpoint(directory: Path) -> Path:
    """Random bfloat16 weights, a shard for the embedding, one for each layer, and one for the head."""
    directory.mkdir()
    config = parse_config(PHI_4)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for weight in weights(config):
        for layer, name in enumerate(weight.names(LAYERS)):
            shard = f"layer-{layer}" if weight.per_layer else weight.slot
            shards.setdefault(shard, {})[name] = weight.shape
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(1 << 24, np.float32)).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for number, tensors in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        header, offset = {}, 0
        for name, shape in tensors.items():
            stop = offset + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for shape in tensors.values():
                left = int(np.prod(shape))
                while left:
                    # Rotated, so that no two matrices are equal.
                    piece = np.roll(noise, int(rng.integers(noise.size)))[:left]
                    f.write(piece.tobytes())
                    left -= piece.size
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(PHI_4))
    return directory


def peak_of(process: subprocess.Popen[bytes]) -> int:
    """Bytes of memory of its own that a process came to have; pages of mapped files belong to the page cache."""
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        peak = max(peak, 1024 * int(found[1]) if found else 0)
        time.sleep(0.02)
    return peak


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("phi4")
    yield write_checkpoint(directory / "source")
    shutil.rmtree(directory)


def start(source: Path, destination: Path, log: Path) -> subprocess.Popen[bytes]:
    """`upg-jax compress`, which says on `log` what goes wrong."""
    command = [
        sys.executable,
        "-m",
        "upg_jax.cli",
        "compress",
        str(source),
        str(destination),
        "--density",
        "0.5",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(upg_jax.__file__).parents[1])}
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


def digest(directory: Path) -> str:
    with (directory / "model.safetensors").open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def test_memory_stays_below_four_gigabytes_and_a_killed_run_ends_with_the_same_bytes(tmp_path, source):
    log, began = tmp_path / "log", time.monotonic()
    with start(source, tmp_path / "undisturbed", log) as process:
        peak = peak_of(process)
    seconds = time.monotonic() - began
    assert process.returncode == 0, log.read_text()
    assert peak < 4 * GB
    with UPGDecompressor.from_safetensors(tmp_path / "undisturbed") as file:
        assert file.info("model.layers.1.mlp.gate_up_proj.weight").shape == (35840, 5120)
    expected = digest(tmp_path / "undisturbed")
    shutil.rmtree(tmp_path / "undisturbed")

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    points, parts = random.Random(0), []

    def done() -> int:
        return len(list(partial.glob("parts/*.safetensors")))

    # By progress, not by the clock: of ten matrices, this many are done, and the next is under way.
    for wanted in sorted(points.sample(range(9), 4)):
        with start(source, out, log) as process:
            while process.poll() is None and done() < wanted:
                time.sleep(0.01)
            time.sleep(points.uniform(0, 1))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, log.read_text()
        # Neither the destination nor what lies beside it passes for a model.
        assert not out.exists()
        with pytest.raises((upg_jax.UPGError, OSError)):
            UPGModel.from_file(partial)
        parts.append(done())
    with start(source, out, log) as process:
        process.wait()
    assert process.returncode == 0, log.read_text()
    assert parts == sorted(parts)  # no run undid what one before it had done
    assert parts[-1] > 0
    assert digest(out) == expected
    assert not partial.exists()
    print(f"\nundisturbed: {seconds:.0f} s, {peak / GB:.2f} GB; killed with so many tensors done: {parts}")
