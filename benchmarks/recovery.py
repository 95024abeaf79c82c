"""Recovery of SmolLM2-135M-Instruct: training after pruning against perplexity on text not trained on.

    python -m benchmarks.pruning MODEL.gguf GENSIM.whl HANDBOOK.deb pruned.jsonl --methods sparsegpt --keep models
    python -m benchmarks.recovery models/sparsegpt-0.5 MODEL.gguf GENSIM.whl HANDBOOK.deb rows.jsonl --out better

Training is on every Wikipedia article of `benchmarks.pruning` but each fourth; perplexity on 20 windows of each fourth
article and of the handbook, as there. `--manuals DIR` trains on Debian's other manuals too, packages there (`apt-get
download debian-faq debian-reference-en developers-reference installation-guide-amd64`), without the paragraphs that
share eight words in a row with the handbook. A row is one run: its settings, its curve (step, seconds, loss, divergence
from the dense model, negative log-likelihood), wall clock and CPU of training, perplexities of the model it began with
and of the result.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.pruning import handbook, machine, perplexities, spaced_windows, split, wikipedia
from upg_jax import UPGModel
from upg_jax.train import RecoveryProgress, RecoverySettings, recover

MANUALS = {
    "debian-faq": "usr/share/doc/debian/FAQ/*.en.html",
    "debian-reference-en": "usr/share/debian-reference/*.en.html",
    "developers-reference": "usr/share/developers-reference/*.html",
    "installation-guide-amd64": "usr/share/doc/installation-guide-amd64/en/*.html",
}


def manual(package: Path, pages: str, without: set[str]) -> str:
    """The paragraphs of over 150 characters, once each, but for those with a run of words in `without`."""
    found: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["dpkg-deb", "-x", str(package), directory], check=True)
        for page in sorted(Path(directory).glob(pages)):
            for part in re.findall(r"<p\b[^>]*>(.*?)</p>", page.read_text(encoding="utf-8"), re.DOTALL):
                text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", part)).split())
                if len(text) > 150 and not without & runs_of_words(text):
                    found[text] = None
    return "\n\n".join(found) + "\n\n"


def runs_of_words(text: str) -> set[str]:
    """All runs of eight words."""
    words = text.lower().split()
    return {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("start", type=Path, help="a compressed model")
    parser.add_argument("model", type=Path)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("package", type=Path)
    parser.add_argument("rows", type=Path, help="results are appended, a JSON object a line")
    parser.add_argument("--out", type=Path, required=True, help="the recovered model")
    parser.add_argument("--manuals", type=Path, help="a directory with the packages")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--learning-rate", type=float, default=RecoverySettings.learning_rate)
    parser.add_argument("--batch", type=int, default=1, help="windows of a step")
    parser.add_argument("--note", default="")
    options = parser.parse_args()

    minutes = 15.0 if options.minutes is None and options.tokens is None else options.minutes
    settings = RecoverySettings(
        minutes=minutes, tokens=options.tokens, learning_rate=options.learning_rate, batch=options.batch
    )
    articles, held_out = split(wikipedia(options.wheel))
    book = handbook(options.package)
    train = [f"{article}\n\n" for article in articles]
    if options.manuals is not None:
        in_book = runs_of_words(book)
        for name, pages in MANUALS.items():
            (package,) = options.manuals.glob(f"{name}_*.deb")
            train.append(manual(package, pages, in_book))
    curve: list[list[float]] = []

    def note(p: RecoveryProgress) -> None:
        curve.append([p.step, *(round(x, 4) for x in (p.seconds, p.loss, p.kl, p.nll))])
        if p.step % 10 == 0:
            print(f"step {p.step}, {p.spent:.0%}, {p.seconds:.0f} s, loss {p.loss:.3f}", flush=True)

    cpu = time.process_time()
    done = recover(options.start, options.model, train, options.out, settings, progress=note)
    cpu = time.process_time() - cpu
    found = {}
    for name, path in {"recovered": options.out, "start": options.start}.items():
        model = UPGModel.from_file(path)
        texts = {"wikipedia": "\n\n".join(held_out), "handbook": book}
        found[name] = perplexities(model, {k: spaced_windows(model.encode(t)) for k, t in texts.items()})
        print(name, found[name], flush=True)
    row = {
        "model": options.start.name,
        **found,
        "text": "articles" if options.manuals is None else "articles and manuals",
        "settings": settings.to_json(),
        "steps": done.steps,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "cpu_seconds": cpu,
        "note": options.note,
        **machine(),
        "curve": curve,
    }
    with options.rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({key: value for key, value in row.items() if key != "curve"}))


if __name__ == "__main__":
    main()
