"""metal_ops stands below everything: it needs NumPy alone."""

from __future__ import annotations

import subprocess
import sys

import metal_ops


def test_importing_needs_neither_jax_nor_optional_packages():
    code = "import sys, metal_ops; print([m for m in ('jax', 'upg_jax', 'clang', 'objc', 'Metal') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    assert all(hasattr(metal_ops, name) for name in metal_ops.__all__)
