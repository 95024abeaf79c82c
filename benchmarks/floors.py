"""The project's promises of speed, each with what was measured.

    python -m benchmarks.floors RAW...

A floor without rows to tell is listed as not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks._rows import builds, read
from benchmarks._views import Compared, Row, compared, median, most_threads, of_topic, ours, times_as_fast

DENSE = "XLA dense float32"


@dataclasses.dataclass(frozen=True)
class Floor:
    """A promise.

    Attributes:
        text: what is promised.
        bound: the ratio (or time) it names.
        measured: from all rows, the values that each must keep within the bound.
        at_most: whether the bound is a ceiling.
    """

    text: str
    bound: float
    measured: Callable[[list[Row]], Iterator[Compared | None]]
    at_most: bool = False

    def verdict(self, rows: list[Row]) -> tuple[Compared | None, bool | None]:
        """The worst measured value, and whether it keeps within the bound."""
        values = [value for value in self.measured(rows) if value is not None]
        if not values:
            return None, None
        worst = max(values) if self.at_most else min(values)
        return worst, worst.value <= self.bound if self.at_most else worst.value >= self.bound


def _square(peer: str, **case: float) -> Callable[[list[Row]], Iterator[Compared | None]]:
    def measured(rows: list[Row]) -> Iterator[Compared | None]:
        for row in of_topic(rows, "product", rows=5120, columns=5120, **case):
            yield times_as_fast(row, peer, ours(row))

    return measured


def _every_density(shape: tuple[int, int], manifold: str) -> Callable[[list[Row]], Iterator[Compared | None]]:
    def measured(rows: list[Row]) -> Iterator[Compared | None]:
        for row in of_topic(rows, "product", rows=shape[0], columns=shape[1], batch=1):
            yield times_as_fast(row, DENSE, ours(row, manifold))

    return measured


def _prime(rows: list[Row]) -> Iterator[Compared | None]:
    for density in (0.1, 0.5):
        for row in of_topic(rows, "product", rows=5120, columns=5120, batch=1, density=density):
            yield times_as_fast(row, ours(row, "prime"), ours(row))


def _transposed(form: str) -> Callable[[list[Row]], Iterator[Compared | None]]:
    def measured(rows: list[Row]) -> Iterator[Compared | None]:
        for row in of_topic(rows, "transposed"):
            yield times_as_fast(row, f"{form}, transposed", form)

    return measured


def _packing(name: str) -> Callable[[list[Row]], Iterator[Compared | None]]:
    def measured(rows: list[Row]) -> Iterator[Compared | None]:
        for row in of_topic(rows, "pack"):
            yield times_as_fast(row, f"{name}, numpy.copyto", name)

    return measured


def _decode(manifold: str) -> Callable[[list[Row]], Iterator[Compared | None]]:
    def measured(rows: list[Row]) -> Iterator[Compared | None]:
        for row in of_topic(rows, "decode"):
            yield times_as_fast(row, "numpy.copyto", ours(row, manifold))

    return measured


def _overhead(rows: list[Row]) -> Iterator[Compared | None]:
    # A layer without entries does everything but the arithmetic, and wakes no other thread.
    for row in of_topic(rows, "overhead", rows=576, density=0.0):
        yield compared(lambda seconds: 1e6 * seconds, (row, ours(row)))


def _sharing(rows: list[Row]) -> Iterator[Compared | None]:
    # What one thread takes is arithmetic and a call; threads share the arithmetic and have to find together besides.
    threads = most_threads(rows) or 1
    for density in (0.1, 0.5):
        case = {"rows": 576, "density": density}
        alone = list(of_topic(rows, "overhead", threads=1, **case))
        for row in of_topic(rows, "overhead", **case) if alone and threads > 1 else ():
            both = median(row, ours(row)), median(alone[0], ours(row))
            if None not in both:
                beyond = 1e6 * (both[0] - both[1] / threads)
                yield Compared(beyond, None, None)  # of two runs, whose turns belong to different moments


def _imports(rows: list[Row]) -> Iterator[Compared | None]:
    for row in of_topic(rows, "imports"):
        names = ("import jax", "import jax, upg_jax")
        yield compared(lambda jax, upg: 1e3 * (upg - jax), *((row, name) for name in names))


def _reference(rows: list[Row]) -> Iterator[Compared | None]:
    for row in of_topic(rows, "reference", batch=1):
        yield times_as_fast(row, "BCSR", "unit reference")


def _generate(peer: str) -> Callable[[list[Row]], Iterator[Compared | None]]:
    def measured(rows: list[Row]) -> Iterator[Compared | None]:
        for row in of_topic(rows, "generate"):
            yield times_as_fast(row, peer, "unit 0.5")

    return measured


FLOORS = [
    Floor(
        "5120 x 5120, density 0.1, batch 1: times XLA's dense float32",
        6,
        _square(DENSE, density=0.1, batch=1),
    ),
    Floor("... times BCSR", 30, _square("BCSR", density=0.1, batch=1)),
    Floor("... times scipy's CSR", 3, _square("scipy CSR", density=0.1, batch=1)),
    Floor("density 0.5, batch 1: times dense", 3, _square(DENSE, density=0.5, batch=1)),
    Floor("density 0.1, batch 16: times dense", 2.5, _square(DENSE, density=0.1, batch=16)),
    Floor("density 0.1, batch 64: times dense", 2.5, _square(DENSE, density=0.1, batch=64)),
    Floor("density 0.5, batch 16: times dense", 1, _square(DENSE, density=0.5, batch=16)),
    Floor("density 0.5, batch 64: times dense", 1, _square(DENSE, density=0.5, batch=64)),
    *(
        Floor(
            f"{shape[0]} x {shape[1]}, {manifold}, every density, batch 1: times dense",
            1,
            _every_density(shape, manifold),
        )
        for manifold in ("unit", "prime")
        for shape in ((5120, 5120), (35840, 5120), (5120, 17920), (576, 576), (1536, 576))
    ),
    Floor("prime manifold, densities 0.1 and 0.5, batch 1: times unit's time", 1.5, _prime, at_most=True),
    *(
        Floor(f"transposed product, {form}: times the forward one's time", 2, _transposed(form), at_most=True)
        for form in ("unit delta8", "prime delta8", "unit mask", "unit dense")
    ),
    *(
        Floor(f"decode to dense float32, {manifold}: times numpy.copyto", 0.7, _decode(manifold))
        for manifold in ("unit", "prime")
    ),
    *(
        Floor(f"{name}: times numpy.copyto of as many bytes", 1, _packing(name))
        for name in ("pack to mask", "pack to dense", "unpack mask", "unpack dense")
    ),
    Floor("576 x 576 in a jitted chain, without entries: microseconds", 5, _overhead, at_most=True),
    Floor(
        "... at densities 0.1 and 0.5: microseconds beyond one thread's time, shared",
        5,
        _sharing,
        at_most=True,
    ),
    Floor("import upg_jax: milliseconds beyond jax", 50, _imports, at_most=True),
    Floor("the reference at one vector: times BCSR", 1.5, _reference),
    Floor(
        "SmolLM2-135M at density 0.5, tokens a second: times dense float32", 1.5, _generate("dense float32")
    ),
    Floor("... times llama.cpp Q8_0", 1, _generate("llama.cpp Q8_0")),
    Floor("... times llama.cpp Q4_0", 1, _generate("llama.cpp Q4_0")),
]


def table(rows: list[Row]) -> str:
    """All floors in Markdown; of several cases the worst counts. Least and greatest are of its single turns."""
    lines = ["| floor | promised | measured | least to greatest | |", "|---|---:|---:|---:|---|"]
    for floor in FLOORS:
        value, kept = floor.verdict(rows)
        promised = f"{'at most' if floor.at_most else 'at least'} {floor.bound:g}"
        figures = " | " if value is None else f"{value.value:.2f} | "
        if value is not None and value.least is not None:
            figures += f"{value.least:.2f} to {value.greatest:.2f}"
        said = {None: "not measured", True: "pass", False: "**miss**"}[kept]
        lines.append(f"| {floor.text} | {promised} | {figures} | {said} |")
    return "\n".join([*lines, "", builds(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", nargs="+", type=Path, metavar="RAW")
    print(table(read(parser.parse_args().raw)), end="")


if __name__ == "__main__":
    main()
