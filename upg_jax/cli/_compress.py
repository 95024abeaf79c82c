"""`upg-jax compress`: a checkpoint becomes a directory with a UPG file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from upg_jax.compress import Calibration, Plan, Progress, Report, Settings, TensorPlan, TensorReport
    from upg_jax.io import Checkpoint


def compress(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A Hugging Face directory or a GGUF file.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    density: Annotated[
        float, typer.Option(help="Fraction of each matrix's weights to keep, 0 to 1; 1 prunes nothing.")
    ],
    manifold: Annotated[
        str, typer.Option(help="unit (int8, 2 bytes an entry) or prime (nearly exact, 4 bytes an entry).")
    ] = "unit",
    method: Annotated[
        str,
        typer.Option(
            help="How the weights to keep are chosen: magnitude, or with calibration wanda or sparsegpt, which also "
            "adjusts those that are kept."
        ),
    ] = "magnitude",
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Where the density is met: layer, row, or N:M (such as 2:4 at density 0.5). By default layer for "
            "magnitude, row for the others.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text for wanda, sparsegpt and --allocate: a UTF-8 file, a directory of .txt files, or a Hugging Face "
            "data set on disk. Default: entries of the Jargon File; text like what the model is for does better.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="Column of a data set that has the text.")] = "text",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to calibrate on.")] = 64,
    window: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of windows.")] = 0,
    allocate: Annotated[
        bool,
        typer.Option(
            "--allocate",
            help="Measure what pruning each matrix costs and share the density out by that. A better model, as many "
            "weights; decodes somewhat slower.",
        ),
    ] = False,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=DENSITY for the tensors a regular expression is found in; the first wins."
        ),
    ] = None,
    keep_dense: Annotated[
        list[str] | None,
        typer.Option(
            help="Regular expression of tensors to leave as they are; before every --rule. Norms and biases "
            "stay as they are unless a rule matches."
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            help="What becomes of the token embedding and the head: int8 (rows, unpruned) or float (as they "
            "are). By default int8 on the unit manifold, float on the prime manifold.",
            show_default=False,
        ),
    ] = None,
    pack: Annotated[
        bool,
        typer.Option(
            "--pack",
            help="Store each matrix in the form that is smallest at its density, and fast on a CPU as it lies.",
        ),
    ] = False,
    value_bits: Annotated[
        int,
        typer.Option(
            help="Bits of a kept weight: 8, or 4 or 3 with a multiplier for each group of columns; each matrix is then "
            "stored in the form that is smallest at its density."
        ),
    ] = 8,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns of a group with --value-bits 4 or 3: 32, 64 or 128. Default: 64.",
            show_default=False,
        ),
    ] = None,
    spill: Annotated[
        bool, typer.Option("--spill", help="Keep calibration's activations in files instead of in memory.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sizes and stop.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted run's work.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a compressed model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Prunes and quantizes a checkpoint's linear layers, tensor by tensor.

    Interrupted, the same command goes on where it stopped; OUT appears when it is complete.
    """
    from rich.text import Text

    from upg_jax._errors import EncodingError
    from upg_jax.cli._output import bytes_progress, print_json, stderr
    from upg_jax.compress import CALIBRATED, Rule, Settings, compress_checkpoint, plan
    from upg_jax.compress._pipeline import check_destination
    from upg_jax.io import open_checkpoint

    rules = [Rule.keep_dense(pattern) for pattern in keep_dense or []] + [
        Rule.parse(text) for text in rule or []
    ]
    settings = Settings(
        density=density,
        manifold=manifold,  # type: ignore[arg-type]
        method=method,  # type: ignore[arg-type]
        pattern=pattern,
        rules=tuple(rules),
        embedding=embedding,  # type: ignore[arg-type]
        pack=pack,
        value_bits=value_bits,
        group_size=group_size,
    )
    checkpoint = open_checkpoint(source)
    tokens = None
    if allocate or (method in CALIBRATED and not dry_run):
        tokens = _calibration(checkpoint, calibration, column, windows, window, seed)
        if len(tokens.ids) < windows:
            stderr.print(
                f"the text has {len(tokens.ids)} windows of {window} tokens; {windows} were asked for"
            )
    elif calibration is not None and method not in CALIBRATED:
        raise EncodingError(
            f"compress: --calibration is for {' and '.join(CALIBRATED)} and --allocate; got method {method}"
        )
    if allocate:
        assert tokens is not None
        if not dry_run:
            check_destination(checkpoint, destination, force)
        try:
            settings = _allocated(checkpoint, settings, tokens)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted while measuring; the same command measures again") from None
    planned = plan(checkpoint, settings)
    for warning in planned.warnings:
        stderr.print(Text.assemble(("warning: ", "yellow"), warning))
    if dry_run:
        if json:
            print_json(_plan_as_dict(planned))
        else:
            _print_sizes(planned, planned.file_bytes, "would be")
        return
    try:
        with bytes_progress("compress:") as update:

            def progress(p: Progress) -> None:
                update(p.stage, p.done, p.total, p.name)

            report = compress_checkpoint(
                checkpoint,
                destination,
                settings,
                calibration=tokens if method in CALIBRATED else None,
                progress=progress,
                restart=restart,
                force=force,
                spill=spill,
            )
    except KeyboardInterrupt:
        again = "the same command without --restart" if restart else "the same command"
        raise KeyboardInterrupt(f"interrupted; {again} continues where this run stopped") from None
    if report.resumed:
        stderr.print(f"{report.resumed} tensors had been encoded by an earlier run")
    if json:
        print_json(_report_as_dict(report))
    else:
        _print_sizes(report, report.file_bytes, "is")


def _calibration(
    checkpoint: Checkpoint, path: Path | None, column: str, windows: int, window: int, seed: int
) -> Calibration:
    from upg_jax.compress import Calibration, default_texts, read_texts
    from upg_jax.inference import Tokenizer
    from upg_jax.io._atomic import temporary_directory

    with temporary_directory("upg-jax-compress-") as directory:
        checkpoint.write_tokenizer(directory)
        tokenizer = Tokenizer.from_directory(directory)
    return Calibration.from_texts(
        default_texts() if path is None else read_texts(path, column),
        tokenizer.encode,
        windows=windows,
        tokens=window,
        seed=seed,
        source="Jargon File 4.4.7 (lexicon)" if path is None else path.name,
    )


def _allocated(checkpoint: Checkpoint, settings: Settings, calibration: Calibration) -> Settings:
    from upg_jax.cli._output import bytes_progress
    from upg_jax.compress import allocate

    with bytes_progress("compress:") as update:
        return allocate(
            checkpoint, settings, calibration, progress=lambda p: update(p.stage, p.done, p.total, p.name)
        )


def _print_sizes(result: Plan | Report, file_bytes: int, verb: str) -> None:
    from rich.table import Table

    from upg_jax.cli._output import human_bytes, print_table, printable, stdout

    table = Table()
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    for header in ("density", "bits per weight", "bytes"):
        table.add_column(header, justify="right")
    for t in result.tensors:
        table.add_row(
            printable(t.name),
            " x ".join(map(str, t.shape)),
            _density(t),
            f"{t.bits_per_weight:.2f}",
            f"{t.nbytes:,}",
        )
    print_table(table)
    tokens = [t for t in result.compressed if t.encoding and t.encoding.tokens]
    rows = f", {' and '.join(printable(t.name) for t in tokens)} as int8 rows" if tokens else ""
    stdout.print(
        f"model.safetensors {verb} {human_bytes(file_bytes)}; {len(result.compressed) - len(tokens)} matrices "
        f"compressed to {result.bits_per_weight:.2f} bits per weight, all overheads included{rows}",
        soft_wrap=True,
    )


def _density(tensor: TensorPlan | TensorReport) -> str:
    if tensor.encoding is None or tensor.density is None:
        return "dense"
    return "int8 rows" if tensor.encoding.tokens else f"{tensor.density:.3f}"


def _tensors_as_dicts(result: Plan | Report) -> list[dict[str, Any]]:
    return [
        {
            "name": t.name,
            "shape": t.shape,
            "density": t.density,
            "index": t.encoding and t.encoding.index,
            "value_bits": t.encoding and t.encoding.value_bits,
            "group_size": t.encoding and t.encoding.group_size,
            "bytes": t.nbytes,
            "bits_per_weight": t.bits_per_weight,
        }
        for t in result.tensors
    ]


def _plan_as_dict(planned: Plan) -> dict[str, Any]:
    return {
        "file_bytes": planned.file_bytes,
        "max_file_bytes": planned.max_file_bytes,
        "bits_per_weight": planned.bits_per_weight,
        "warnings": planned.warnings,
        "tensors": _tensors_as_dicts(planned),
    }


def _report_as_dict(report: Report) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "file_bytes": report.file_bytes,
        "bits_per_weight": report.bits_per_weight,
        "resumed": report.resumed,
        "warnings": report.warnings,
        "tensors": _tensors_as_dicts(report),
    }
