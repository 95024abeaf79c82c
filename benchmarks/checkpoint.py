"""A checkpoint of Phi-4's shapes, compressed by `upg-jax compress`: time, memory, and a kill on the way. Linux only.

    python -m benchmarks.checkpoint DIRECTORY --out rows.jsonl [--layers 40] [--density 0.1]

Writes random bfloat16 weights to DIRECTORY, in shards as published checkpoints have them (40 layers: 29 GB), compresses
them, kills the run when half of the matrices are done, and goes on with the same command. The last process opens the
model and generates. What was written stays: with 40 layers and density 0.1 DIRECTORY comes to 40 GB on the way.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks._rows import ROOT, Writer, environment
from examples.phi4_generate import PHI_4
from upg_jax.models import parse_config, weights

SOURCE, RESULT = "source", "compressed"


def write_checkpoint(directory: Path, layers: int) -> Path:
    """Random bfloat16 weights, a shard for the embedding, one for each layer, and one for the head."""
    directory.mkdir(parents=True)
    settings = PHI_4 | {"num_hidden_layers": layers}
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for weight in weights(parse_config(settings)):
        for layer, name in enumerate(weight.names(layers)):
            shard = f"layer-{layer}" if weight.per_layer else weight.slot
            shards.setdefault(shard, {})[name] = weight.shape
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(1 << 24, np.float32)).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for number, tensors in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        write_shard(directory / file, tensors, noise, rng)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def write_shard(
    path: Path, tensors: dict[str, tuple[int, ...]], noise: np.ndarray, rng: np.random.Generator
) -> None:
    """A safetensors file, a piece at a time; each piece is the noise rotated, so that no two matrices are equal."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        stop = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            left = int(np.prod(shape))
            while left:
                piece = np.roll(noise, int(rng.integers(noise.size)))[:left]
                f.write(piece.tobytes())
                left -= piece.size


def start(source: Path, destination: Path, log: Path, density: float) -> subprocess.Popen[bytes]:
    """`upg-jax compress`, which writes what it says to `log`."""
    command = [sys.executable, "-m", "upg_jax.cli", "compress", str(source), str(destination)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        return subprocess.Popen(
            [*command, "--density", str(density)], stdout=out, stderr=out, env=environment
        )


def memory_of(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """Bytes of memory of its own while a process runs; pages of mapped files belong to the page cache."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        yield 1024 * int(found[1]) if found else 0
        time.sleep(0.05)


def done(destination: Path) -> int:
    """How many matrices an unfinished run has written."""
    return len(list(destination.with_name(f"{destination.name}.partial").glob("parts/*.safetensors")))


def compress(directory: Path, layers: int, density: float) -> Iterator[dict[str, Any]]:
    """A row for the run that is killed and one for the run that ends."""
    destination, log = directory / RESULT, directory / "log"
    matrices = 4 * layers
    for killed in (True, False):
        before, began, peak = done(destination), time.monotonic(), 0
        with start(directory / SOURCE, destination, log, density) as process:
            for used in memory_of(process):
                peak = max(peak, used)
                if killed and done(destination) >= matrices // 2:
                    process.send_signal(signal.SIGKILL)
        row = {"topic": "checkpoint", "layers": layers, "density": density, "matrices done before": before}
        row |= {"seconds": time.monotonic() - began, "peak": peak, "killed": killed}
        if (process.returncode == -signal.SIGKILL) != killed or destination.exists() == killed:
            raise SystemExit(f"upg-jax compress ended with {process.returncode}: {log.read_text()[-2000:]}")
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--density", type=float, default=0.1)
    options = parser.parse_args()
    source, writer = options.directory / SOURCE, Writer(options.out)
    writer.write(environment())
    if not source.exists():
        write_checkpoint(source, options.layers)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    for row in compress(options.directory, options.layers, options.density):
        writer.write(row | {"source": size})
    command = [
        sys.executable,
        "-m",
        "benchmarks.open",
        "--worker",
        str(options.directory / RESULT),
        "--tokens",
        "8",
    ]
    said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    writer.write({"topic": "checkpoint, opened", **json.loads(said)})


if __name__ == "__main__":
    main()
