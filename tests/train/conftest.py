"""A small model with a tokenizer."""

from __future__ import annotations

import pytest
from small_models import byte_level


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory):
    return byte_level.write(tmp_path_factory.mktemp("model") / "small.gguf")
