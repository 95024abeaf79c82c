"""Dispatching: what fits a kernel's signature, what is kept, and what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import metal
from helpers.layers import Case

import metal_ops
from metal_ops import _build, _sanitized
from metal_ops._emulator import _OPTIONS

KERNEL = """#include <metal_stdlib>
using namespace metal;
struct Size { uint n; };
kernel void fill(device float* y [[buffer(0)]], constant Size& size [[buffer(1)]],
                 device const int* x [[buffer(2)]], threadgroup float* s [[threadgroup(0)]],
                 uint3 at [[thread_position_in_grid]], uint3 in_group [[thread_position_in_threadgroup]],
                 uint3 group [[threadgroup_position_in_grid]], uint3 groups [[threadgroups_per_grid]],
                 uint3 threads [[threads_per_threadgroup]], uint3 grid [[threads_per_grid]],
                 uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                 uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]],
                 uint width [[threads_per_simdgroup]]) {
    bool right = at.x == group.x * threads.x + in_group.x && at.y == group.y * threads.y + in_group.y &&
                 at.z == group.z * threads.z + in_group.z && grid.x == groups.x * threads.x &&
                 index == (in_group.z * threads.y + in_group.y) * threads.x + in_group.x && width == 32 &&
                 lane == index % 32 && simdgroup == index / 32 &&
                 simdgroups == (threads.x * threads.y * threads.z + 31) / 32;
    uint flat = (at.z * grid.y + at.y) * grid.x + at.x;
    if (flat < size.n) y[flat] = right ? x[flat] : -1;
}
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "fill.metal"
    path.write_text(KERNEL)
    return metal_ops.Emulator().compile(metal_ops.load_source(path))


def dispatch(program, buffers=None, groups=(2, 3, 2), threads=(5, 3, 4), memory=None, n=720):
    y = np.full(720, np.nan, np.float32)
    given = {0: y, 1: np.uint32(n).tobytes(), 2: np.arange(720, dtype=np.int32), **(buffers or {})}
    program.dispatch(
        "fill",
        {i: b for i, b in given.items() if b is not None},
        threadgroups=groups,
        threads_per_threadgroup=threads,
        threadgroup_memory={0: 64} if memory is None else memory,
    )
    return y


def test_threads_know_their_place_in_grids_of_three_dimensions(program):
    np.testing.assert_array_equal(dispatch(program), np.arange(720))


def test_an_address_serves_as_a_buffer(program):
    x = np.arange(720, dtype=np.int32) * 2
    np.testing.assert_array_equal(dispatch(program, {2: (x.ctypes.data, x.nbytes)}), x)


def test_an_empty_grid_runs_nothing(program):
    assert np.isnan(dispatch(program, groups=(0, 3, 2))).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"buffers": {2: None}}, r"buffer 2 \(x\) is not bound"),
        ({"buffers": {5: b"1"}}, r"takes no buffer 5; it takes \[0, 1, 2\]"),
        ({"buffers": {0: b"1234"}}, r"buffer 0 \(y\) is written, so it cannot be bytes"),
        ({"buffers": {0: np.zeros((8, 8))[:, 1]}}, r"buffer 0 \(y\) must be contiguous and writeable"),
        ({"buffers": {2: np.zeros((8, 8))[:, 1]}}, r"buffer 2 \(x\) must be contiguous"),
        ({"buffers": {0: np.broadcast_to(np.float32(1), (1,))}}, r"buffer 0 \(y\) must be .*writeable"),
        ({"memory": {}}, r"takes threadgroup memory \[0\]; got \[\]"),
        ({"memory": {0: 24}}, "multiples of 16 bytes"),
        ({"memory": {0: 32768 + 16}}, "at most 32768"),
        ({"threads": (33, 8, 4)}, "at most 1024 threads per threadgroup; got 1056"),
        ({"threads": (5, 0, 4)}, "threads at least 1"),
        ({"groups": (5, -1, 4)}, "grids are"),
    ],
)
def test_a_dispatch_that_does_not_fit_is_refused(change, says, program):
    with pytest.raises(metal_ops.KernelError, match=f"^fill: .*{says}"):
        dispatch(program, **change)


def test_an_unknown_kernel_is_refused(program):
    with pytest.raises(metal_ops.KernelError, match="full: no such kernel; this program has fill"):
        program.dispatch("full", {}, threadgroups=(1, 1, 1), threads_per_threadgroup=(1, 1, 1))


def test_a_failed_dispatch_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "k.metal"
    path.write_text(
        """#include <metal_stdlib>
        using namespace metal;
        kernel void k(device float* y [[buffer(0)]], device const int* last [[buffer(1)]],
                      uint i [[thread_position_in_grid]]) {
            if (int(i) >= last[0]) return;
            y[i] = simd_sum(1.0f);
        }"""
    )
    program = metal_ops.Emulator().compile(metal_ops.load_source(path))
    for last in (64, 40, 64, 40, 64):
        y, grid = np.zeros(64, np.float32), {"threadgroups": (1, 1, 1), "threads_per_threadgroup": (64, 1, 1)}
        if last == 64:
            program.dispatch("k", {0: y, 1: np.array([last], np.int32)}, **grid)
            np.testing.assert_array_equal(y, 32)
        else:
            with pytest.raises(metal_ops.KernelError, match="returned"):
                program.dispatch("k", {0: y, 1: np.array([last], np.int32)}, **grid)


def test_a_source_that_does_not_compile_says_where(tmp_path):
    path = tmp_path / "k.metal"
    path.write_text(
        "#include <metal_stdlib>\nkernel void k(device float* y [[buffer(0)]]) {\n  y[0] = missing;\n}\n"
    )
    with pytest.raises(metal_ops.SourceError, match=r"(?s)does not compile for the emulator:.*k\.metal:3"):
        metal_ops.Emulator().compile(metal_ops.load_source(path))


def test_orders_are_two():
    with pytest.raises(ValueError, match="order"):
        metal_ops.Emulator(order="sideways")


@pytest.mark.slow
def test_lanes_switch_on_64_bit_arm_too(tmp_path, monkeypatch):
    compiler, machine = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not machine:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    planes = metal.Planes.of(Case("random", (33, 670), "prime").layer)
    x = np.random.default_rng(0).standard_normal((1, 2, 670)).astype(np.float32)
    expected = metal.product("sparse_matvec_shared", planes, x, tile=96)

    program = metal_ops.translate(metal.source("sparse_matvec_shared"))
    monkeypatch.setattr(_build, "compiler", lambda: compiler)
    options = ("-O1", "-static", "-DMSL_PROCESS", *_OPTIONS)
    binary = _build.build(program.emulator, options, name="sparse_matvec_shared", suffix=".aarch64")
    script = tmp_path / "run"
    script.write_text(f"#!/bin/sh\nexec {machine} {binary}\n")
    script.chmod(0o755)
    writes = {name: {9} for name in program.signatures}

    def run(kernel, launch, buffers):
        return _sanitized.dispatch(script, kernel, launch, buffers, writes[kernel])

    on_arm = metal_ops.Program(program.signatures, run, reverse=False, threads=1, memory=32 << 10)
    monkeypatch.setattr(metal, "program", lambda *_, **__: on_arm)
    np.testing.assert_array_equal(metal.product("sparse_matvec_shared", planes, x, tile=96), expected)


SCRIPT = """
import sys, metal_ops
metal_ops.Emulator().compile(metal_ops.load_source(sys.argv[1]))
print("compiled")
"""


def start_compiling(path, **environment) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=pipe, stderr=pipe, text=True)


def compile_in_a_process(path, **environment) -> tuple[str, str]:
    return start_compiling(path, **environment).communicate()


def test_a_compiled_program_is_kept_and_needs_no_compilation_again(tmp_path):
    (tmp_path / "k.metal").write_text(
        "#include <metal_stdlib>\nkernel void k(device float* y [[buffer(0)]]) {}\n"
    )
    cache = tmp_path / "cache"
    for _ in range(2):
        assert compile_in_a_process(tmp_path / "k.metal", METAL_OPS_CACHE=str(cache)) == ("compiled\n", "")
        (kept,) = cache.iterdir()  # no temporary file stays behind
        first = kept.stat().st_mtime_ns
        assert kept.name.startswith("k-")
    assert kept.stat().st_mtime_ns == first
    (tmp_path / "k.metal").write_text(
        "#include <metal_stdlib>\nkernel void other(device int* y [[buffer(0)]]) {}\n"
    )
    compile_in_a_process(tmp_path / "k.metal", METAL_OPS_CACHE=str(cache))
    assert len(list(cache.iterdir())) == 2


def test_processes_may_compile_the_same_at_once(tmp_path):
    (tmp_path / "k.metal").write_text(
        "#include <metal_stdlib>\nkernel void k(device float* y [[buffer(0)]]) {}\n"
    )
    cache = str(tmp_path / "cache")
    for process in [start_compiling(tmp_path / "k.metal", METAL_OPS_CACHE=cache) for _ in range(3)]:
        assert process.communicate() == ("compiled\n", "")
    assert len(os.listdir(cache)) == 1


def test_what_is_compiled_is_found_by_another_installation(tmp_path, monkeypatch):
    monkeypatch.setenv("METAL_OPS_CACHE", str(tmp_path / "cache"))
    here = _build.build("int f() { return 1; }", ("-shared", "-fPIC"), name="f", suffix=".so")
    elsewhere = shutil.copytree(_build.INCLUDE, tmp_path / "include")
    monkeypatch.setattr(_build, "INCLUDE", elsewhere)
    _build._headers.cache_clear()
    assert _build.build("int f() { return 1; }", ("-shared", "-fPIC"), name="f", suffix=".so") == here
    (elsewhere / "emulator" / "types.h").write_text("// another version's")
    _build._headers.cache_clear()
    assert _build.build("int f() { return 1; }", ("-shared", "-fPIC"), name="f", suffix=".so") != here
    _build._headers.cache_clear()


def test_without_a_compiler_the_error_says_what_to_install(tmp_path):
    (tmp_path / "k.metal").write_text(
        "#include <metal_stdlib>\nkernel void k(device float* y [[buffer(0)]]) {}\n"
    )
    _, errors = compile_in_a_process(
        tmp_path / "k.metal", PATH=str(tmp_path), METAL_OPS_CACHE=str(tmp_path), CXX=""
    )
    assert "UnavailableError: the emulator needs a C++17 compiler" in errors
    assert "apt install g++" in errors


def test_a_cache_that_cannot_be_written_is_named_with_what_to_do(tmp_path):
    (tmp_path / "k.metal").write_text(
        "#include <metal_stdlib>\nkernel void k(device float* y [[buffer(0)]]) {}\n"
    )
    cache = str(tmp_path / "k.metal" / "cache")
    _, errors = compile_in_a_process(tmp_path / "k.metal", METAL_OPS_CACHE=cache)
    assert f"UnavailableError: the emulator keeps what it compiles in {cache}" in errors
    assert "name another folder in METAL_OPS_CACHE" in errors


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("METAL_OPS_CACHE", str(tmp_path))
    assert _build.cache_directory() == tmp_path
    monkeypatch.delenv("METAL_OPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    expected = tmp_path / "xdg" / "metal_ops" if sys.platform != "darwin" else None
    assert expected is None or _build.cache_directory() == expected
