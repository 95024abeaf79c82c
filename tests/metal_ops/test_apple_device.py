"""The Apple device over the stand-in: how memory reaches kernels, what is compiled when, how errors come back."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import gc
import mmap
import sys
import types

import numpy as np
import pytest

import metal_ops
from metal_ops import KernelError, Launch, Memory, Scratch, UnavailableError, open_emulated_device
from metal_ops._standin import MetalRuleError, StandIn, _metal
from metal_ops._standin._open import _compile

TEXT = """#include <metal_stdlib>
using namespace metal;
kernel void add(device const float* x [[buffer(0)]], device const float* z [[buffer(1)]], device float* y [[buffer(2)]],
                constant uint& n [[buffer(3)]], uint i [[thread_position_in_grid]]) {
    if (i < n) y[i] = x[i] + z[i];
}
kernel void divergent(device float* y [[buffer(2)]], uint lane [[thread_index_in_simdgroup]]) {
    if (lane < 16) y[lane] = simd_sum(1.0f);
}
"""
PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("metal") / "add.metal"
    path.write_text(TEXT)
    return metal_ops.load_source(path)


class Watched(StandIn):
    """Notes the sizes of the buffers that are asked for, and refuses some."""

    def __init__(self, **behaviour):
        super().__init__(_compile, **behaviour)
        self._sizes, self._refused = [], set()
        self._compiled = []
        inner = self._compile
        self._compile = lambda text: (self._compiled.append(text), inner(text))[1]

    def MTLCreateSystemDefaultDevice(self):  # noqa: N802
        device = super().MTLCreateSystemDefaultDevice()
        make = device.newBufferWithBytesNoCopy_length_options_deallocator_

        class Watching:
            def __getattr__(self, name):
                return getattr(device, name)

            def newBufferWithBytesNoCopy_length_options_deallocator_(_, memory, length, options, free):  # noqa: N802, N805
                self._sizes.append(length)
                if length in self._refused:
                    return None
                return make(memory, length, options, free)

        return Watching()


def watched(copy_bytes=0, **behaviour):
    metal = Watched(**behaviour)
    return metal_ops.Device(metal, metal.autorelease_pool, copy_bytes=copy_bytes), metal


def memory(array, written=False):
    return Memory(array.ctypes.data, array.nbytes, written)


def add(source, x, z, y, count=None):
    count = x.size if count is None else count
    buffers = {0: memory(x), 1: memory(z), 2: memory(y, written=True)}
    constants = {3: np.uint32(count).tobytes()}
    return Launch(source, "add", buffers, constants, (-(-max(count, 1) // 32), 1, 1), (32, 1, 1))


def pages(count):
    """Memory of its own, as a mapped file has."""
    owner = mmap.mmap(-1, count * PAGE)
    return owner, np.frombuffer(owner, np.float32)


@pytest.mark.parametrize("copy_bytes", [0, 1 << 20])
@pytest.mark.parametrize("size", [1, 5, 1000, 5000])
def test_memory_anywhere_gets_the_right_result(source, copy_bytes, size):
    device = open_emulated_device(copy_bytes=copy_bytes)
    heap = np.empty(3 * size + 64, np.float32)
    at = -(heap.ctypes.data // 4) % 16
    x, z, y = (heap[at + i * size + 16 * i :][:size] for i in range(3))
    x[:], z[:], y[:] = np.arange(size), 0.5, np.nan
    device.run([add(source, x, z, y)])
    np.testing.assert_array_equal(y, np.arange(size) + 0.5)


def test_what_shares_pages_becomes_one_buffer(source):
    device, metal = watched()
    _owner, numbers = pages(4)
    x, z, y = numbers[16:32], numbers[64:80], numbers[PAGE // 4 - 8 :][:16]  # y lies across two pages
    x[:], z[:] = 1, 2
    device.run([add(source, x, z, y)])
    np.testing.assert_array_equal(y, 3)
    assert metal._sizes == [2 * PAGE]


def test_distant_memory_is_wrapped_apart(source):
    device, metal = watched()
    _owner, numbers = pages(8)
    x, z, y = (numbers[i * PAGE // 2 :][:16] for i in range(3))  # pages 0, 2 and 4
    device.run([add(source, x, z, y)])
    assert metal._sizes == [PAGE] * 3


def test_what_is_small_is_copied_and_no_page_of_it_wrapped(source):
    device, metal = watched(copy_bytes=64)
    x, z, y = np.ones(16, np.float32), np.ones(16, np.float32), np.empty(16, np.float32)
    for _ in range(3):
        device.run([add(source, x, z, y)])
    np.testing.assert_array_equal(y, 2)
    assert len(metal._sizes) == 1  # the device's own


def test_the_buffer_for_copies_grows(source):
    device, metal = watched(copy_bytes=1 << 30)
    for size in (16, 1 << 18, 32):
        x, y = np.arange(size, dtype=np.float32), np.empty(size, np.float32)
        device.run([add(source, x, x, y)])
        np.testing.assert_array_equal(y, 2 * np.arange(size))
    assert metal._sizes == [1 << 20, 2 << 20]


def test_memory_that_a_kernel_may_not_load_widely_from_is_copied(source):
    device, metal = watched()
    _owner, numbers = pages(2)
    x, z, y = numbers[1:17], numbers[17:33], numbers[33:49]
    x[:], z[:] = 3, 4
    device.run([add(source, x, z, y)])
    np.testing.assert_array_equal(y, 7)
    assert metal._sizes == [1 << 20]


def test_a_refused_wrap_falls_back_to_a_copy(source):
    device, metal = watched()
    metal._refused.add(2 * PAGE)
    size = PAGE // 4
    _owner, numbers = pages(8)
    x, z, y = numbers[16:][:size], numbers[4 * size :][:size], numbers[6 * size + 16 :][:size]
    x[:], z[:] = 1, 2
    device.run([add(source, x, z, y)])
    np.testing.assert_array_equal(y, 3)
    assert metal._sizes == [2 * PAGE, PAGE, 2 * PAGE, 1 << 20]


def test_without_any_buffer_there_is_an_error(source):
    device, _ = watched(max_buffer_length=1 << 19)
    x = np.ones(8, np.float32)
    with pytest.raises(KernelError, match=r"gives no buffer of 1,048,576 bytes"):
        device.run([add(source, x[1:], x[1:], x[1:])])


def test_kept_memory_is_wrapped_once_and_read_in_place(source):
    device, metal = watched(copy_bytes=1 << 20)
    owner, numbers = pages(4)
    numbers[:] = np.arange(numbers.size)
    device.keep(numbers.ctypes.data, numbers.nbytes, owner)
    device.keep(numbers.ctypes.data, numbers.nbytes, owner)
    for at in (0, 16, PAGE // 4 + 16):
        x, y = numbers[at : at + 100], np.empty(100, np.float32)
        device.run([add(source, x, x, y)])
        np.testing.assert_array_equal(y, 2 * x)
    assert sorted(metal._sizes) == [4 * PAGE, 1 << 20]


def test_the_last_page_of_a_file_is_wrapped_to_its_end(source, tmp_path):
    path = tmp_path / "numbers"
    np.arange(PAGE // 4 + 100, dtype=np.float32).tofile(path)
    with path.open("rb") as file:
        owner = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    numbers = np.frombuffer(owner, np.float32)
    device, metal = watched()
    device.keep(numbers.ctypes.data, numbers.nbytes, owner)
    x, y = numbers[-100:], np.empty(100, np.float32)
    device.run([add(source, x, x, y)])
    np.testing.assert_array_equal(y, 2 * x)
    assert 2 * PAGE in metal._sizes


def test_kept_memory_is_forgotten_with_its_owner(source):
    device, _ = watched()
    owner, numbers = pages(4)
    begin = numbers.ctypes.data
    device.keep(begin, numbers.nbytes, owner)
    x, y = numbers[:100], np.zeros(100, np.float32)
    device.run([add(source, x, x, y)])
    assert [r.begin for r in device._regions] == [begin]
    del numbers, owner, x
    gc.collect()
    y[:] = 1
    device.run([add(source, y, y, np.empty(100, np.float32))])
    assert device._regions == []


def test_kept_memory_that_cannot_be_wrapped_is_copied(source):
    device, _ = watched(copy_bytes=1 << 20, max_buffer_length=1 << 20)
    owner, numbers = pages((2 << 20) // PAGE)
    device.keep(numbers.ctypes.data, numbers.nbytes, owner)
    x, y = numbers[:100], np.empty(100, np.float32)
    x[:] = 4
    for _ in range(2):
        device.run([add(source, x, x, y)])
    np.testing.assert_array_equal(y, 8)


def test_resident_bytes_are_wrapped_once(source):
    device, metal = watched(copy_bytes=1 << 20)
    data = np.arange(100, dtype=np.float32).tobytes()
    assert device.resident(data) == device.resident(bytes(bytearray(data)))
    y = np.empty(100, np.float32)
    launch = add(source, y, y, y)
    kept = device.resident(data)
    buffers = {0: kept, 1: kept, 2: memory(y, written=True)}
    for _ in range(2):
        device.run([Launch(source, "add", buffers, launch.constants, launch.threadgroups, launch.threads)])
    np.testing.assert_array_equal(y, 2 * np.arange(100))
    assert sorted(metal._sizes) == [PAGE, 1 << 20]


@pytest.mark.parametrize("copy_bytes", [0, 1 << 20])
def test_launches_of_one_submission_run_in_order_and_share_scratch_memory(source, copy_bytes):
    device, _ = watched(copy_bytes)
    x, y = np.arange(64, dtype=np.float32), np.empty(64, np.float32)
    first, second = add(source, x, x, y), add(source, y, y, y)
    scratch = Scratch(256)
    device.run(
        [
            dataclasses.replace(first, buffers={**first.buffers, 2: scratch}),
            dataclasses.replace(second, buffers={**second.buffers, 0: scratch, 1: memory(x)}),
        ]
    )
    np.testing.assert_array_equal(y, 3 * np.arange(64))
    assert device.command_buffers == 1


def test_empty_memory_can_be_bound(source):
    device, _ = watched()
    nothing = np.empty(0, np.float32)
    device.run([add(source, nothing, nothing, nothing)])


def test_a_source_is_compiled_once(source):
    device, metal = watched()
    device.prepare(source, "add")
    x = np.ones(8, np.float32)
    for kernel in ("add", "divergent", "add"):
        device.prepare(source, kernel)
    device.run([add(source, x, x, x.copy())])
    assert metal._compiled == [source.text]


@pytest.mark.parametrize("math_mode", [True, False])
def test_both_ways_to_ask_for_ieee_math(source, math_mode):
    device = open_emulated_device(math_mode=math_mode)
    x, y = np.ones(8, np.float32), np.empty(8, np.float32)
    device.run([add(source, x, x, y)])
    np.testing.assert_array_equal(y, 2)


def test_errors_name_what_failed(source, tmp_path):
    device, _ = watched()
    with pytest.raises(KernelError, match="add has no kernel 'subtract'"):
        device.prepare(source, "subtract")
    path = tmp_path / "broken.metal"
    path.write_text("#include <metal_stdlib>\nkernel void f(device float* y [[buffer(0)]]) { y = 1 +; }\n")
    with pytest.raises(KernelError, match=r"broken does not compile: .+"):
        device.prepare(metal_ops.load_source(path), "f")
    y = np.zeros(32, np.float32)
    launch = Launch(source, "divergent", {2: memory(y, written=True)}, {}, (1, 1, 1), (32, 1, 1))
    with pytest.raises(KernelError, match=r"divergent: .*simd"):
        device.run([launch])
    # The device goes on.
    x = np.ones(8, np.float32)
    device.run([add(source, x, x, y[:8])])
    np.testing.assert_array_equal(y[:8], 2)


def test_a_launch_that_breaks_a_rule_leaves_the_device_usable(source):
    device, _ = watched()
    x, y = np.ones(8, np.float32), np.empty(8, np.float32)
    good = add(source, x, x, y)
    bad = Launch(source, "add", {0: good.buffers[0]}, good.constants, (1, 1, 1), (32, 1, 1))
    with pytest.raises(MetalRuleError, match="is not set"):
        device.run([bad])
    device.run([good])
    np.testing.assert_array_equal(y, 2)


def test_several_threads(source):
    device, _ = watched(copy_bytes=1 << 20)

    def work(i):
        x, y = np.full(1000, i, np.float32), np.empty(1000, np.float32)
        for _ in range(10):
            device.run([add(source, x, x, y)])
            np.testing.assert_array_equal(y, 2 * i)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert device.command_buffers == 120


def test_the_self_check_catches_a_device_that_computes_something_else(source, monkeypatch):
    device = open_emulated_device()
    metal_ops.check_device(device)
    run = device.run

    def off_by_a_bit(launches):
        run(launches)
        y = launches[0].buffers[9]
        array = np.ctypeslib.as_array((ctypes.c_float * (y.nbytes // 4)).from_address(y.address))
        array[-1] = np.nextafter(array[-1], np.float32(np.inf))

    monkeypatch.setattr(device, "run", off_by_a_bit)
    with pytest.raises(KernelError, match="please report"):
        metal_ops.check_device(device)


class TestOpening:
    """`open_apple_device` with a Metal and an objc that are the stand-in's."""

    @pytest.fixture
    def mac(self, monkeypatch):
        def install(**behaviour):
            metal = StandIn(_compile, **behaviour)
            objc = types.ModuleType("objc")
            objc.autorelease_pool = metal.autorelease_pool
            monkeypatch.setitem(sys.modules, "Metal", metal)
            monkeypatch.setitem(sys.modules, "objc", objc)
            monkeypatch.setattr(sys, "platform", "darwin")
            return metal

        return install

    def test_a_gpu_that_shares_memory(self, mac, source):
        mac()
        device = metal_ops.open_apple_device()
        metal_ops.check_device(device)
        assert device.name == "emulator"

    def test_no_mac(self):
        with pytest.raises(UnavailableError, match="is no Mac"):
            metal_ops.open_apple_device()

    def test_no_pyobjc(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setitem(sys.modules, "Metal", None)
        with pytest.raises(UnavailableError, match=r'pip install "upg-jax\[metal\]"'):
            metal_ops.open_apple_device()

    def test_no_gpu(self, mac, monkeypatch):
        metal = mac()
        monkeypatch.setattr(metal, "MTLCreateSystemDefaultDevice", lambda: None)
        with pytest.raises(UnavailableError, match="has no GPU"):
            metal_ops.open_apple_device()

    def test_a_gpu_with_memory_of_its_own(self, mac):
        mac(unified_memory=False)
        with pytest.raises(UnavailableError, match="does not share memory"):
            metal_ops.open_apple_device()


def test_simdgroups_of_another_width_are_refused(source, monkeypatch):
    monkeypatch.setattr(_metal, "_SIMD_WIDTH", 16)
    with pytest.raises(KernelError, match="this device has 16"):
        open_emulated_device().prepare(source, "add")
