"""Layers to write to files, and comparing what comes out with what went in, without compiling a decoder."""

from __future__ import annotations

import functools

import numpy as np

from upg_jax import MdCSR
from upg_jax.io._header import read_header


@functools.cache
def layer(shape=(67, 33), density=0.5, manifold="unit", seed=0, **options) -> MdCSR:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return MdCSR.from_dense(w, density=density, manifold=manifold, **options)


def header_of(path):
    with open(path, "rb") as file:
        return read_header(file, path)


def model_tensors(layers=4, manifold="unit", shape=(300, 257)):
    """Consecutive layers of a few sizes: small planes, middling ones and ones of many times 16 KiB."""
    tensors = {}
    for i in reversed(range(layers)):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.up.weight"] = layer(shape, 0.5, manifold, seed=i)
        tensors[f"{prefix}.large.weight"] = layer((512, 1024), 0.8, manifold, seed=i)
        tensors[f"{prefix}.tiny.weight"] = layer((7, 11), 0.5, manifold, seed=i)
        tensors[f"{prefix}.norm.weight"] = np.full(257, i, np.float32)
    tensors["embed.weight"] = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    return tensors


def assert_holds(layer: MdCSR, original: MdCSR, index: int | None = None) -> None:
    """Checks that a layer, or layer `index` of a stack, is the original up to the length of its zero tail."""
    for field in ("shape", "row_alignment", "dtype", "manifold", "index", "value_bits"):
        assert getattr(layer, field) == getattr(original, field), field
    for plane in ("values", "delta_indices", "prime_indices", "scales", "row_pointers"):
        expected = getattr(original, plane)
        if expected is None:
            assert getattr(layer, plane) is None
            continue
        got, expected = np.asarray(getattr(layer, plane)), np.asarray(expected)
        got = got if index is None else got[index]
        assert got.dtype == expected.dtype
        if plane not in ("scales", "row_pointers"):
            expected = expected[: original.nnz]
            assert not got[original.nnz :].any(), plane
        np.testing.assert_array_equal(got[: expected.size], expected, err_msg=plane)
