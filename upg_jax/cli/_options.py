"""Options that commands share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    Path, typer.Argument(help="A UPG file or directory, a Hugging Face directory, or a GGUF file.")
]
DtypeOption = Annotated[str, typer.Option(help="Of activations and dense weights: float32 or bfloat16.")]
PackOption = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="Copy compressed layers into the form that decodes fastest here, or use them as they lie in the file. "
        "By default up to a gigabyte is packed.",
        show_default=False,
    ),
]
TopKOption = Annotated[int | None, typer.Option(help="Choose among this many most likely tokens.")]
TopPOption = Annotated[
    float | None, typer.Option(help="Choose among the likeliest tokens of this total probability.")
]
MinPOption = Annotated[
    float | None, typer.Option(help="Choose among tokens at least this times as likely as the likeliest.")
]
RepetitionOption = Annotated[
    float,
    typer.Option("--repetition-penalty", help="Above 1, makes tokens of prompt and answer less likely."),
]
FrequencyOption = Annotated[
    float, typer.Option("--frequency-penalty", help="Taken from a token's logit each time it was said.")
]
PresenceOption = Annotated[
    float, typer.Option("--presence-penalty", help="Taken from a token's logit if it was said.")
]
SeedOption = Annotated[int | None, typer.Option(help="Makes random choices reproducible.")]
StopOption = Annotated[
    list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.", show_default=False)
]
SystemOption = Annotated[
    str | None, typer.Option(help="A system message that comes before the conversation.", show_default=False)
]


def settings_among(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of `GenerationSettings` among a command's options, checked before a model is loaded."""
    from upg_jax.inference import GenerationSettings

    names = [field.name for field in dataclasses.fields(GenerationSettings) if field.name in options]
    settings = {name: options[name] for name in names} | {"stop": tuple(options["stop"] or ())}
    try:
        GenerationSettings(**settings)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    return settings
