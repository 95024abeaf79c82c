"""The emulator's types have the values, sizes and alignments of Metal's."""

from __future__ import annotations

import numpy as np
import pytest

import metal_ops

KERNELS = """#include <metal_stdlib>
using namespace metal;
kernel void widen(device const half* x [[buffer(0)]], device float* y [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) { y[i] = x[i]; }
kernel void narrow(device const float* x [[buffer(0)]], device half* y [[buffer(1)]],
                   uint i [[thread_position_in_grid]]) { y[i] = half(x[i]); }
kernel void halves(device const half* x [[buffer(0)]], device half* y [[buffer(1)]],
                   uint i [[thread_position_in_grid]]) { y[i] = x[i] * x[i + 1] - x[i + 2]; }
struct Mixed { uchar a; float3 b; ushort2 c; uint4 d; };
kernel void sizes(device uint* y [[buffer(0)]]) {
    y[0] = sizeof(float3); y[1] = sizeof(ushort2); y[2] = sizeof(uchar4); y[3] = sizeof(half3); y[4] = sizeof(Mixed);
    y[5] = alignof(uint2); y[6] = sizeof(ulong); y[7] = sizeof(bool);
}
kernel void vectors(device const float3* x [[buffer(0)]], device float* y [[buffer(1)]],
                    uint i [[thread_position_in_grid]]) {
    float3 sum = x[i] + x[i] * float3(2.0f);
    y[i] = sum.x + sum[1] * 10 + sum.z * 100;
}
kernel void functions(device float* y [[buffer(0)]]) {
    y[0] = clamp(5, 1, 3); y[1] = fma(2.0f, 3.0f, 4.0f); y[2] = rint(2.5f); y[3] = as_type<float>(0x3f800000u);
    y[4] = popcount(255u); y[5] = min(-1, 2); y[6] = rsqrt(4.0f); y[7] = abs(-3);
}
"""


@pytest.fixture
def dispatch(tmp_path):
    path = tmp_path / "types.metal"
    path.write_text(KERNELS)
    program = metal_ops.Emulator().compile(metal_ops.load_source(path))

    def run(kernel: str, *buffers: np.ndarray, threads: int = 1) -> np.ndarray:
        grid = {
            "threadgroups": (-(-threads // 1024), 1, 1),
            "threads_per_threadgroup": (min(threads, 1024), 1, 1),
        }
        program.dispatch(kernel, dict(enumerate(buffers)), **grid)
        return buffers[-1]

    return run


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all((a.view(np.uint16) == b.view(np.uint16)) | (np.isnan(a) & np.isnan(b))))


def test_every_half_has_its_value(dispatch):
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    y = dispatch("widen", x, np.zeros(2**16, np.float32), threads=2**16)
    np.testing.assert_array_equal(y, x.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(y), np.signbit(x))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_floats_round_to_the_nearest_half_and_ties_to_even(dispatch):
    rng = np.random.default_rng(0)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    midpoints = (halves + np.roll(halves, -1)) / 2
    for x in (
        rng.integers(0, 2**32, 2**16, dtype=np.uint32).view(np.float32),
        (rng.standard_normal(2**16) * 10.0 ** rng.integers(-9, 6, 2**16)).astype(np.float32),
        midpoints,
        np.nextafter(midpoints, np.float32(np.inf)),
        np.nextafter(midpoints, np.float32(-np.inf)),
    ):
        assert same(dispatch("narrow", x, np.zeros(2**16, np.float16), threads=2**16), x.astype(np.float16))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_halves_among_themselves_round_every_step(dispatch):
    x = np.random.default_rng(0).integers(0, 2**16, 4098, dtype=np.uint16).view(np.float16)
    y = dispatch("halves", x, np.zeros(4096, np.float16), threads=4096)
    assert same(y, x[:-2] * x[1:-1] - x[2:])


def test_sizes_and_alignments(dispatch):
    assert dispatch("sizes", np.zeros(8, np.uint32)).tolist() == [16, 4, 4, 8, 64, 8, 8, 1]


def test_vectors_of_three_take_the_room_of_four(dispatch):
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    y = dispatch("vectors", x, np.zeros(8, np.float32), threads=8)
    np.testing.assert_array_equal(y, 3 * (x[:, 0] + 10 * x[:, 1] + 100 * x[:, 2]))


def test_functions(dispatch):
    assert dispatch("functions", np.zeros(8, np.float32)).tolist() == [3, 10, 2, 1, 8, -1, 0.5, 3]
