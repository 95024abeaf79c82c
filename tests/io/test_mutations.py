"""Thousands of damaged files: each is refused, or read exactly as a plain reading of the same bytes says.

The plain reading below knows only docs/format.md: `json`, NumPy and the oracle's decoder.
"""

from __future__ import annotations

import collections
import json
import re

import hypothesis
import numpy as np
import pytest
from helpers.crafted import Crafted, join
from hypothesis import strategies as st
from oracle import mdcsr as oracle

from upg_jax import FormatError, MdCSR, UPGDecompressor, save

_NUMPY = {"I8": np.int8, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "F32": np.float32}
_EDGES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 64, 255, 256, 299, 300, 2**31 - 1, 2**31, 2**32, 2**63, 10**20)
PLANES = ("values", "delta_indices", "scales", "row_pointers", "prime_indices")


def plain_reading(content: bytes) -> dict[str, tuple[list, tuple[int, int]]]:
    """Planes and shape of every matrix, from the bytes alone."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def tensor(name: str) -> np.ndarray | None:
        if name not in header:
            return None
        start, stop = header[name]["data_offsets"]
        return np.frombuffer(data[start:stop], _NUMPY[header[name]["dtype"]])

    return {
        name: ([tensor(f"{name}.{plane}") for plane in PLANES], tuple(facts["shape"]))
        for name, facts in json.loads(header["__metadata__"]["mdcsr"]).items()
    }


def compare_dense(layer: MdCSR, planes: list, shape: tuple[int, int]) -> None:
    got, expected = np.asarray(layer.to_dense(np.float32)), oracle.decode(*planes, shape)
    magnitude = oracle.decode(np.abs(planes[0].astype(np.int16)), *planes[1:], shape)
    if np.array_equal(magnitude, np.abs(expected)):
        np.testing.assert_array_equal(got, expected)
    else:  # entries that share a column are added, in an order of the kernel's own
        np.testing.assert_allclose(got, expected, rtol=0, atol=2.0**-22 * float(magnitude.max()))


def check(path, content: bytes, decoded_shapes: set = frozenset()) -> str:
    """Opens everything and compares it; returns how it went."""
    path.unlink(missing_ok=True)  # far cheaper than truncating a file that was just written
    path.write_bytes(content)
    try:
        with UPGDecompressor.from_safetensors(path) as f:
            layers = {name: f.get_layer(name) for name in f.names() if f.info(name).kind == "mdcsr"}
            for name in f.names():
                if name not in layers:
                    f.get_array(name, device=False)
    except FormatError as error:
        return "refused" if path.name in str(error) else "refused without the file's name"
    expected = plain_reading(content)
    assert layers.keys() == expected.keys()
    for name, (planes, shape) in expected.items():
        layer = layers[name]
        assert layer.shape == shape
        for plane, raw in zip(PLANES, planes, strict=True):
            if raw is not None:
                np.testing.assert_array_equal(getattr(layer, plane), raw)
        # A new shape compiles for a second; only the shapes of undamaged files are decoded.
        if (shape, layer.capacity) in decoded_shapes:
            compare_dense(layer, planes, shape)
    return "read"


def written(tmp_path_factory) -> bytes:
    """A file of our own writer: stacks, tails, padding tensors, both manifolds."""
    w = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    w[1] = 0
    tensors = {f"layers.{i}.w": MdCSR.from_dense(w + i, density=0.5, manifold="prime") for i in range(2)}
    tensors |= {"a": MdCSR.from_dense(w.T, density=0.3, row_alignment=4), "norm": w[0]}
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    save(path, tensors)
    return path.read_bytes()


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> list[tuple[bytes, bytes]]:
    """Header and data of the files to damage."""
    files = [Crafted("unit").bytes(), Crafted("prime").bytes(), written(tmp_path_factory)]
    split = []
    for content in files:
        length = int.from_bytes(content[:8], "little")
        split.append((content[8 : 8 + length], content[8 + length :]))
    return split


@st.composite
def damage(draw) -> tuple:
    """What to do to a file: which base, then a few edits, each with a place from 0 to 1."""
    edit = st.tuples(
        st.sampled_from(("data", "data", "data", "header", "number", "number", "truncate", "grow", "length")),
        st.sampled_from(("flip", "set", "delete", "insert", "copy")),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=4),
        st.sampled_from(_EDGES),
    )
    return draw(st.integers(0, 2)), draw(st.lists(edit, min_size=1, max_size=3))


def edit_bytes(content: bytes, how: str, at: float, other: float, new: bytes) -> bytes:
    i, j = int(at * len(content)), int(other * len(content))
    if how == "flip":
        return content[:i] + bytes(b ^ (1 << (new[0] % 8)) for b in content[i : i + 1]) + content[i + 1 :]
    if how == "set":
        return content[:i] + new + content[i + len(new) :]
    if how == "delete":
        return content[:i] + content[i + len(new) :]
    if how == "insert":
        return content[:i] + new + content[i:]
    return content[:i] + content[j : j + len(new)] + content[i + len(new) :]


def edit_number(header: bytes, at: float, number: int) -> bytes:
    found = list(re.finditer(rb"\d+", header))
    match = found[int(at * len(found))]
    return header[: match.start()] + str(number).encode() + header[match.end() :]


def damaged(header: bytes, data: bytes, edits: list[tuple]) -> bytes:
    length = cut = None
    for where, how, at, other, new, edge in edits:
        if where == "data":
            data = edit_bytes(data, how, at, other, new)
        elif where == "header":
            header = edit_bytes(header, how, at, other, new)
        elif where == "number":
            header = edit_number(header, at, edge)
        elif where == "truncate":
            cut = at
        elif where == "grow":
            data += new
        else:
            length = edge
    content = join(header, data)
    if length is not None:
        content = min(length, 2**64 - 1).to_bytes(8, "little") + content[8:]
    return content if cut is None else content[: int(cut * len(content))]


def shapes_in(bases) -> set:
    plain = [plain_reading(join(header, data)) for header, data in bases]
    return {(shape, planes[0].size) for matrices in plain for planes, shape in matrices.values()}


def run(tmp_path, bases, examples: int) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    path, decoded_shapes = tmp_path / "damaged.safetensors", shapes_in(bases)

    @hypothesis.settings(
        max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck), report_multiple_bugs=False
    )
    @hypothesis.given(damage())
    def each(what):
        base, edits = what
        outcomes[check(path, damaged(*bases[base], edits), decoded_shapes)] += 1

    each()
    assert outcomes.keys() == {"read", "refused"}
    # Neither a reader that refuses everything nor edits that change nothing would be tested.
    assert min(outcomes["read"], outcomes["refused"]) > examples / 20, outcomes


def test_damaged_files_are_refused_or_read_exactly(tmp_path, bases):
    run(tmp_path, bases, 800)


@pytest.mark.slow
def test_many_damaged_files_are_refused_or_read_exactly(tmp_path, bases):
    run(tmp_path, bases, 50_000)


def test_undamaged_files_are_read_exactly(tmp_path, bases):
    for header, data in bases:
        assert check(tmp_path / "whole.safetensors", join(header, data), shapes_in(bases)) == "read"


def test_every_flipped_bit_of_every_plane_is_refused_or_read_exactly(tmp_path):
    crafted = Crafted("prime")
    header, data = json.dumps(crafted.header()), crafted.data()
    outcomes: collections.Counter[str] = collections.Counter()
    shapes = shapes_in([(header.encode(), data)])
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        outcomes[check(tmp_path / "flipped.safetensors", join(header, bytes(flipped)), shapes)] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 20
