"""Opening a file of five gigabytes, and what generating from it holds in memory. Linux only.

    python -m benchmarks.open --out rows.jsonl [--directory DIRECTORY] [--layers 12] [--density 0.5] [--repeats 3]

Makes a model of Phi-4's shapes with random weights (`examples/phi4_generate.py`; 12 layers at density 0.5: 5.1 GB)
and reads its file once, so that it lies in the page cache. Then processes of their own open it: timed are
`UPGModel.from_file` until all parameters are ready, the first token with compilation, and the tokens after it; noted is
the memory of the process, its own and that of the mapped file, after each. Without --directory the model is removed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._rows import ROOT, Writer, environment
from upg_jax import _native

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def memory() -> dict[str, int]:
    """Bytes of this process: of its own, of mapped files, both, and the most that both ever were."""
    status = Path("/proc/self/status").read_text()
    keys = {"own": "RssAnon", "mapped": "RssFile", "resident": "VmRSS", "peak": "VmHWM"}
    return {name: 1024 * int(re.findall(rf"{key}:\s+(\d+)", status)[0]) for name, key in keys.items()}


def opened(directory: Path, tokens: int) -> dict[str, Any]:
    """Opens a model and generates; to be called once in a process."""
    import jax

    from upg_jax import UPGModel

    jax.devices()  # starts the backend, which is no part of opening
    found: dict[str, Any] = {"memory": {"before": memory()}, "seconds": {}}
    began = time.perf_counter()
    model = UPGModel.from_file(directory)
    jax.block_until_ready(model.params)
    found["seconds"]["open"] = time.perf_counter() - began
    found["memory"]["open"] = memory()
    for name in ("first token", "again"):
        began = time.perf_counter()
        times = [time.perf_counter() for _ in model.stream(PROMPT, max_new_tokens=tokens, stop_at_eos=False)]
        found["seconds"][name] = times[0] - began
        found["seconds"][f"tokens, {name}"] = (times[tokens - 1] - times[0]) / (tokens - 1)
        found["memory"][name] = memory()
    return found | {"index": model.index_bytes, "weights": model.num_weights}


def read(path: Path) -> None:
    """Brings a file into the page cache."""
    with path.open("rb") as f:
        while f.read(1 << 24):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="rows are appended to this file")
    parser.add_argument("--directory", type=Path, help="where the model is kept, or is already")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=16, help="to generate")
    parser.add_argument("--repeats", type=int, default=3, help="processes that open it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.worker:
        print(json.dumps(opened(wanted.worker, wanted.tokens)))
        return
    if wanted.out is None:
        parser.error("--out is missing")
    with contextlib.ExitStack() as stack:
        directory = wanted.directory or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        if not directory.exists():
            make = [sys.executable, str(ROOT / "examples" / "phi4_generate.py"), str(directory), "--random"]
            options = ["--layers", str(wanted.layers), "--density", str(wanted.density), "--tokens", "1"]
            subprocess.run([*make, *options], check=True, stdout=sys.stderr)
        file = directory / "model.safetensors"
        library = _native.load()
        writer = Writer(wanted.out)
        writer.write(environment(kernels=library.kernels if library else "none"))
        for _ in range(wanted.repeats):
            read(file)
            worker = [sys.executable, "-m", "benchmarks.open", "--worker", str(directory)]
            said = subprocess.run(
                [*worker, "--tokens", str(wanted.tokens)], check=True, capture_output=True, text=True
            )
            row = {"topic": "open", "case": {"bytes": file.stat().st_size}, **json.loads(said.stdout)}
            writer.write(row)
            print(row, file=sys.stderr)


if __name__ == "__main__":
    main()
