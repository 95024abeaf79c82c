"""`upg-jax eval`: perplexity over text files, and the distance from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from upg_jax.cli._options import DtypeOption, ModelArgument


def evaluate(
    path: ModelArgument,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A UTF-8 text file; may be repeated. Default: the demo's excerpt of the Jargon File."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next; default: the window.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Use only the first tokens of each file.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="The dense model: adds the divergence from its predictions, and how often the most likely token is "
            "the same.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="With --against: how far each matrix is from the dense one.")
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-eval, such as multiple choice, instead of texts; may be repeated."),
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="A directory with task files of lm-eval.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")] = None,
    dtype: DtypeOption = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measures perplexity over text files, each with its own figure, and the distance from the dense model."""
    import dataclasses

    from upg_jax._errors import CheckpointError
    from upg_jax.cli._demo import demo_text
    from upg_jax.cli._output import print_json, status, stdout
    from upg_jax.inference import UPGModel, compare, evaluate_tasks, perplexity, weight_errors

    if weights and against is None:
        raise ValueError("eval: --weights compares with the dense model; name it with --against")
    texts = {str(file): read_text(file) for file in text or []}
    if not texts:
        texts["Jargon File 4.4.7 (excerpt)"] = demo_text()
    with status(f"opening {path}"):
        model = UPGModel.from_file(path, dtype=dtype)
        other = None if against is None else UPGModel.from_file(against, dtype=dtype)
    if model.tokenizer is None:
        raise CheckpointError(f"eval: {path} has no tokenizer beside it, so text cannot be measured")
    if task:
        results = evaluate_tasks(model, task, include_path=include, limit=limit)
        if json:
            print_json(results)
        for name, metrics in results.items() if not json else ():
            figures = [f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)]
            stdout.print(f"{name}: {', '.join(figures)}", soft_wrap=True)
        return
    rows = []
    for name, content in texts.items():
        with status(f"measuring {name}"):
            ids = model.tokenizer.encode(content)[:max_tokens]
            result = perplexity(model, ids, window=window, stride=stride)
            distance = None if other is None else compare(model, other, ids, window=window)
        row = {"text": name, "perplexity": result.perplexity, **dataclasses.asdict(result)}
        if not json:
            stdout.print(
                f"{name}: perplexity {result.perplexity:.3f} over {result.tokens:,} tokens, windows of {window}, "
                f"stride {stride or window}",
                soft_wrap=True,
            )
        if distance is not None:
            row["against"] = {"model": str(against), **dataclasses.asdict(distance)}
            if not json:
                stdout.print(
                    f"{name}: divergence from the dense model {distance.kl:.4f} nats a token, the same most likely "
                    f"token in {distance.agreement:.2%} of {distance.tokens:,}, windows of {window} without overlap",
                    soft_wrap=True,
                )
        rows.append(row)
    if not weights or against is None:
        if json:
            print_json(rows)
        return
    errors = [dataclasses.asdict(error) for error in weight_errors(path, against)]
    if json:
        print_json({"texts": rows, "weights": errors})
    else:
        _print_errors(errors)


def _print_errors(errors: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from upg_jax.cli._output import print_table, printable

    table = Table()
    table.add_column("tensor", overflow="fold")
    for header in ("density", "relative error", "largest difference"):
        table.add_column(header, justify="right")
    for error in errors:
        figures = f"{error['density']:.3f}", f"{error['relative']:.4f}", f"{error['largest']:.4g}"
        table.add_row(printable(error["name"]), *figures)
    print_table(table)


def read_text(file: Path) -> str:
    """The content of a UTF-8 file."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"eval: {file} must be UTF-8 text; {e}") from None
