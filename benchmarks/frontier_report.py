"""Table and plot of the rows of `benchmarks.frontier`.

    python -m benchmarks.frontier_report rows.jsonl [-o DIRECTORY]

Writes DIRECTORY/frontier.svg and prints the table, by bits per weight.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import markdown
from upg_jax.cli._report_page import frontier

Row = dict[str, Any]


def models(rows: list[Row]) -> list[Row]:
    """A row for each model, by its size: of its quality, and its speed where that was measured."""
    found: dict[str, Row] = {}
    for row in rows:
        if "name" in row:
            model = found.setdefault(row["name"], {})
            if "recovered" in row and model.get("recovered", row["recovered"]) != row["recovered"]:
                raise ValueError(
                    f"rows: {row['name']!r} is a recovered model in one row and a one-shot model in another; rename "
                    "the directory of one and measure it again"
                )
            model.update(row)
    return sorted(
        (row for row in found.values() if "geometric_mean" in row), key=lambda r: r["bits_per_weight"]
    )


def kind(row: Row) -> str:
    """What a point of the plot is called."""
    if row["name"].startswith("peer"):
        return "dense, rounded, as llama.cpp's formats"
    if row["recovered"]:
        return "pruned and recovered"
    bits = next((bits for bits in (3, 4) if f"-{bits}-bit" in row["name"]), 8)
    if row["density"] == 1:
        return "dense, ours: " + ("rounded" if row["method"] == "magnitude" else "GPTQ")
    return f"pruned, {bits}-bit values"


def cells(row: Row, dense: Row) -> Iterator[str]:
    """A line of the table."""
    yield row["name"]
    yield f"{row['bits_per_weight']:.2f}"
    yield f"{32 / row['bits_per_weight']:.1f}"
    for name in ("wikipedia", "handbook", "geometric_mean"):
        yield f"{row[name]:.1f}" if row[name] < 1000 else f"{row[name]:,.0f}"
    yield f"{row['geometric_mean'] / dense['geometric_mean']:.2f}"
    yield f"{row['kl']:.3f}" if "kl" in row else "0"
    yield f"{row['agreement']:.1%}" if "agreement" in row else "100%"
    yield f"{row['weight_error']:.3f}" if "weight_error" in row else "0"
    yield f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else ""


def plot(found: list[Row], dense: Row, path: Path) -> None:
    """Perplexity against bits per weight."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "upg_jax"  # the same rows give the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    points = [row for row in found if row is not dense]
    for (name, group), marker in zip(
        itertools.groupby(sorted(points, key=kind), key=kind), itertools.cycle("xos^vDP"), strict=False
    ):
        xy = [(row["bits_per_weight"], row["geometric_mean"]) for row in group]
        axes.plot(*zip(*xy, strict=True), marker, label=name, markersize=6)
    best = frontier([(r["bits_per_weight"], r["geometric_mean"]) for r in points], more_is_better=False)
    axes.step(*zip(*best, strict=True), where="post", color="gray", linewidth=1, label="frontier", zorder=0)
    axes.axhline(dense["geometric_mean"], linestyle="--", color="black", linewidth=1, label="dense float32")
    axes.set(xlabel="bits per weight of the linear layers", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=Path())
    options = parser.parse_args()
    found = models([json.loads(line) for path in options.rows for line in path.read_text().splitlines()])
    dense = next((row for row in found if row["name"] == "dense"), None)
    if dense is None:
        raise SystemExit("frontier_report: the rows must have one of the dense model's quality; got none")
    options.out.mkdir(parents=True, exist_ok=True)
    plot(found, dense, options.out / "frontier.svg")
    header = (
        *("model", "bits per weight", "smaller than float32", "Wikipedia", "handbook", "geometric mean"),
        *("times dense", "KL", "same token", "weight error", "tokens/s"),
    )
    print(markdown(header, (cells(row, dense) for row in found)))


if __name__ == "__main__":
    main()
