"""Size against quality: SmolLM2-135M-Instruct in every encoding, beside dense ones of few bits.

    python -m benchmarks.frontier MODEL.gguf GENSIM.whl HANDBOOK.deb DIR rows.jsonl [--only PATTERN] [--recovered DIR]
    python -m benchmarks.frontier ... --speeds

Compresses the model by each of `SETTINGS`, most with densities by matrix (`allocate`), into DIR (what is there already
is not made again), and measures every model on the texts of `benchmarks.pruning`: perplexity; divergence from the dense
model and agreement with it, on the first five windows of each text; the relative error of the weights (root mean square
over the matrices); bits per weight of the linear layers with all overheads. `--recovered` adds the models in another
directory, as they are. `--speeds` measures nothing but tokens a second of greedy answers: of the dense model and all
that is in the directories, in turns, for a machine that does nothing else.

The peers are dense: rounded to the nearest of 2**bits levels, with one float16 scale for a group of consecutive weights
of a row, as llama.cpp's Q4_0 (the scale is the weight of the largest magnitude over -2**(bits - 1)). They are computed
in floating point, and have no speed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._rows import environment
from benchmarks.pruning import WINDOW, handbook, spaced_windows, wikipedia
from upg_jax import UPGModel
from upg_jax.cli._report import size_of
from upg_jax.compress import Calibration, Settings, allocate, compress_checkpoint
from upg_jax.inference import compare, perplexity, weight_errors

# Names of directories. "float" embeddings, so that what differs is the linear layers alone.
SETTINGS: dict[str, Settings] = {
    "dense-8-bit": Settings(density=1.0, pack=True, embedding="float"),
    "dense-4-bit-group-32": Settings(density=1.0, value_bits=4, group_size=32, embedding="float"),
    "dense-4-bit-group-64": Settings(density=1.0, value_bits=4, group_size=64, embedding="float"),
    "dense-3-bit-group-32": Settings(density=1.0, value_bits=3, group_size=32, embedding="float"),
    **{
        f"sparsegpt-{density}{'-allocated' * allocated}-{bits}-bit": Settings(
            density=density, method="sparsegpt", value_bits=bits, pack=True, embedding="float"
        )
        # At density 1.0 this is GPTQ.
        for bits, density, allocated in [
            # 0.48 and 0.38 are 3.2 and 2.8 bits a weight, and so are 0.67 and 0.5 with 3 bits.
            *((4, density, density < 1) for density in (1.0, 0.7, 0.48, 0.38, 0.3)),
            *((3, density, density < 1) for density in (1.0, 0.67, 0.5)),
            *((8, density, True) for density in (0.7, 0.5, 0.3)),
            (4, 0.5, False),
            (8, 0.5, False),
        ]
    },
}
COMPARED = 5  # windows of each text, in which both models run
PEERS = [(4, 32), (4, 64), (3, 32), (3, 64)]


def rounded(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The weights that a dense format of few bits would hold."""
    groups = w.reshape(w.shape[0], -1, group).astype(np.float32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    scale = (largest / -(2 ** (bits - 1))).astype(np.float16).astype(np.float32)
    q = np.divide(groups, scale, out=np.zeros_like(groups), where=scale != 0)
    return (np.clip(np.rint(q), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).reshape(w.shape)


def root_mean_square(errors: list[float]) -> float:
    """Of the matrices' relative errors."""
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def peers(dense: UPGModel) -> Iterator[tuple[dict[str, Any], UPGModel]]:
    """Dense models of few bits, with their facts."""
    for bits, group in PEERS:
        errors: list[float] = []

        def of_few_bits(path: Any, leaf: Any) -> Any:
            if "proj" not in jax.tree_util.keystr(path):
                return leaf
            w = np.asarray(leaf)
            result = rounded(w, bits, group)  # noqa: B023, called in this turn
            errors.append(float(np.linalg.norm(result - w) / np.linalg.norm(w)))  # noqa: B023
            return jax.numpy.asarray(result)

        params = jax.tree_util.tree_map_with_path(of_few_bits, dense.params)
        facts = {
            "name": f"peer-{bits}-bit-group-{group}",
            "bits_per_weight": bits + 16 / group,
            "weight_error": root_mean_square(errors),
        }
        yield facts, UPGModel(params=params, config=dense.config, tokenizer=dense.tokenizer)


def facts_of(directory: Path, original: Path) -> dict[str, Any]:
    """What a directory's model is, but for its predictions."""
    size = size_of(directory)
    errors = [e.relative for e in weight_errors(directory, original) if "proj" in e.name]
    return {
        "name": directory.name,
        **{name: size[name] for name in ("bits_per_weight", "method", "density", "recovered")},
        "weight_error": root_mean_square(errors),
    }


def speeds(models: dict[str, UPGModel], tokens: int = 64, repeats: int = 7) -> Iterator[dict[str, Any]]:
    """Tokens a second of each model's answers, which are taken in turns."""
    measured: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            ids = model.encode("The old lighthouse keeper climbed the stairs")
            begin = time.perf_counter()
            model.generate(ids, max_new_tokens=tokens, stop_at_eos=False)
            if repeat:  # the first compiles
                measured[name].append(tokens / (time.perf_counter() - begin))
    for name, found in measured.items():
        middle = statistics.median(found)
        yield {"name": name, "tokens_per_second": middle, "least": min(found), "greatest": max(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("model", "wheel", "package", "directory", "rows"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", default="", help="a regular expression that names are searched for")
    parser.add_argument("--recovered", type=Path)
    parser.add_argument("--speeds", action="store_true")
    options = parser.parse_args()

    dense = UPGModel.from_file(options.model)

    def write(row: dict[str, Any]) -> None:
        with options.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def wanted(name: str) -> bool:
        return re.search(options.only, name) is not None

    def ready(parent: Path | None) -> list[Path]:
        return (
            sorted(p.parent for p in parent.glob("*/config.json") if wanted(p.parent.name)) if parent else []
        )

    write(environment())
    if options.speeds:
        found = {
            d.name: UPGModel.from_file(d) for d in (*ready(options.directory), *ready(options.recovered))
        }
        for row in speeds({"dense": dense, **found}):
            write(row)
        return

    encode = dense.encode
    articles = wikipedia(options.wheel)
    texts = {
        "wikipedia": spaced_windows(encode("\n\n".join(articles[::4]))),
        "handbook": spaced_windows(encode(handbook(options.package))),
    }
    calibration = Calibration.from_texts(
        [a for i, a in enumerate(articles) if i % 4], encode, source="gensim's Wikipedia articles"
    )

    def record(model: UPGModel, facts: dict[str, Any]) -> None:
        nll = {name: perplexity(model, ids, window=WINDOW).nll for name, ids in texts.items()}
        row = {**facts, **{name: math.exp(value) for name, value in nll.items()}}
        row["geometric_mean"] = math.exp(sum(nll.values()) / len(nll))
        if model is not dense:
            far = [compare(model, dense, ids[: COMPARED * WINDOW], window=WINDOW) for ids in texts.values()]
            row["kl"] = sum(f.kl for f in far) / len(far)
            row["agreement"] = sum(f.agreement for f in far) / len(far)
        write(row)

    if wanted("dense"):
        record(dense, {"name": "dense", "bits_per_weight": 32.0})
    for facts, model in peers(dense) if wanted("peer") else ():
        record(model, facts)
    for name, settings in SETTINGS.items():
        if wanted(name):
            directory = options.directory / name
            if not directory.exists():
                if "-allocated" in name:
                    settings = allocate(options.model, settings, calibration)
                calibrated = None if settings.method == "magnitude" else calibration
                compress_checkpoint(options.model, directory, settings, calibration=calibrated)
            record(UPGModel.from_file(directory), facts_of(directory, options.model))
    for directory in ready(options.recovered):
        record(UPGModel.from_file(directory), facts_of(directory, options.model))


if __name__ == "__main__":
    main()
