"""The example of docs/metal_ops.md runs and prints what stands below it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import metal_ops

DOCUMENT = Path(__file__).parents[2] / "docs" / "metal_ops.md"


def test_the_example_prints_what_is_written_below_it():
    if not DOCUMENT.exists():
        pytest.skip("runs in a checkout, where docs/ lies beside tests/")
    text = DOCUMENT.read_text(encoding="utf-8")
    code, printed = re.search(
        r"<!-- example -->\n```python\n(.*?)```\s+```text\n(.*?)```", text, re.DOTALL
    ).groups()
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == printed.splitlines()


def test_every_kernel_is_documented():
    if not DOCUMENT.exists():
        pytest.skip("runs in a checkout, where docs/ lies beside tests/")
    text = DOCUMENT.read_text(encoding="utf-8")
    folder = Path(metal_ops.__file__).parent / "kernels"
    assert all(f"`{path.stem}`" in text for path in folder.glob("*.metal"))
