"""The full check: the library and NumPy agree about every layer, and say the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from upg_jax import FormatError, MdCSR, _native, pack
from upg_jax._encode import encode_dense


def complaint(layer: MdCSR) -> str | None:
    try:
        layer.validate("full")
    except FormatError as error:
        return str(error)
    return None


def mutants(layer: MdCSR, rng: np.random.Generator, count: int) -> list[MdCSR]:
    """The layer with one entry changed to what rules are about."""
    found = []
    for _ in range(count):
        planes = {
            name: np.array(getattr(layer, name))
            for name in ("values", "delta_indices", "prime_indices")
            if getattr(layer, name) is not None
        }
        at = rng.integers(layer.capacity)
        if rng.random() < 0.5:
            planes["values"][at] = rng.integers(-1, 2)
        if rng.random() < 0.5 and layer.index == "delta8":
            planes["delta_indices"][at] = rng.choice([0, 1, 254, 255])
        if rng.random() < 0.5 and "prime_indices" in planes:
            planes["prime_indices"][at] = rng.choice([0, 9_999, 10_000])
        found.append(dataclasses.replace(layer, **planes))
    return found


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("index", ["delta8", "mask"])
def test_the_library_and_numpy_agree(manifold, index, library, monkeypatch):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((7, 900)).astype(np.float32) * (rng.random((7, 900)) < 0.02)
    layer = encode_dense(w, manifold=manifold, row_alignment=4)
    cases = [layer, *mutants(layer, rng, 150)] if index == "delta8" else mutants(pack(layer, index), rng, 150)
    compiled = [complaint(case) for case in cases]
    monkeypatch.setattr(_native, "load", lambda: None)
    assert compiled == [complaint(case) for case in cases]
    assert 20 < sum(c is None for c in compiled) < 130


def test_a_good_layer_is_not_read_by_numpy(library, monkeypatch):
    """What makes `upg-jax verify` fast."""
    monkeypatch.setattr("upg_jax._validate.row_chunks", lambda *_: pytest.fail("NumPy walked the rows"))
    w = np.random.default_rng(1).standard_normal((30, 600)).astype(np.float32)
    encode_dense(w, density=0.2, manifold="prime").validate("full")


def at_an_odd_address(plane: np.ndarray) -> np.ndarray:
    buffer = np.empty(plane.nbytes + 1, np.uint8)
    view = buffer[1:].view(plane.dtype)  # memory of NumPy begins at an even address
    view[:] = plane
    return view


def test_planes_may_lie_at_any_byte(library):
    """As in a file that does not align them: compiled code must not read wide integers there."""
    w = np.random.default_rng(2).standard_normal((5, 300)).astype(np.float32)
    layer = encode_dense(w, density=0.3, manifold="prime")
    planes = ("prime_indices", "row_pointers")
    moved = dataclasses.replace(layer, **{name: at_an_odd_address(getattr(layer, name)) for name in planes})
    assert moved.prime_indices.ctypes.data % 2 == moved.row_pointers.ctypes.data % 2 == 1
    read = library.conversions("delta8", layer.shape, moved.row_pointers, primes=moved.prime_indices)._arrays
    assert all(a.ctypes.data % a.itemsize == 0 for a in read if a is not None)
    moved.validate("full")
    mask = pack(moved, "mask")
    np.testing.assert_array_equal(mask.delta_indices, pack(layer, "mask").delta_indices)
