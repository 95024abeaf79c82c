"""`upg-jax recover`: trains what a compressed model stores, with the dense model as teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from upg_jax.train import RecoveryProgress


def recover(
    model: Annotated[Path, typer.Argument(help="A directory that `upg-jax compress` made.")],
    dense: Annotated[
        Path, typer.Option(help="The model it was made from: a Hugging Face directory or a GGUF file.")
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            help="Text to train on; may be repeated: a UTF-8 file, a directory of .txt files, or a Hugging Face data "
            "set on disk."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The directory to make.")],
    minutes: Annotated[float | None, typer.Option(help="Train for this long.", show_default=False)] = None,
    tokens: Annotated[int | None, typer.Option(help="Train on this many tokens.", show_default=False)] = None,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 5e-4,
    distillation: Annotated[float, typer.Option(help="Weight of the dense model's predictions.")] = 1.0,
    language_model: Annotated[float, typer.Option(help="Weight of the text's own next tokens.")] = 0.25,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch.")] = 1,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 1,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of products: float32 or bfloat16. Default: bfloat16 where the device has it.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the text.")] = 0,
    column: Annotated[str, typer.Option(help="Column of a data set that has the text.")] = "text",
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted run's work.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a compressed model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Wins back what compression lost: distillation on the stored weights, then the same encoding.

    Interrupted, the same command goes on from its last checkpoint; OUT appears when it is complete.
    """
    import dataclasses
    import itertools

    from upg_jax.cli._output import print_json, stdout
    from upg_jax.compress import read_texts
    from upg_jax.train import RecoverySettings
    from upg_jax.train import recover as train

    settings = RecoverySettings(
        minutes=minutes,
        tokens=tokens,
        learning_rate=learning_rate,
        distillation=distillation,
        language_model=language_model,
        window=window,
        batch=batch,
        micro_batches=micro_batches,
        precision=precision,
        seed=seed,
    )
    texts = itertools.chain.from_iterable(read_texts(path, column) for path in text)
    try:
        done = train(model, dense, texts, out, settings, progress=_Lines(), restart=restart, force=force)
    except KeyboardInterrupt:
        again = "the same command without --restart" if restart else "the same command"
        raise KeyboardInterrupt(f"interrupted; {again} continues from the last checkpoint") from None
    if json:
        last = None if done.last is None else dataclasses.asdict(done.last)
        print_json(dataclasses.asdict(done) | {"path": str(done.path), "last": last})
    else:
        stdout.print(
            f"{done.path}: {done.steps:,} steps, {done.tokens:,} tokens in {done.seconds / 60:.1f} minutes",
            soft_wrap=True,
        )


class _Lines:
    """A line about the training every so often: at each step on a terminal, else every half minute."""

    def __init__(self) -> None:
        self._printed = float("-inf")

    def __call__(self, p: RecoveryProgress) -> None:
        from upg_jax.cli._output import stderr

        if p.spent < 1 and p.seconds - self._printed < (1 if stderr.is_terminal else 30):
            return
        self._printed = p.seconds
        left = "" if p.remaining is None else f", {p.remaining / 60:.1f} minutes left"
        stderr.print(
            f"recover: {min(p.spent, 1):.0%}, step {p.step}, {p.tokens:,} tokens, {p.tokens_per_second:.0f} a second, "
            f"loss {p.loss:.3f} (divergence {p.kl:.3f}, text {p.nll:.3f}){left}"
        )
