"""One-shot pruning of SmolLM2-135M-Instruct: methods and densities against perplexity on text not calibrated on.

    python -m benchmarks.pruning MODEL.gguf GENSIM.whl HANDBOOK.deb rows.jsonl [--methods ...] [--densities ...]

The texts come from packages and are not in this repository: Wikipedia articles in gensim's wheel (`pip download
--no-deps gensim==4.4.0`), and the English prose of Debian's `debian-handbook` (`apt-get download debian-handbook`;
needs `dpkg-deb`). Calibration: 64 windows of 512 tokens of every article but each fourth. Evaluation: 20 windows of
512 tokens, evenly spaced, of each fourth article, and of the handbook. A row is one setting: perplexities on both
texts, bits per weight of the linear layers, seconds of wall clock and of CPU for compression, and the process's most
resident memory so far. `--allocate` measures densities by matrix first, and its seconds.
"""

from __future__ import annotations

import argparse
import bz2
import html
import json
import math
import platform
import re
import resource
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path

import jax
import numpy as np

from upg_jax import UPGModel, __version__
from upg_jax.compress import Calibration, Settings, allocate, compress_checkpoint
from upg_jax.inference import perplexity

WINDOW, WINDOWS = 512, 20


def wikipedia(wheel: Path) -> list[str]:
    """The articles' prose, one string each."""
    articles = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "enwiki-latest-pages-articles1.xml" in name and name.endswith(".bz2"):
                xml = bz2.decompress(archive.read(name)).decode("utf-8")
                for page in re.findall(r"<page>(.*?)</page>", xml, re.DOTALL):
                    text = re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
                    if text and "<ns>0</ns>" in page and "<redirect" not in page:
                        articles.append(_prose(html.unescape(text[1])))
    return [article for article in articles if len(article) > 500]


def _prose(markup: str) -> str:
    """Paragraphs of over 80 characters, without templates, tables, references and links."""
    removed = (
        [r"<!--.*?-->", r"<ref[^>/]*/>", r"<ref.*?</ref>"]
        + [r"\{\{[^{}]*\}\}"] * 6
        + [r"\{\|.*?\|\}"]
        + [r"\[\[(?:File|Image|Category)[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]"] * 3
    )
    for pattern in removed:
        markup = re.sub(pattern, "", markup, flags=re.DOTALL)
    markup = re.sub(r"\[\[[^\[\]|]*\|([^\[\]]*)\]\]", r"\1", markup)
    markup = re.sub(r"\[\[([^\[\]]*)\]\]", r"\1", markup)
    markup = re.sub(r"\[https?:\S+ ([^\]]*)\]", r"\1", markup)
    markup = re.sub(r"<[^>]+>|'{2,}", "", markup)
    markup = re.sub(r"^\s*[=*#:;|!].*$", "", markup, flags=re.MULTILINE)
    return "\n".join(line.strip() for line in markup.split("\n") if len(line.strip()) > 80)


def handbook(package: Path) -> str:
    """The English edition's paragraphs of over 150 characters."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["dpkg-deb", "-x", str(package), directory], check=True)
        pages = sorted(Path(directory).glob("usr/share/doc/debian-handbook/html/en-US/*.html"))
        found = []
        for page in pages:
            for part in re.findall(
                r'<div class="para">(.*?)</div>', page.read_text(encoding="utf-8"), re.DOTALL
            ):
                text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", part)).split())
                if len(text) > 150:
                    found.append(text)
    return "\n\n".join(found)


def split(articles: list[str]) -> tuple[list[str], list[str]]:
    """Articles to calibrate and train on, and each fourth, to measure with."""
    return [a for i, a in enumerate(articles) if i % 4], articles[::4]


def spaced_windows(ids: list[int]) -> np.ndarray:
    """Evenly spaced windows, one after another; each is one window of `perplexity`."""
    starts = np.linspace(0, len(ids) - WINDOW, WINDOWS).astype(int)
    return np.concatenate([np.asarray(ids[start : start + WINDOW], np.int32) for start in starts])


def perplexities(model: UPGModel, texts: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each text, and their geometric mean."""
    nll = {name: perplexity(model, ids, window=WINDOW).nll for name, ids in texts.items()}
    mean = sum(nll.values()) / len(nll)
    return {name: math.exp(value) for name, value in {**nll, "geometric mean": mean}.items()}


def machine() -> dict[str, str]:
    """What every row says of software and processor."""
    return {
        "upg_jax": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cpu": platform.processor() or platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("package", type=Path)
    parser.add_argument("rows", type=Path, help="results are appended, a JSON object a line")
    parser.add_argument("--methods", nargs="+", default=["dense", "magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.7, 0.5, 0.4, 0.3])
    parser.add_argument("--pattern")
    parser.add_argument("--allocate", action="store_true")
    parser.add_argument("--keep", type=Path, help="keep the compressed models in this directory")
    parser.add_argument("--note", default="")
    options = parser.parse_args()

    dense = UPGModel.from_file(options.model)
    encode = dense.tokenizer.encode
    calibrated_on, held_out = split(wikipedia(options.wheel))
    calibration = Calibration.from_texts(calibrated_on, encode, source="gensim's Wikipedia articles")
    texts = {
        "wikipedia": spaced_windows(encode("\n\n".join(held_out))),
        "handbook": spaced_windows(encode(handbook(options.package))),
    }

    def record(model: UPGModel, **facts: object) -> None:
        row = {**facts, **perplexities(model, texts), "note": options.note, **machine()}
        with options.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    if "dense" in options.methods:
        record(dense, method="dense", density=1.0)
    del dense
    with tempfile.TemporaryDirectory() as temporary:
        for method in (m for m in options.methods if m != "dense"):
            for density in options.densities:
                settings = Settings(
                    density=density, method=method, pattern=options.pattern, embedding="float"
                )
                allocated = None
                if options.allocate:
                    wall, cpu = time.perf_counter(), time.process_time()
                    settings = allocate(options.model, settings, calibration)
                    allocated = {
                        "seconds": time.perf_counter() - wall,
                        "cpu_seconds": time.process_time() - cpu,
                    }
                name = f"{method}-{density}" + ("-allocated" if options.allocate else "")
                directory = (options.keep or Path(temporary)) / name
                wall, cpu = time.perf_counter(), time.process_time()
                report = compress_checkpoint(
                    options.model,
                    directory,
                    settings,
                    calibration=None if method == "magnitude" else calibration,
                    force=True,
                )
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                record(
                    UPGModel.from_file(directory),
                    method=method,
                    density=density,
                    allocated=allocated,
                    pattern=settings.counted,
                    bits_per_weight=report.bits_per_weight,
                    seconds=wall,
                    cpu_seconds=cpu,
                    peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                )


if __name__ == "__main__":
    main()
