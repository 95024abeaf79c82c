"""Plots of raw rows: speed by density, roofline, scaling."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks._rows import median
from benchmarks._views import OURS, Row, bytes_per_second, most_threads, of_topic, ours, read_bandwidth

_PEERS = ("XLA dense float32", "torch dense bfloat16", "BCSR", "scipy CSR", "MKL CSR")


def draw(rows: list[Row], folder: Path) -> dict[str, str]:
    """Writes the plots that the rows suffice for; returns file names and titles."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "upg_jax"  # the same rows give the same bytes
    from matplotlib import pyplot

    written = {}
    for name, (title, plot) in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        if plot(axes, rows):
            axes.set_title(title, fontsize="medium")
            axes.grid(alpha=0.3)
            figure.legend(loc="outside right upper", fontsize="x-small")  # inside it would cover lines
            figure.savefig(folder / name, metadata={"Date": None})
            written[name] = title
        pyplot.close(figure)
    return written


def _tick(axes: Any, measured: set[int]) -> None:
    """Names what was measured on a logarithmic axis, instead of powers of ten."""
    axes.set_xticks(sorted(measured), labels=[f"{n:,}" for n in sorted(measured)])
    axes.set_xticks([], minor=True)


def _by_density(batch: int) -> Any:
    def plot(axes: Any, rows: list[Row]) -> bool:
        found = sorted(
            of_topic(rows, "product", rows=5120, columns=5120, batch=batch),
            key=lambda r: r["case"]["density"],
        )
        for name in (*OURS, *_PEERS):
            points = [(r["case"]["density"], 1e3 * s) for r in found if (s := median(r, name)) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), "o-" if name in OURS else "x--", label=name, markersize=4
                )
        axes.set(xlabel="density", ylabel="ms", yscale="log")
        return bool(found)

    return plot


def _roofline(axes: Any, rows: list[Row]) -> bool:
    bandwidth = read_bandwidth(rows)
    found = list(of_topic(rows, "product", rows=5120, columns=5120))
    highest = 0.0
    for name, marker in zip((*OURS[:3], "XLA dense float32"), "os^x", strict=True):
        points = []
        for row in found:
            if (rate := bytes_per_second(row, name)) is not None:
                # Two operations for each weight that a contender does not skip.
                weights = (
                    row["case"]["rows"] * row["case"]["columns"] if "dense" in name else row["case"]["nnz"]
                )
                work = 2 * weights * row["case"]["batch"]
                points.append((work / row["bytes"][name], work / row["bytes"][name] * rate / 1e9))
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=name, linestyle="", markersize=4)
            highest = max(highest, *(y for _, y in points))
    intensities = [0.25, max(1.0, highest / bandwidth * 1e9)]
    axes.plot(intensities, [i * bandwidth / 1e9 for i in intensities], "k-", lw=1, label="memory, read")
    axes.set(xlabel="operations per byte", ylabel="Gflop/s on stored weights", xscale="log", yscale="log")
    return bool(found)


def _rows_scaling(axes: Any, rows: list[Row]) -> bool:
    drawn = False
    for density, name in itertools.product((0.1, 0.5), OURS):
        found = sorted(of_topic(rows, "rows", density=density), key=lambda r: r["case"]["rows"])
        points = [
            (r["case"]["rows"], s * 1e9 / r["case"]["nnz"])
            for r in found
            if (s := median(r, name)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=f"{name}, {density}", markersize=4)
            drawn = True
    axes.set(xlabel="rows (of 5120 columns, batch 1)", ylabel="ns an entry", xscale="log")
    _tick(axes, {row["case"]["rows"] for row in of_topic(rows, "rows")})
    return drawn


def _batch_scaling(axes: Any, rows: list[Row]) -> bool:
    drawn = False
    for density in (0.1, 0.5):
        found = sorted(
            of_topic(rows, "product", rows=5120, columns=5120, density=density),
            key=lambda r: r["case"]["batch"],
        )
        for label, style, who in (
            ("packed", "o-", ours),
            ("XLA dense", "x--", lambda _: "XLA dense float32"),
        ):
            points = [
                (batch, 1e3 * s / batch)
                for r in found
                if (batch := r["case"]["batch"]) and (s := median(r, who(r))) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=f"{label}, {density}", markersize=4)
                drawn = True
    axes.set(xlabel="batch", ylabel="ms a vector", xscale="log", yscale="log")
    _tick(axes, {row["case"]["batch"] for row in of_topic(rows, "product", rows=5120, columns=5120)})
    return drawn


def _thread_scaling(axes: Any, rows: list[Row]) -> bool:
    counts = sorted({row["threads"] for row in rows if row["threads"]})
    if len(counts) < 2:
        return False
    for density, batch in itertools.product((0.1, 0.5), (1, 64)):
        for name in ("packed", "XLA dense float32"):
            points = []
            for threads in counts:
                case = {"rows": 5120, "columns": 5120, "density": density, "batch": batch, "threads": threads}
                for row in of_topic(rows, "product", **case):
                    seconds = median(row, ours(row) if name == "packed" else name)
                    points += [(threads, seconds)] if seconds else []
            if points:
                speedups = [(threads, points[0][1] / seconds) for threads, seconds in points]
                style = "o-" if name == "packed" else "x--"
                axes.plot(*zip(*speedups, strict=True), style, label=f"{name}, {density}, batch {batch}")
    axes.set(xlabel="threads", ylabel="times as fast as one", xticks=range(1, (most_threads(rows) or 1) + 1))
    return True


PLOTS = {
    "density-batch1.svg": ("5120 x 5120, one vector", _by_density(1)),
    "density-batch64.svg": ("5120 x 5120, 64 vectors", _by_density(64)),
    "roofline.svg": ("Roofline, 5120 x 5120, all densities and batches", _roofline),
    "rows.svg": ("Scaling with rows", _rows_scaling),
    "batches.svg": ("Scaling with the batch, 5120 x 5120", _batch_scaling),
    "threads.svg": ("Scaling with threads, 5120 x 5120", _thread_scaling),
}
