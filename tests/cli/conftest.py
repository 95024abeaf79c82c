"""A small model, and the command line run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from small_models import byte_level


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory):
    return byte_level.write(tmp_path_factory.mktemp("model") / "small.gguf")


@pytest.fixture
def upg_jax(tmp_path):
    """Runs `upg-jax ARGUMENTS` in a process of its own, without a terminal."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "upg_jax.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120", **environment},
            timeout=240,
            check=False,
        )

    return run
