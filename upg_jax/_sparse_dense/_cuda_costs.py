"""What a product costs on an NVIDIA GPU, in microseconds, as a walk over the entries and as a product of dense levels.

The constants are a least-squares fit to products on an H100 (`python -m benchmarks.nvidia_auto --fit`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import metal_ops

Kind: TypeAlias = Literal["narrow", "three", "float32"]


class Walk(NamedTuple):
    """Microseconds of walking the planes: once for as many vectors as are taken at a time."""

    start: float  # once
    of_rows: float  # a thousand
    of_columns: float  # a thousand, of one tile
    of_entries: float  # a million
    tiles: float  # how much longer a pass takes that has tiles of columns


class Levels(NamedTuple):
    """Microseconds of making dense levels and multiplying them."""

    start: float
    of_weights: float  # a million
    of_entries: float  # a million
    of_products: float  # a million weights times vectors


# Float32 vectors meet narrow levels as three bfloat16 ones; levels of the prime manifold are float32.
WALK: dict[Kind, Walk] = {
    "narrow": Walk(2.7, 0.3, 1.2, 2.5, 1.4),
    "three": Walk(2.9, 0.23, 0.68, 2.6, 1.3),
    "float32": Walk(4.2, 0.34, 1.1, 3.1, 1.5),
}
LEVELS: dict[Kind, Levels] = {
    "narrow": Levels(5.5, 1.5, 2.0, 0.0018),
    "three": Levels(10.0, 1.5, 1.9, 0.0046),
    "float32": Levels(8.2, 3.1, 5.0, 0.042),
}


def kind_of(work: metal_ops.Work) -> Kind:
    """Returns which constants hold for a product."""
    if work.manifold == "prime":
        return "float32"
    return "three" if work.dtype == "float32" else "narrow"


def walk_microseconds(work: metal_ops.Work, plan: metal_ops.Plan, costs: Walk) -> float:
    """Returns what a product by `plan` takes."""
    a_pass = costs.of_rows * work.rows * 1e-3 + costs.of_entries * work.capacity * 1e-6
    a_pass += costs.of_columns * work.columns / plan.parts * 1e-3
    return costs.start + work.groups * passes(plan) * a_pass * (costs.tiles if plan.parts > 1 else 1)


def levels_microseconds(work: metal_ops.Work, costs: Levels) -> float:
    """Returns what dense levels and their product take."""
    weights = work.rows * work.columns * 1e-6
    made = costs.of_weights * weights + costs.of_entries * work.capacity * 1e-6
    return costs.start + work.groups * (made + costs.of_products * weights * work.vectors)


def passes(plan: metal_ops.Plan) -> int:
    """Returns how often the planes are read."""
    return math.ceil(plan.steps[0].threadgroups[1] / plan.parts)
