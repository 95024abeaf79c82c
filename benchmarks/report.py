"""Tables and plots from raw rows.

    python -m benchmarks.report RAW... -o DIR

Writes DIR/report.md and the plots it shows. Ratios are of medians; above 1 the compressed layer is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import _plots, floors
from benchmarks._rows import builds, median, quartiles, read
from benchmarks._views import (
    OURS,
    Row,
    bytes_per_second,
    of_topic,
    ours,
    read_bandwidth,
    times_as_fast,
)

SHOWN = ("rows", "columns", "density", "batch", "tokens")


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table; every column after the first is aligned right."""
    header = list(header)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *map(list, lines))) + "\n"


def times(value: float | None) -> str:
    """A ratio, to three digits."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def milliseconds(row: Row, name: str) -> str:
    """Median and quartiles."""
    seconds = row["seconds"].get(name)
    if not seconds:
        return ""
    low, middle, high = (1e3 * q / row["per call"].get(name, 1) for q in quartiles(seconds))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def sections(rows: list[Row]) -> Iterator[tuple[str, str]]:
    """Titles and texts of the report."""
    yield "Machine", "\n".join(machine(rows)) + "\n\n" + builds(rows)
    yield "Floors", floors.table(rows)
    shapes = dict.fromkeys((r["case"]["rows"], r["case"]["columns"]) for r in of_topic(rows, "product"))
    for shape in shapes:
        yield f"Products, {shape[0]} x {shape[1]}", products(rows, *shape)
    simple = {
        "forms": "The forms of a layer, around where pack changes",
        "transposed": "Transposed product",
        "decode": "Decoding to dense float32",
        "overhead": "Calls in a chain",
        "pack": "Packing and checking",
        "imports": "Starting",
        "step": "A decoding step",
        "reference": "The reference",
        "generate": "SmolLM2-135M-Instruct, tokens a second",
    }
    for topic, title in simple.items():
        if text := plain(rows, topic):
            yield title, text


def machine(rows: list[Row]) -> Iterator[str]:
    """What was measured where, a line for each run."""
    for row in rows:
        if row["topic"] == "environment":
            versions = {**row["versions"], **row["peers"]}
            yield (
                f"- {row['date']}, commit {row['commit']}: {row['machine']['processor']}, {row['threads']} threads, "
                f"kernels {row['kernels']}, {row['machine']['system']}; load {row['load'][0]:.1f} when it began. "
                + ", ".join(f"{name} {version}" for name, version in versions.items())
            )
    yield ""
    yield (
        f"Memory, read by all threads: {read_bandwidth(rows) / 1e9:.1f} GB/s, the median of the runs. Medians of "
        "interleaved repeats in one process. Matrices are read from memory: copies in turn overflow the caches."
    )


def products(rows: list[Row], height: int, width: int) -> str:
    """Our time, and how many times as fast as each peer that is."""
    found = list(of_topic(rows, "product", rows=height, columns=width))
    peers = list(dict.fromkeys(name for row in found for name in row["seconds"] if name not in OURS))
    bandwidth = read_bandwidth(rows)
    mine = [name for name in OURS if any(name in row["seconds"] for row in found)]
    header = ["batch, density", *(f"{name}, ms" for name in mine), "pack takes", "of bandwidth", *peers]
    lines = []
    for row in sorted(found, key=lambda r: (r["case"]["batch"], r["case"]["density"])):
        rate = bytes_per_second(row, ours(row))
        lines.append(
            [
                f"{row['case']['batch']}, {row['case']['density']}",
                *(times(None if (s := median(row, name)) is None else 1e3 * s) for name in mine),
                row["case"]["pack"]["unit"],
                "" if rate is None else f"{rate / bandwidth:.0%}",
                *(
                    times(found and found.value)
                    for found in (times_as_fast(row, peer, ours(row)) for peer in peers)
                ),
            ]
        )
    note = "Under the peers' names: how many times as fast the unit layer is in the form that `pack` takes.\n"
    return note + "\n" + markdown(header, lines) + skipped(found)


def skipped(found: list[Row]) -> str:
    """Who did not run, and why."""
    reasons: dict[tuple[str, str], int] = {}
    for row in found:
        for name, reason in row["skipped"].items():
            reasons[name, reason] = reasons.get((name, reason), 0) + 1
    if not reasons:
        return ""
    return "\nLeft out: " + "; ".join(f"{n} ({why}; {k} cases)" for (n, why), k in reasons.items()) + ".\n"


def plain(rows: list[Row], topic: str) -> str:
    """A table of a topic's contenders in milliseconds, a line for each case."""
    found = list(of_topic(rows, topic))
    names = list(dict.fromkeys(name for row in found for name in row["seconds"]))
    lines = []
    for row in found:
        case = ", ".join(f"{key} {value}" for key, value in row["case"].items() if key in SHOWN)
        lines += [[case, name, milliseconds(row, name)] for name in names if name in row["seconds"]]
    return markdown(["case", "what", "ms: median (quartiles)"], lines) if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", nargs="+", type=Path, metavar="RAW", help="files of rows, plain or gzipped")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    rows = read(arguments.raw)
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = _plots.draw(rows, arguments.out)
    parts = ["# CPU benchmarks\n", *(f"![{title}]({name})\n" for name, title in figures.items())]
    parts += [f"## {title}\n\n{text}" for title, text in sections(rows)]
    (arguments.out / "report.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
