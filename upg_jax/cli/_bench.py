"""`upg-jax bench`: how fast compressed layers are on this machine, in under a minute."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import jax

    from upg_jax._mdcsr import MdCSR

_DENSITIES = (0.1, 0.3, 0.5, 1.0)
_BATCHES = (1, 16, 64)
_REPEATS = 15
_BUDGET = 0.25
# Copies of a layer that are used in turn add up to this, so that each call reads from memory, as in a model; a matrix
# so small that more copies would be needed comes from a cache.
_COLD_BYTES = 64 << 20
_MOST_COPIES = 32


def bench(
    size: Annotated[int, typer.Option(min=64, help="Rows and columns of the matrix.")] = 4096,
    json: Annotated[bool, typer.Option("--json", help="Print machine and measurements as JSON.")] = False,
) -> None:
    """Times sparse_dense against XLA's dense float32 product, and says what share of the memory bandwidth it takes.

    benchmarks/ in the sources measures more shapes, against more libraries.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from upg_jax.cli._output import print_json, stderr

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows = []
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("memory bandwidth", total=1 + len(_DENSITIES) * len(_BATCHES))
        machine = describe_machine()
        bar.advance(task)
        for row in measure(size, machine["read_bytes_per_second"], functools.partial(bar.update, task)):
            rows.append(row)
            bar.advance(task)
    if json:
        print_json({"machine": machine, "rows": rows})
    else:
        _print(machine, rows)


def describe_machine() -> dict[str, Any]:
    """Processor, threads, kernels and the memory's bandwidth."""
    import jax

    from upg_jax._sparse_dense import choose_backend
    from upg_jax.cli._doctor import collect
    from upg_jax.cli._measure import bandwidth, usable_threads

    backend, reason = choose_backend(jax.default_backend())
    measured = bandwidth()
    return {
        "processor": collect()["machine"]["processor"],
        "platform": jax.default_backend(),
        "threads": usable_threads(),
        "backend": backend,
        "because": reason,
        "jax": jax.__version__,
        "read_bytes_per_second": measured["read"],
        "copy_bytes_per_second": measured["copy"],
    }


def measure(size: int, read_bandwidth: float, progress: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """Times one product with a packed layer and with the same weights dense, for each density and batch.

    Args:
        size: rows and columns.
        read_bandwidth: bytes a second.
        progress: called with `description=` before each case.

    Yields:
        Medians in seconds, their ratio, and the share of the bandwidth that the layer's product took.
    """
    import jax.numpy as jnp
    import numpy as np

    from upg_jax._mdcsr import MdCSR
    from upg_jax._pack import pack
    from upg_jax._sparse_dense import sparse_dense
    from upg_jax.cli._measure import quartiles, take_turns

    rng = np.random.default_rng(0)
    w = rng.standard_normal((size, size), dtype=np.float32)
    for density in _DENSITIES:
        progress(description=f"density {density}: encoding")
        layer = pack(MdCSR.from_dense(w, density=density))
        dense = layer.to_dense(jnp.float32)
        for batch in _BATCHES:
            progress(description=f"density {density}, batch {batch}")
            x = jnp.asarray(rng.standard_normal((size,) if batch == 1 else (batch, size), dtype=np.float32))
            # For XLA the weights lie as its fastest product wants them.
            one = batch == 1
            product = (lambda x, w: w @ x) if one else (lambda x, w: x @ w)
            seconds = take_turns(
                {
                    "upg": _calls(sparse_dense, x, layer),
                    "dense": _calls(product, x, dense if one else jnp.asarray(dense.T)),
                },
                _REPEATS,
                _BUDGET,
            )
            upg, reference = (quartiles(seconds[name])[1] for name in ("upg", "dense"))
            yield {
                "size": size,
                "density": density,
                "batch": batch,
                "index": layer.index,
                "bits_per_weight": layer.bits_per_weight,
                "seconds": upg,
                "dense_seconds": reference,
                "speedup": reference / upg,
                "bandwidth_share": (layer.nbytes + 2 * x.nbytes) / upg / read_bandwidth,
            }


def _calls(f: Callable[..., jax.Array], x: jax.Array, weights: MdCSR | jax.Array) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    compiled = jax.jit(f).lower(x, weights).compile()
    count = min(-(-_COLD_BYTES // weights.nbytes), _MOST_COPIES)
    copies = itertools.cycle([weights, *(jax.tree.map(jnp.array, weights) for _ in range(count - 1))])
    return lambda: jax.block_until_ready(compiled(x, next(copies)))


def _print(machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from upg_jax.cli._output import print_table, stdout

    size = rows[0]["size"]
    table = Table(title=f"{size} x {size}, float32 activations", title_justify="left")
    for header in ("density", "bits per weight", "batch", "ms", "dense ms", "times as fast", "of bandwidth"):
        table.add_column(header, justify="right")
    table.add_column("index")
    for row in rows:
        table.add_row(
            f"{row['density']}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['batch']}",
            f"{1e3 * row['seconds']:.3f}",
            f"{1e3 * row['dense_seconds']:.3f}",
            f"{row['speedup']:.2f}",
            f"{row['bandwidth_share']:.0%}",
            row["index"],
        )
    print_table(table)
    stdout.print(
        f"{machine['processor']}, {machine['threads']} threads, jax {machine['jax']}; sparse_dense runs "
        f"{machine['backend']}: {machine['because']}. Memory is read at "
        f"{machine['read_bytes_per_second'] / 1e9:.1f} GB/s and copied at "
        f"{machine['copy_bytes_per_second'] / 1e9:.1f} GB/s (both directions counted). Medians of up to {_REPEATS} "
        "repeats in turns; dense is XLA's product with the same weights in float32."
    )
