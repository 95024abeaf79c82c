"""`upg-jax convert`: a version 1 pickle becomes a version 2 file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source_file: Annotated[Path, typer.Argument(metavar="OLD.upg", help="A version 1 file.")],
    destination: Annotated[
        Path, typer.Argument(metavar="NEW.safetensors", help="The version 2 file to write.")
    ],
    source: Annotated[
        Path | None,
        typer.Option(help="The original checkpoint, for a file that is a catalogue without weights."),
    ] = None,
    manifold: Annotated[
        str, typer.Option(help="What sparse float matrices are encoded to: unit or prime.")
    ] = "unit",
    force: Annotated[bool, typer.Option("--force", help="Replace NEW.safetensors if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Converts a version 1 file, without running the pickle's code, and verifies the result."""
    import dataclasses

    from upg_jax.cli._output import human_bytes, print_json, status, stderr, stdout
    from upg_jax.io import convert_v1, open_checkpoint

    stderr.print(f"{source_file}: reading it whole needs {human_bytes(source_file.stat().st_size)} of memory")
    with status("reading") as update:
        report = convert_v1(
            source_file,
            destination,
            source=None if source is None else open_checkpoint(source),
            manifold=manifold,  # type: ignore[arg-type]
            progress=lambda what, done, total: update(f"{what} ({done} of {total})"),
            force=force,
        )
    if json:
        print_json(dataclasses.asdict(report))
        return
    stdout.print(
        f"{destination}: {report.compressed} compressed and {report.dense} dense tensors, "
        f"{human_bytes(report.source_bytes)} -> {human_bytes(report.written_bytes)}, verified against the input",
        soft_wrap=True,
    )
