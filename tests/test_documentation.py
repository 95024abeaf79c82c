"""The Python examples of README and of the tutorials run, and print what stands below them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.serving import serving

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\s+```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
NEEDS = {
    "own-model": ("flax", "equinox"),
    "fine-tuning": ("optax",),
    "serving": ("openai", "starlette", "uvicorn", "gguf"),
}


def run_examples(page: Path, directory: Path, address: str = "") -> None:
    """Runs a page's blocks in one namespace; compares what each prints with the text block that follows it.

    `address` takes the place of the server's usual one.
    """
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks, f"no ```python block in {page}"
    mark = "\nend of a block"
    code = "".join(f"exec({block!r})\nprint({mark!r}, flush=True)\n" for block, _ in blocks)
    code = code.replace("127.0.0.1:8000", address or "127.0.0.1:8000")
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    printed = result.stdout.split(mark + "\n")
    for (block, expected), got in zip(blocks, printed, strict=False):
        if expected:
            assert got.rstrip().splitlines() == expected.splitlines(), block


def test_readmes_example_prints_what_is_written_below_it(tmp_path):
    run_examples(README, tmp_path)


@pytest.mark.parametrize("page", [p.stem for p in sorted(TUTORIALS.glob("*.md")) if p.stem != "serving"])
def test_a_tutorial_runs(page, tmp_path):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package, reason=f"the tutorial needs it: pip install {package}")
    run_examples(TUTORIALS / f"{page}.md", tmp_path)


def test_the_tutorial_on_serving_runs_against_a_server(gguf_model, tmp_path):
    if not TUTORIALS.exists():
        pytest.skip("runs in a checkout, where docs/ lies beside tests/")
    for package in NEEDS["serving"]:
        pytest.importorskip(package, reason='pip install "upg-jax[test]"')
    from upg_jax.compress import Settings, compress_checkpoint
    from upg_jax.inference import Engine, UPGModel
    from upg_jax.serve import Limits, create_app

    compress_checkpoint(gguf_model, tmp_path / "half", Settings(density=0.5))
    engine = Engine(UPGModel.from_file(tmp_path / "half"), slots=2, context=128, chunk=32)
    try:
        with serving(create_app(engine, name="half", limits=Limits())) as (host, port):
            run_examples(TUTORIALS / "serving.md", tmp_path, f"{host}:{port}")
    finally:
        engine.close()
