"""Sources are one text, and every line knows where it came from."""

from __future__ import annotations

import numpy as np
import pytest

import metal_ops
from upg_jax._primes import prime_table

KERNEL = """#include <metal_stdlib>
#include "one.h"
#include "two.h"
kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = ONE + TWO; }
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "one.h").write_text("#pragma once\n#ifndef ONE\n#define ONE 1\n#endif\n")
    (tmp_path / "two.h").write_text('#include "one.h"\n#define TWO (2 * ONE)\n')
    (tmp_path / "k.metal").write_text(KERNEL)
    return tmp_path / "k.metal"


def test_includes_are_put_in_place_once(path):
    source = metal_ops.load_source(path)
    assert source.name == "k"
    assert '#include "' not in source.text
    assert "#pragma once" not in source.text
    assert source.text.count("#define ONE 1") == 1
    lines = source.text.splitlines()
    assert len(lines) == len(source.origins)
    assert source.where(lines.index("#define ONE 1") + 1) == "one.h:3"
    assert source.where(lines.index("#define TWO (2 * ONE)") + 1) == "two.h:2"
    assert source.where(len(lines)) == "k.metal:4"


def test_macros_come_first_and_constants_say_what_holds(path):
    assert metal_ops.load_source(path).constants == {"ONE": 1}
    source = metal_ops.load_source(path, {"ONE": 7})
    assert source.text.startswith("#define ONE 7\n")
    assert source.constants == {"ONE": 7}
    y = np.zeros(2, np.float32)
    run = metal_ops.Emulator().compile(source)
    run.dispatch("k", {0: y}, threadgroups=(1, 1, 1), threads_per_threadgroup=(2, 1, 1))
    assert y.tolist() == [21, 21]


def test_the_hash_is_of_the_whole_text(path):
    first = metal_ops.load_source(path)
    assert first.hash == metal_ops.load_source(path).hash
    assert first.hash != metal_ops.load_source(path, {"ONE": 7}).hash
    (path.parent / "two.h").write_text("#define TWO 3\n")
    assert first.hash != metal_ops.load_source(path).hash


def test_what_is_missing_is_named(path):
    with pytest.raises(
        metal_ops.SourceError, match=r"no Metal source 'nothing'; this package has .*sparse_matvec_simd"
    ):
        metal_ops.load_source("nothing")
    (path.parent / "two.h").unlink()
    with pytest.raises(metal_ops.SourceError, match=r"k\.metal:3: no file 'two\.h'"):
        metal_ops.load_source(path)
    with pytest.raises(metal_ops.SourceError, match="macros map names"):
        metal_ops.load_source("sparse_matvec", {"A B": 1})


def test_the_parameters_are_packed_as_the_kernels_read_them():
    header = metal_ops.load_source("sparse_matvec").text
    struct = header.split("struct Parameters {")[1].split("}")[0]
    names = [line.split()[1] for line in struct.split(";") if line.strip()]
    numbers = {name: i + 1 for i, name in enumerate(names)}
    packed = metal_ops.Parameters(**numbers).pack()
    assert np.frombuffer(packed, np.uint32).tolist() == list(numbers.values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": -1}, "rows must be at least 0 and below 2\\*\\*32; got -1"),
        ({"columns": 2**32}, "columns must be"),
        ({"vectors": 2**20, "groups": 2**10}, "elements of x must be"),
        ({"layers": 2**25}, "rows of all layers must be"),
        ({"capacity": 2**32 - 1}, "capacity and a chunk must be"),
    ],
)
def test_what_kernels_count_in_32_bits_must_fit(change, says):
    shape = {"rows": 128, "columns": 128, "capacity": 1000}
    metal_ops.Parameters(**shape)
    with pytest.raises(ValueError, match=says):
        metal_ops.Parameters(**{**shape, **change})


def test_the_prime_table_is_that_of_the_format():
    table = metal_ops.prime_table().astype(np.uint32)
    table[6542:] += 65_536
    np.testing.assert_array_equal(table, prime_table())
