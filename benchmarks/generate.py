"""Greedy decoding of SmolLM2-135M-Instruct at batch 1: dense, compressed, and llama.cpp in turns with them.

    python -m benchmarks.generate --out rows.jsonl [--llama-python PYTHON] [--densities 0.3 0.5 0.7 1.0]

PYTHON is an interpreter with llama-cpp-python (benchmarks/README.md tells how to build it); without one llama.cpp is
left out. Every contender answers the same prompt with as many tokens, on the same threads, from models that lie in
memory; timed is from an answer's first token to its last. Speed only: what pruning does to quality, `upg-jax demo` and
`upg-jax eval` measure. A second topic, `step`, has where the time of a decoding step goes, by XLA's profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._profile import operations
from benchmarks._rows import Writer, environment
from upg_jax import UPGModel, _native
from upg_jax.cli._demo import PROMPT
from upg_jax.cli._demo_model import demo_model
from upg_jax.cli._measure import bandwidth, usable_threads
from upg_jax.compress import Settings, compress_checkpoint

DENSE = "dense float32"


class Llama:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, source: Path, folder: Path) -> None:
        worker = Path(__file__).with_name("_llama_worker.py")
        command = [python, str(worker), str(source), str(folder), str(usable_threads())]
        self._log = folder / "llama.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.about = self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SystemExit(f"llama.cpp ended with {code}:\n{self._log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)

    def answer(self, name: str, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        """The ids, and seconds from the first to the last."""
        print(
            json.dumps({"name": name, "prompt": prompt, "tokens": tokens}),
            file=self._process.stdin,
            flush=True,
        )
        reply = self._reply()
        return reply["ids"], reply["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def answer(model: UPGModel, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """The ids, and seconds from the first to the last."""
    ids, times = [], []
    for token in model.stream(prompt, max_new_tokens=tokens, stop_at_eos=False):
        if token.id is not None:
            ids.append(token.id)
            times.append(time.perf_counter())
    return ids, times[-1] - times[0]


def models(source: Path, folder: Path, densities: list[float]) -> dict[str, UPGModel]:
    """The dense model, and for each density the compressed one as it is loaded by default and with `pack=False`."""
    found = {DENSE: UPGModel.from_file(source)}
    for density in densities:
        path = folder / f"unit-{density}"
        if not path.exists():
            compress_checkpoint(source, path, Settings(density=density))
        found[f"unit {density}"] = UPGModel.from_file(path)
        found[f"unit {density}, as stored"] = UPGModel.from_file(path, pack=False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.5, 0.7, 1.0])
    parser.add_argument("--tokens", type=int, default=128, help="to generate in each answer")
    parser.add_argument("--repeats", type=int, default=7, help="answers of each contender")
    parser.add_argument(
        "--folder", type=Path, help="keep compressed and requantized models here for the next run"
    )
    arguments = parser.parse_args()
    library = _native.load()
    writer = Writer(arguments.out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source = demo_model()
        ours = models(source, folder, arguments.densities)
        llama = Llama(arguments.llama_python, source, folder) if arguments.llama_python else None
        kernels = library.kernels if library else "none"
        writer.write(environment(kernels=kernels, llama=llama.about if llama else None))
        writer.write({"topic": "bandwidth", "bytes per second": bandwidth()})
        writer.write(measure(ours, llama, arguments.tokens, arguments.repeats))
        if llama:
            llama.close()
        for name in (DENSE, "unit 0.5"):
            if name in ours:
                writer.write(step(name, ours[name]))


def measure(ours: dict[str, UPGModel], llama: Llama | None, tokens: int, repeats: int) -> dict[str, Any]:
    """Answers in turns; `per call` is how many steps were timed."""
    prompt = ours[DENSE].tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    calls: dict[str, Callable[[], tuple[list[int], float]]] = {
        name: lambda model=model: answer(model, prompt, tokens) for name, model in ours.items()
    }
    for name in llama.about["names"] if llama else []:
        calls[f"llama.cpp {name}"] = lambda name=name: llama.answer(name, prompt, tokens)
    nbytes = {name: model.nbytes for name, model in ours.items()}
    nbytes |= {f"llama.cpp {name}": size for name, size in (llama.about["bytes"] if llama else {}).items()}
    ids = {name: call()[0] for name, call in calls.items()}  # compiles, and reads files into memory
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(call()[1])
        print(
            {name: f"{(tokens - 1) / statistics.median(s):.1f}/s" for name, s in seconds.items()},
            file=sys.stderr,
        )
    skipped = {} if llama else {"llama.cpp": "no --llama-python"}
    return {
        "topic": "generate",
        "case": {"tokens": tokens, "prompt": len(prompt)},
        "per call": dict.fromkeys(calls, tokens - 1),
        "bytes": nbytes,
        "skipped": skipped,
        "ids": ids,
        "seconds": seconds,
    }


def step(name: str, model: UPGModel, tokens: int = 33) -> dict[str, Any]:
    """Thread time of a step's operations."""
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    answer(model, prompt, 2)
    stream = model.stream(prompt, max_new_tokens=tokens + 1, stop_at_eos=False)
    next(stream)  # the prompt is done, and the first step has begun
    found = operations(lambda: [token for token in stream if token.id is not None])
    return {
        "topic": "step",
        "case": {"model": name},
        "per call": dict.fromkeys(found, tokens),
        "bytes": {},
        "skipped": {},
        "seconds": {operation: [seconds] for operation, seconds in found.items()},
    }


if __name__ == "__main__":
    main()
