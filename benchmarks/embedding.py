"""What int8 rows do to the perplexity of a model whose embedding and head they become.

    python -m benchmarks.embedding MODEL --out rows.jsonl [--text FILE ...] [--windows 20] [--window 512]

MODEL is anything that `UPGModel.from_file` opens with a float embedding; without a text, the demo's. Both models see
the same windows, so that the difference is known far better than either value. A row is a text, with the negative
log-likelihood of every window.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._rows import Writer, environment
from upg_jax import MdCSR
from upg_jax.cli._demo import demo_text
from upg_jax.inference import UPGModel, perplexity


def with_int8_rows(model: UPGModel) -> UPGModel:
    """The model with its embedding, and its head if it has one, rounded as `upg-jax compress` does."""
    names = [name for name in ("embed_tokens", "lm_head") if name in model.params]
    rounded = {name: MdCSR.from_dense(np.asarray(model.params[name])).to_dense() for name in names}
    return dataclasses.replace(model, params={**model.params, **rounded})


def measure(models: dict[str, UPGModel], text: str, windows: int, window: int) -> dict[str, Any]:
    """Negative log-likelihood per token of every window, under each model."""
    tokenizer = next(iter(models.values())).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(text)[: windows * window]
    parts = [ids[i : i + window] for i in range(0, len(ids) - 1, window)]
    nll = {name: [perplexity(m, part, window=window).nll for part in parts] for name, m in models.items()}
    return {"tokens": len(ids), "window": window, "nll": nll}


def summary(row: dict[str, Any]) -> str:
    """One line: both perplexities, and their ratio with its standard error over windows."""
    before, after = row["nll"].values()
    change = [b - a for a, b in zip(before, after, strict=True)]
    error = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else float("nan")
    values = " -> ".join(f"{np.exp(statistics.fmean(nll)):.3f}" for nll in (before, after))
    return (
        f"{row['text']}: perplexity {values}, {100 * np.expm1(statistics.fmean(change)):+.3f}% "
        f"(standard error {100 * error:.3f}%), {len(change)} windows of {row['window']} tokens"
    )


def main() -> None:
    """Measures every text and prints a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    options = parser.parse_args()
    model = UPGModel.from_file(options.model)
    if any(isinstance(model.params.get(name), MdCSR) for name in ("embed_tokens", "lm_head")):
        sys.exit(
            f"{options.model}: its embedding or head is compressed already; give a model with float ones"
        )
    models = {"float": model, "int8 rows": with_int8_rows(model)}
    texts = {path.name: path.read_text("utf-8") for path in options.text} or {"jargon file": demo_text()}
    writer = Writer(options.out)
    writer.write(environment(model=Path(options.model).name))
    for name, text in texts.items():
        row = {"topic": "embedding", "text": name, **measure(models, text, options.windows, options.window)}
        writer.write(row)
        print(summary(row), flush=True)


if __name__ == "__main__":
    main()
