"""What the oldest supported JAX lacks, with a reason for each skip."""

from __future__ import annotations

import jax
import jax.experimental
import pytest


def needs(attribute: str):
    """Skips a test where `jax` has no such attribute."""
    found = jax
    for name in attribute.split("."):
        found = getattr(found, name, None)
    return pytest.mark.skipif(found is None, reason=f"jax {jax.__version__} has no jax.{attribute}")


def enable_x64():
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()
