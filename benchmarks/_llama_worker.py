"""llama.cpp's side of `benchmarks.generate`, run by a Python that has llama-cpp-python.

    python _llama_worker.py MODEL.gguf FOLDER THREADS

Requantizes the model into FOLDER with llama.cpp's own tool, loads every form and prints their names as a line of JSON.
Then each line of input, `{"name", "prompt", "tokens"}`, is answered by a line with the greedy answer's ids and the
seconds from its first token to its last. The loop calls the C interface, so that no wrapper's time counts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

FORMATS = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def quantized(source: Path, folder: Path, name: str, file_type: int) -> Path:
    path = folder / f"{name}.gguf"
    if not path.exists():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = file_type, True
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(path), settings):
            raise SystemExit(f"llama.cpp does not quantize {source} to {name}")
    return path


def answer(model: llama_cpp.Llama, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    context = model.ctx
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    def step(ids: list[int]) -> int:
        array = (llama_cpp.llama_token * len(ids))(*ids)  # the batch only points to it
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),))))

    ids = [step(prompt)]
    begin = time.perf_counter()
    while len(ids) < tokens:
        ids.append(step(ids[-1:]))
    return ids, time.perf_counter() - begin


def main() -> None:
    source, folder, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    # What the library prints must not get between the lines of JSON.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    models = {}
    for name, file_type in FORMATS.items():
        path = os.fspath(quantized(source, folder, name, file_type))
        models[name] = llama_cpp.Llama(
            path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
    system = llama_cpp.llama_print_system_info().decode()
    sizes = {name: (folder / f"{name}.gguf").stat().st_size for name in models}
    print(json.dumps({"names": list(models), "bytes": sizes, "system": system}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids, seconds = answer(models[request["name"]], request["prompt"], request["tokens"])
        print(json.dumps({"ids": ids, "seconds": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main()
