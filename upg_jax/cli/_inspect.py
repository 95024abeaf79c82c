"""`upg-jax inspect` and `upg-jax verify`: what a UPG file holds, and whether it is whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from upg_jax.io import TensorInfo

FileArgument = Annotated[
    Path, typer.Argument(help="A UPG file, a directory with one, or a sharded file's index.json.")
]


def inspect(
    path: FileArgument,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Lists a UPG file's tensors with their sizes, from the header alone."""
    from upg_jax.cli._output import human_bytes, print_json, print_table, printable, stdout
    from upg_jax.io import UPGDecompressor

    with UPGDecompressor.from_safetensors(path) as f:
        infos = [f.info(name) for name in f.names()]
        summary = summarize(infos)
        if json:
            tensors = [{**dataclasses.asdict(i), "bits_per_weight": i.bits_per_weight} for i in infos]
            print_json({"summary": summary, "tensors": tensors, "provenance": f.provenance})
            return
    from rich.table import Table

    table = Table()
    table.add_column("tensor", overflow="fold")
    for header in ("shape", "dtype", "manifold", "index", "values"):
        table.add_column(header)
    for header in ("density", "bits per weight", "stored"):
        table.add_column(header, justify="right")
    for i in infos:
        table.add_row(
            printable(i.name),
            " x ".join(map(str, i.shape)),
            i.dtype,
            i.manifold or "dense",
            i.index or "",
            "" if i.value_bits is None else _bits(i),
            "" if i.true_nnz is None else f"{i.true_nnz / max(i.num_weights, 1):.3f}",
            f"{i.bits_per_weight:.2f}",
            human_bytes(i.stored_bytes),
        )
    print_table(table)
    line = f"{summary['tensors']} tensors, {human_bytes(summary['stored_bytes'])}"
    for index, found in summary["by_index"].items():
        line += (
            f"; {found['matrices']} compressed with index {index} at density {found['density']:.3f}, "
            f"{found['bits_per_weight']:.2f} bits per weight"
        )
    stdout.print(line, soft_wrap=True)


def summarize(infos: Sequence[TensorInfo]) -> dict[str, Any]:
    """Sizes over a file's tensors; density and bits per weight of the compressed ones by index, all planes counted."""
    by_index: dict[str, list[TensorInfo]] = {}
    for info in infos:
        if info.index is not None:
            narrow = "" if info.value_bits == 8 else f" and {_bits(info)}"
            by_index.setdefault(info.index + narrow, []).append(info)
    return {
        "tensors": len(infos),
        "compressed": sum(map(len, by_index.values())),
        "stored_bytes": sum(i.stored_bytes for i in infos),
        "by_index": {index: _totals(found) for index, found in by_index.items()},
    }


def _bits(info: TensorInfo) -> str:
    groups = "" if info.group_size is None else f" in groups of {info.group_size}"
    return f"{info.value_bits} bits{groups}"


def _totals(infos: Sequence[TensorInfo]) -> dict[str, Any]:
    weights = max(sum(i.num_weights for i in infos), 1)
    return {
        "matrices": len(infos),
        "density": sum(i.true_nnz or 0 for i in infos) / weights,
        "bits_per_weight": 8 * sum(i.stored_bytes for i in infos) / weights,
    }


def verify(path: FileArgument) -> None:
    """Checks every rule of the format on every entry; exits with 1 and names the first that is broken."""
    from upg_jax.cli._output import status, stdout
    from upg_jax.io import UPGDecompressor

    with UPGDecompressor.from_safetensors(path) as f, status("verifying") as update:
        f.verify(progress=lambda name: update(f"verifying {name}"))
        count = len(f.names())
    stdout.print(f"{path}: {count} tensors are valid", soft_wrap=True)
