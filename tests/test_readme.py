"""README's example runs and prints what README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_prints_what_is_written_below_it():
    text = README.read_text(encoding="utf-8")
    code, printed = re.search(
        r"<!-- example -->\n```python\n(.*?)```\s+```text\n(.*?)```", text, re.DOTALL
    ).groups()
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == printed.splitlines()
