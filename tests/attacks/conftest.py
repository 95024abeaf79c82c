"""Fixtures of the attacks."""

from __future__ import annotations

import pytest

from upg_jax import FormatError
from upg_jax.io import convert_v1
from upg_jax.io._unpickle import load


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "the-attack-ran"


@pytest.fixture
def refused(tmp_path, mark):
    """Loads and converts a hostile file; it must be refused, saying why, without having run."""

    def check(content: bytes, *expected: str) -> None:
        path = tmp_path / "evil.upg"
        path.write_bytes(content)
        for run in (lambda: load(path), lambda: convert_v1(path, tmp_path / "out.safetensors")):
            with pytest.raises(FormatError) as caught:
                run()
            for part in (str(path), "nothing in the file was run", *expected):
                assert part in str(caught.value)
            assert len(str(caught.value)) < 1000
        assert not mark.exists(), "the attack ran"
        assert not (tmp_path / "out.safetensors").exists()

    return check
