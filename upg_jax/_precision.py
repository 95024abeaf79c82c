"""The dtype of large products where every factor may be rounded."""

from __future__ import annotations

from pathlib import Path

import jax


def best_precision() -> str:
    """`"bfloat16"` where the default device multiplies bfloat16 faster than float32, else `"float32"`."""
    if jax.default_backend() != "cpu":
        return "bfloat16"
    try:
        return "bfloat16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "float32"
    except OSError:
        return "float32"
