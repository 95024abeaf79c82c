"""`upg-jax generate`: one answer, streamed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

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


def generate(
    path: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or a message with --chat.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among this many most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest tokens of this total probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes random choices reproducible.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")
    ] = False,
    dtype: DtypeOption = "float32",
    pack: PackOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print text, ids and timing as JSON.")] = False,
) -> None:
    """Continues a prompt; the answer goes to stdout as it comes."""
    from upg_jax.cli._output import human_bytes, print_json, status, stderr, stdout
    from upg_jax.inference import UPGModel

    with status(f"opening {path}"):
        model = UPGModel.from_file(path, dtype=dtype, pack=pack)
    if chat and model.tokenizer is not None:
        ids = model.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    else:
        ids = model.encode(prompt)
    start = time.perf_counter()
    first = None
    tokens, pieces = [], []
    for token in model.stream(
        ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ):
        first = first or time.perf_counter()
        if token.id is not None:
            tokens.append(token.id)
        pieces.append(token.text)
        if not json:
            stdout.print(token.text, end="", soft_wrap=True)
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
    said = f"{len(tokens)} tokens, {rate:.1f} tokens/s after the first"
    stderr.print(f"{said}; compressed layers: {stored}" if stored else said, style="dim")
