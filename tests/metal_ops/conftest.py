from __future__ import annotations

import pytest
from helpers.apple import TEXT

import metal_ops


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Kernels `add` and `divergent` of helpers/apple.py."""
    path = tmp_path_factory.mktemp("metal") / "add.metal"
    path.write_text(TEXT)
    return metal_ops.load_source(path)
