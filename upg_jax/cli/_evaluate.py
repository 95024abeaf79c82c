"""`upg-jax eval`: perplexity over text files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    dtype: DtypeOption = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measures perplexity over text files, each with its own figure."""
    import dataclasses

    from upg_jax._errors import CheckpointError
    from upg_jax.cli._demo import demo_text
    from upg_jax.cli._output import print_json, status, stdout
    from upg_jax.inference import UPGModel, perplexity

    texts = {str(file): _read(file) for file in text or []}
    if not texts:
        texts["Jargon File 4.4.7 (excerpt)"] = demo_text()
    with status(f"opening {path}"):
        model = UPGModel.from_file(path, dtype=dtype)
    if model.tokenizer is None:
        raise CheckpointError(f"eval: {path} has no tokenizer beside it, so text cannot be measured")
    rows = []
    for name, content in texts.items():
        with status(f"measuring {name}"):
            ids = model.tokenizer.encode(content)[:max_tokens]
            result = perplexity(model, ids, window=window, stride=stride)
        rows.append({"text": name, "perplexity": result.perplexity, **dataclasses.asdict(result)})
        if not json:
            stdout.print(
                f"{name}: perplexity {result.perplexity:.3f} over {result.tokens:,} tokens, windows of {window}, "
                f"stride {stride or window}",
                soft_wrap=True,
            )
    if json:
        print_json(rows)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"eval: {file} must be UTF-8 text; {e}") from None
