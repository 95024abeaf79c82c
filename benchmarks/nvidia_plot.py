"""Plot of the rows of `benchmarks.nvidia`: time of a product against density.

    python -m benchmarks.nvidia_plot rows.jsonl.gz... --out density.svg

Of 5120 x 5120, unit manifold, bfloat16: one vector and eight, beside cuBLAS (by JAX) with as many.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

SHAPE = (5120, 5120)


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """The products of the plot."""
    rows = [json.loads(line) for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]
    return [
        row
        for row in rows
        if (row.get("rows"), row.get("columns")) == SHAPE and row["topic"] in ("product", "batches")
    ]


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "upg_jax"  # the same rows give the same bytes
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = read(options.rows)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for vectors, color, contender in ((1, "tab:blue", "upg_jax auto"), (8, "tab:orange", "upg_jax sparse")):
        of_these = [row for row in found if row["batch"] == vectors]
        points = sorted(
            (row["density"], row["microseconds"])
            for row in of_these
            if (row["contender"], row.get("manifold"), row.get("dtype")) == (contender, "unit", "bfloat16")
        )
        name = f"{vectors} vector{'s' * (vectors > 1)}"
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=f"upg_jax, {name}")
        (dense,) = (row["microseconds"] for row in of_these if row["contender"] == "cuBLAS bf16 (jax)")
        axes.axhline(dense, linestyle="--", color=color, label=f"cuBLAS bfloat16, {name}")
    axes.set(xlabel="density", ylabel="microseconds", ylim=(0, None), xlim=(0, 0.6))
    axes.set_title(f"{SHAPE[0]} x {SHAPE[1]}, {found[0]['gpu']}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
