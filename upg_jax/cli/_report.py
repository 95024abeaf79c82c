"""`upg-jax report`: a page about a directory of compressed models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upg_jax.cli._report_page import figure_class, write_page

if TYPE_CHECKING:
    from upg_jax.inference import UPGModel
    from upg_jax.io import TensorInfo

# Not what is meant by bits per weight: rows that are looked up, and the head.
_TOKENS = re.compile(r"embed|lm_head|(^|\.)wte\.")


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Its subdirectories with UPG models are compared.")
    ],
    dense: Annotated[
        Path | None,
        typer.Option(help="The dense model, for its own row and the divergence from it.", show_default=False),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A UTF-8 text file; may be repeated. Default: the demo's excerpt of the Jargon File."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="Use only the first tokens of each file.")] = 10240,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also measure tokens a second.")] = True,
    out: Annotated[Path | None, typer.Option(help="Default: DIR/report.html.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON, too.")] = False,
) -> None:
    """Writes one page: size, bits per weight, perplexity, divergence and speed of every model, with the frontier."""
    from upg_jax._errors import CheckpointError
    from upg_jax.cli._demo import demo_text
    from upg_jax.cli._evaluate import read_text
    from upg_jax.cli._output import print_json, status, stdout
    from upg_jax.inference import UPGModel
    from upg_jax.io._atomic import replacing

    found = sorted(path for path in directory.iterdir() if any(path.glob("*.safetensors")))
    if not found:
        raise CheckpointError(
            f"report: {directory} has no subdirectory with a model; compress one into it first"
        )
    texts = {file.name: read_text(file) for file in text or []} or {"Jargon File (excerpt)": demo_text()}
    settings = {"window": window, "max_tokens": max_tokens, "texts": list(texts)}
    figure_class()  # what is missing, and a page that cannot be written, are told before the measuring
    page = out or directory / "report.html"
    rows = []
    with replacing(page) as temporary:
        original = None if dense is None else UPGModel.from_file(dense)
        if dense is not None and original is not None:
            with status(f"measuring {dense}"):
                row = _measure(original, None, texts, window, max_tokens, speed)
                rows.append({"name": dense.name, "dense": True, **row})
        for path in found:
            with status(f"measuring {path}"):
                model = UPGModel.from_file(path)
                row = _measure(model, original, texts, window, max_tokens, speed)
                rows.append({"name": path.name, "dense": False, **size_of(path), **row})
        write_page(temporary, rows, settings)
    if json:
        print_json({"settings": settings, "models": rows})
    else:
        stdout.print(f"{page}: {len(rows)} models", soft_wrap=True)


def size_of(path: Path) -> dict[str, Any]:
    """Bytes of the weights' files, and bits per weight of the linear layers with all overheads."""
    from upg_jax.io import UPGDecompressor

    with UPGDecompressor.from_safetensors(path) as file:
        infos = [file.info(name) for name in file.names()]
        provenance = file.provenance or {}
    linears = [info for info in infos if info.kind == "mdcsr" and not _TOKENS.search(info.name)]
    return {
        "file_bytes": sum(f.stat().st_size for f in path.glob("*.safetensors")),
        "bits_per_weight": _bits(linears),
        "bits_per_weight_all": _bits(infos),
        "method": provenance.get("settings", {}).get("method"),
        "density": provenance.get("settings", {}).get("density"),
        "recovered": "recovery" in provenance,
    }


def _bits(infos: list[TensorInfo]) -> float:
    return 8 * sum(info.stored_bytes for info in infos) / max(sum(info.num_weights for info in infos), 1)


def _measure(
    model: UPGModel,
    original: UPGModel | None,
    texts: dict[str, str],
    window: int,
    max_tokens: int,
    speed: bool,
) -> dict[str, Any]:
    import math

    from upg_jax.inference import compare, perplexity

    nll, kl, agreement = [], [], []
    for content in texts.values():
        ids = model.encode(content)[:max_tokens]
        nll.append(perplexity(model, ids, window=window).nll)
        if original is not None:
            distance = compare(model, original, ids, window=window)
            kl.append(distance.kl)
            agreement.append(distance.agreement)
    return {
        "perplexity": {name: math.exp(value) for name, value in zip(texts, nll, strict=True)},
        "geometric_mean": math.exp(sum(nll) / len(nll)),
        "kl": sum(kl) / len(kl) if kl else None,
        "agreement": sum(agreement) / len(agreement) if agreement else None,
        "tokens_per_second": speed_of(model, next(iter(texts.values()))) if speed else None,
    }


def speed_of(model: UPGModel, text: str, tokens: int = 32) -> float:
    """Tokens a second of a greedy answer to the beginning of a text, the best of three."""
    import time

    prompt = model.encode(text)[:32]
    best = 0.0
    for _ in range(4):  # the first compiles
        begin = time.perf_counter()
        answer = model.generate(prompt, max_new_tokens=tokens, stop_at_eos=False)
        best = max(best, len(answer.ids) / (time.perf_counter() - begin))
    return best
