"""Ctrl-C during a scan of products never gives a wrong result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from upg_jax._sparse_dense import unavailable_reason

SCRIPT = Path(__file__).with_name("interrupted_scan.py")

pytestmark = pytest.mark.skipif(
    unavailable_reason("emulator") is not None, reason=f"emulator: {unavailable_reason('emulator')}"
)


def interrupted(rounds: int, steps: int) -> dict[str, float]:
    ran = subprocess.run(
        [sys.executable, SCRIPT, "emulator", str(rounds), str(steps)],
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("rounds", "steps"), [(12, 150), pytest.param(150, 500, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_scan_ends_right_or_with_an_error(rounds, steps):
    ended = interrupted(rounds, steps)
    assert ended["wrong"] == ended["nan"] == 0
    assert ended["failed"] >= rounds // 4, "the interrupts came outside of the scans"
    assert ended["right"] + ended["interrupted"] + ended["failed"] >= rounds
