"""The Apple device over the stand-in: what is compiled when, how errors come back, what can be opened."""

from __future__ import annotations

import concurrent.futures
import ctypes
import sys
import types

import numpy as np
import pytest
from helpers.apple import add, memory, watched

import metal_ops
from metal_ops import KernelError, Launch, UnavailableError, open_emulated_device
from metal_ops._standin import MetalRuleError, StandIn, _metal
from metal_ops._standin._open import _compile


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


def test_plans_keep_to_the_threads_that_the_compiler_allows():
    device = open_emulated_device(max_threads=96)
    work = metal_ops.Work("transposed", 300, 500, 1000)
    found = device.plan(work)
    assert [step.threads for step in found.steps] == [(96, 1, 1), (96, 1, 1)]
    assert device.plan(work) is found
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
