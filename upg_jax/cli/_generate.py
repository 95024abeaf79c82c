"""`upg-jax generate`: one answer, streamed."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from upg_jax.cli._options import (
    DtypeOption,
    FrequencyOption,
    MinPOption,
    ModelArgument,
    PackOption,
    PresenceOption,
    RepetitionOption,
    SeedOption,
    StopOption,
    SystemOption,
    TopKOption,
    TopPOption,
    settings_among,
)


def generate(
    path: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or a message with --chat.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = 1.0,
    frequency_penalty: FrequencyOption = 0.0,
    presence_penalty: PresenceOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")
    ] = False,
    system: SystemOption = None,
    dtype: DtypeOption = "float32",
    pack: PackOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print text, ids and timing as JSON.")] = False,
) -> None:
    """Continues a prompt; the answer goes to stdout as it comes."""
    settings = settings_among(locals())
    from upg_jax.cli._output import human_bytes, print_json, say, status, stderr, stdout
    from upg_jax.inference import UPGModel

    if system is not None and not chat:
        raise typer.BadParameter("needs --chat", param_hint="--system")
    with status(f"opening {path}"):
        model = UPGModel.from_file(path, dtype=dtype, pack=pack)
    if chat and model.tokenizer is not None:
        said = [{"role": "system", "content": system}] if system is not None else []
        ids = model.tokenizer.encode_chat([*said, {"role": "user", "content": prompt}])
    else:
        ids = model.encode(prompt)
    start = time.perf_counter()
    first = None
    tokens, pieces = [], []
    for token in model.stream(ids, **settings):
        first = first or time.perf_counter()
        if token.id is not None:
            tokens.append(token.id)
        pieces.append(token.text)
        if not json:
            say(token.text)
    end = time.perf_counter()
    rate = (len(tokens) - 1) / (end - first) if first and len(tokens) > 1 else 0.0
    if json:
        print_json(
            {
                "text": "".join(pieces),
                "ids": tokens,
                "seconds": end - start,
                "tokens_per_second": rate,
                "index_bytes": model.index_bytes,
            }
        )
        return
    stdout.print()
    stored = ", ".join(f"{human_bytes(size)} with index {index}" for index, size in model.index_bytes.items())
    rates = f"{len(tokens)} tokens, {rate:.1f} tokens/s after the first"
    stderr.print(f"{rates}; compressed layers: {stored}" if stored else rates, style="dim")
