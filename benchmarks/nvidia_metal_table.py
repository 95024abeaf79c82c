"""Rows of `benchmarks/nvidia_metal_kernels.py` as Markdown tables.

python benchmarks/nvidia_metal_table.py docs/results/2026-11-23-h100-metal-kernels.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DEFAULTS = "LANE_ENTRIES"  # rows of a sweep name their macros; rows of the kernels as they are do not
PRODUCTS = {
    "sparse_matvec_simd": "one simdgroup a row",
    "sparse_matvec_shared": "the vector in threadgroup memory",
    "sparse_matvec": "one thread a row",
}


def read(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    lines = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in lines.splitlines()]


def cell(rows: Iterable[dict[str, Any]]) -> str:
    """Time of the fastest of `rows`, and its share of the bandwidth of a copy."""
    best = min(rows, key=lambda row: row["microseconds"], default=None)
    return f"{best['microseconds']:.1f} ({best['fraction_of_bandwidth']:.2f})" if best else ""


def tables(rows: list[dict[str, Any]]) -> Iterable[str]:
    first = rows[0]
    checks = [row for row in rows if row["kind"] == "check"]
    bandwidth = next(row for row in rows if row["kind"] == "bandwidth")
    failed = sum(not row["ok"] for row in checks)
    worst = max(row.get("error_over_bound", 0) for row in checks)
    yield f"{first['gpu']}, {first['architecture']}, NVRTC {first['nvrtc']}; a copy moves"
    yield f"{bandwidth['gigabytes_per_second']:.0f} GB/s. {len(checks)} checks against NumPy, {failed} failed; largest"
    yield f"error {worst:.2f} of the bound.\n"
    yield "Batch 1, bfloat16, microseconds (share of the copy's bandwidth), planes from memory, not from the cache:\n"
    yield f"| shape | density | manifold | {' | '.join(PRODUCTS.values())} | fastest macros, first kernel |"
    yield f"|---|---:|---|{'---:|' * (len(PRODUCTS) + 1)}"
    timed = [row for row in rows if row["kind"] == "time" and row.get("align", 1) == 1]
    for case in dict.fromkeys((r["rows"], r["columns"], r["density"], r["manifold"]) for r in timed):
        these = [r for r in timed if (r["rows"], r["columns"], r["density"], r["manifold"]) == case]
        ours = [r for r in these if r.get("dtype") == "bfloat16" and r.get("vectors") == 1]
        cells = [cell(r for r in ours if r["kernel"] == name and DEFAULTS not in r) for name in PRODUCTS]
        cells.append(cell(r for r in ours if r["kernel"] == "sparse_matvec_simd"))
        yield f"| {case[0]} x {case[1]} | {case[2]} | {case[3]} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    print("\n".join(tables(read(parser.parse_args().rows))))


if __name__ == "__main__":
    main()
