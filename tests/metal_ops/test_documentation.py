"""The examples of docs/metal_ops.md run and print what stands below them; every public name is in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import metal_ops

DOCUMENT = Path(__file__).parents[2] / "docs" / "metal_ops.md"


@pytest.mark.parametrize("number", range(2))
def test_an_example_prints_what_is_written_below_it(number):
    if not DOCUMENT.exists():
        pytest.skip("runs in a checkout, where docs/ lies beside tests/")
    examples = re.findall(
        r"<!-- example -->\n```python\n(.*?)```\s+```text\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL
    )
    assert len(examples) == 2
    code, printed = examples[number]
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == printed.splitlines()


def test_every_public_name_is_documented():
    if not DOCUMENT.exists():
        pytest.skip("runs in a checkout, where docs/ lies beside tests/")
    words = set(re.findall(r"\w+", DOCUMENT.read_text(encoding="utf-8")))
    # `Array`s, `Work`, the errors that are raised: named where they are explained, perhaps in the plural.
    missing = {name for name in metal_ops.__all__ if not {name, f"{name}s", f"{name}es"} & words}
    assert missing == set()


def test_every_kernel_is_documented():
    if not DOCUMENT.exists():
        pytest.skip("runs in a checkout, where docs/ lies beside tests/")
    text = DOCUMENT.read_text(encoding="utf-8")
    folder = Path(metal_ops.__file__).parent / "kernels"
    assert all(f"`{path.stem}`" in text for path in folder.glob("*.metal"))
