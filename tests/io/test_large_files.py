"""Memory and time of opening and saving models much larger than either may use."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.crafted import join

import upg_jax

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")

_MEASURE = """
import re, sys, time
from pathlib import Path

def kib(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")
"""


def measure(script: str, *arguments: object) -> list[float]:
    """Runs a script in a process of its own, where nothing else moves the numbers; returns what it prints."""
    command = [sys.executable, "-c", _MEASURE + textwrap.dedent(script), *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(upg_jax.__file__).parents[1]
    )
    assert result.returncode == 0, result.stderr
    return [float(number) for number in result.stdout.split()]


def write_sparse_model(path: Path, layers: int = 28, rows: int = 8192, entries: int = 3 << 25) -> None:
    """A valid model of many gigabytes, all of them holes in the file system."""
    facts = {"shape": [rows, 65536], "manifold": "unit", "row_alignment": 1, "true_nnz": 0}
    facts |= {"index": "delta8", "value_bits": 8, "dtype": "float32"}
    matrices = {f"layers.{i}.w": facts for i in range(layers)}
    metadata = {"format": "upg-mdcsr", "version": "2.0", "mdcsr": json.dumps(matrices)}
    header: dict = {"__metadata__": metadata}
    offset = 0
    # The large planes first: whole multiples of 64 bytes, so that none has to be copied to be aligned.
    planes = {"values": ("I8", entries, 1), "delta_indices": ("U8", entries, 1)}
    planes |= {"scales": ("F32", rows, 4), "row_pointers": ("U32", rows + 1, 4)}
    for plane, (dtype, length, itemsize) in planes.items():
        for name in matrices:
            offsets = [offset, offset + length * itemsize]
            header[f"{name}.{plane}"] = {"dtype": dtype, "shape": [length], "data_offsets": offsets}
            offset = offsets[1]
    text = json.dumps(header)
    text += " " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(join(text, b""))
        file.truncate(8 + len(text) + offset)


def test_a_model_of_five_gigabytes_opens_at_once(tmp_path):
    path = tmp_path / "model.safetensors"
    write_sparse_model(path)
    assert path.stat().st_size > 5e9
    seconds, opened_kib, layer_kib = measure(
        """
        from upg_jax import UPGDecompressor
        import jax
        jax.devices()
        before, start = kib("VmRSS"), time.perf_counter()
        f = UPGDecompressor.from_safetensors(sys.argv[1])
        infos = [f.info(name) for name in f.names()]
        print(time.perf_counter() - start, kib("VmRSS") - before)
        layer = f.get_layer("layers.5.w")
        stack = f.get_stack(["layers.7.w"])
        assert layer.nnz == 0
        print(kib("VmRSS") - before)
        """,
        path,
    )
    assert seconds < 0.5
    assert opened_kib < 20_000
    assert layer_kib < 50_000, "a layer without entries touches no plane"


def test_saving_keeps_no_more_than_a_tensor_in_memory(tmp_path):
    # 20 tensors of 16 MiB, made one by one, staged on disk, and joined in one file of 330 MB.
    peak_kib, size = measure(
        """
        import numpy as np
        from upg_jax import MdCSR, UPGDecompressor, save
        from upg_jax.io._staging import StagedTensors
        directory = Path(sys.argv[1])
        (directory / "parts").mkdir()
        staged = StagedTensors(directory / "parts")
        n = 1 << 23
        for i in range(20):
            if i % 5:
                pointers = np.array([0, n], np.uint32)
                layer = MdCSR(values=np.full(n, 1 + i, np.int8), delta_indices=np.ones(n, np.uint8),
                              scales=np.ones(1, np.float32), row_pointers=pointers, shape=(1, n + 1))
                staged.add(f"layers.{i}.w", layer)
            else:
                staged.add(f"dense.{i}", np.full(n // 2, i, np.float32))
        del layer
        UPGDecompressor.from_safetensors(directory / "parts" / "0.safetensors").close()
        reset_peak()
        before = kib("VmHWM")
        save(directory / "model.safetensors", staged)
        print(kib("VmHWM") - before, (directory / "model.safetensors").stat().st_size)
        f = UPGDecompressor.from_safetensors(directory / "model.safetensors")
        for name in staged:
            if name.startswith("dense"):
                assert (f.get_array(name, device=False) == staged[name]).all()
            else:
                ours, theirs = f.get_layer(name, device=False), staged[name]
                assert (ours.values[:n] == theirs.values[:n]).all()
                assert (ours.delta_indices[:n] == theirs.delta_indices[:n]).all()
        """,
        tmp_path,
    )
    assert size > 330e6
    # One mapped tensor (16 MiB) while it is planned or written, a chunk, and the checks' temporaries.
    assert peak_kib < 100_000
