"""What the choice of `auto` on NVIDIA GPUs is worth, from rows of `benchmarks.nvidia --topics batches`.

    python -m benchmarks.nvidia_auto rows.jsonl... [--fit]

Prints each product where the way taken was slower than the other one, and from how many vectors on dense levels are
taken. With `--fit` it prints the constants of `_cuda_costs` that fit the rows best, in relative terms. It needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import metal_ops
from upg_jax._sparse_dense import _cuda_costs as costs
from upg_jax._sparse_dense._cuda_lowering import dense_is_faster

SHARED_MEMORY = 227 << 10  # bytes of a threadgroup on an H100


class Product(NamedTuple):
    """A measured product, in microseconds."""

    work: metal_ops.Work
    density: float
    sparse: float
    dense: float

    @property
    def loss(self) -> float:
        """How many times as long the way that `auto` takes was, beside the other one."""
        ratio = self.dense / self.sparse
        return ratio if dense_is_faster(self.work) else 1 / ratio


def plan(work: metal_ops.Work) -> metal_ops.Plan:
    found = metal_ops.stream_plan(work, SHARED_MEMORY)
    assert found is not None
    return found


def work_of(row: dict[str, Any], vectors: int) -> metal_ops.Work:
    return metal_ops.Work(
        operation="product", rows=row["rows"], columns=row["columns"],
        capacity=int(row["rows"] * row["columns"] * row["density"]), layers=4, groups=1, vectors=vectors,
        manifold=row["manifold"], dtype=row["dtype"],
    )  # fmt: skip


def products(paths: list[Path]) -> Iterator[Product]:
    """Those of which both ways were measured."""
    found: dict[Any, dict[str, float]] = {}
    for path in paths:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if row["topic"] == "batches" and "density" in row and "microseconds" in row:
                    way = row["contender"].split()[-1]
                    key = work_of(row, row["batch"]), row["density"]
                    found.setdefault(key, {})[way] = row["microseconds"]
    for (work, density), ways in found.items():
        if len(ways) == 2:
            yield Product(work, density, **ways)


def crossover(work: metal_ops.Work) -> int | None:
    """The number of vectors from which on, up to 512, products take dense levels."""
    # Within a pass a walk costs the same and levels ever more: what decides is the end of a pass, of 8 or 16 vectors.
    walks = [n for n in range(0, 513, 8) if not dense_is_faster(dataclasses.replace(work, vectors=max(n, 1)))]
    return None if walks[-1] == 512 else walks[-1] + 1


def fitted(kind: costs.Kind, measured: list[Product]) -> None:
    """Prints the constants whose figures are nearest to the measured ones in relative terms, outliers counting less."""
    from scipy.optimize import least_squares

    def constants(start: Any, predict: Callable[[Product, Any], float], way: str) -> Any:
        def errors(logs: np.ndarray) -> list[float]:
            now = type(start)(*np.exp(logs))
            return [np.log(predict(p, now) / getattr(p, way)) for p in measured]

        fit = least_squares(errors, np.log(start), loss="soft_l1", f_scale=0.1)
        off = np.exp(np.abs(errors(fit.x)))
        print(f"{kind} {way}: within {np.median(off) - 1:.0%} (median), {off.max() - 1:.0%} (most)")
        return type(start)(*(float(f"{value:.2g}") for value in np.exp(fit.x)))

    print(
        constants(
            costs.WALK[kind], lambda p, now: costs.walk_microseconds(p.work, plan(p.work), now), "sparse"
        )
    )
    print(constants(costs.LEVELS[kind], lambda p, now: costs.levels_microseconds(p.work, now), "dense"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    measured = list(products(options.rows))
    mean = np.exp(np.mean([np.log(max(p.loss, 1)) for p in measured]))
    print(
        f"{len(measured)} products measured both ways; the way taken costs {mean:.4f} times the faster; slower were:"
    )
    for p in sorted(measured, key=lambda p: -p.loss):
        if p.loss > 1:
            w = p.work
            print(
                f"  {p.loss:.2f} times  {w.rows} x {w.columns} at {p.density}, {w.manifold}, {w.dtype}, {w.vectors} "
                f"vectors: sparse {p.sparse:.1f}, dense {p.dense:.1f} microseconds"
            )
    print("dense levels from how many vectors on:")
    for key in dict.fromkeys((dataclasses.replace(p.work, vectors=1), p.density) for p in measured):
        work, density = key
        print(
            f"  {work.rows} x {work.columns} at {density}, {work.manifold}, {work.dtype}: "
            f"{crossover(work) or 'never up to 512'}"
        )
    if options.fit:
        for kind in costs.WALK:
            fitted(kind, [p for p in measured if costs.kind_of(p.work) == kind])


if __name__ == "__main__":
    main()
