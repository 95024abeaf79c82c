"""How memory reaches kernels: wrapped in place or copied, once or for each submission."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import mmap

import numpy as np
import pytest
from helpers.apple import PAGE, add, memory, pages, watched

from metal_ops import KernelError, Launch, Memory, Scratch, open_emulated_device


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
    assert [r.begin for r in device._buffers.regions] == [begin]
    del numbers, owner, x
    gc.collect()
    y[:] = 1
    device.run([add(source, y, y, np.empty(100, np.float32))])
    assert device._buffers.regions == []


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


@pytest.mark.parametrize("copy_bytes", [0, 1 << 20])
def test_a_launch_reads_what_one_before_it_wrote(source, copy_bytes):
    device, _ = watched(copy_bytes)
    x, y, z = np.arange(64, dtype=np.float32), np.full(64, np.nan, np.float32), np.empty(64, np.float32)
    device.run([add(source, x, x, y), add(source, y, x, z)])
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(z, 3 * x)


def test_memory_of_no_bytes_may_lie_behind_a_kept_file(source):
    device, _ = watched()
    owner, numbers = pages(2)
    device.keep(numbers.ctypes.data, numbers.nbytes, owner)
    x, y = numbers[:8], np.empty(8, np.float32)
    x[:] = 2
    launch = add(source, x, x, y)
    behind = Memory(numbers.ctypes.data + numbers.nbytes, 0)
    device.run([dataclasses.replace(launch, buffers={**launch.buffers, 1: behind}, constants={3: bytes(4)})])


def test_kept_memory_that_a_kernel_may_not_load_widely_from_is_copied(source):
    device, _ = watched()
    owner, numbers = pages(2)
    numbers[:] = np.arange(numbers.size)
    device.keep(numbers.ctypes.data, numbers.nbytes, owner)
    y = np.empty(100, np.float32)
    device.run([add(source, numbers[1:101], numbers[4:104], y)])
    np.testing.assert_array_equal(y, numbers[1:101] + numbers[4:104])
    assert device.copied_bytes == 400 + (400 if y.ctypes.data % 16 else 0)


def test_what_is_copied_is_counted(source):
    device, _ = watched(copy_bytes=64)
    owner, numbers = pages(1)
    device.keep(numbers.ctypes.data, numbers.nbytes, owner)
    y = np.empty(16, np.float32)
    for _ in range(2):
        device.run([add(source, numbers[:16], numbers[:16], y)])
    assert device.copied_bytes == 2 * y.nbytes


def test_resident_bytes_are_one_piece_of_memory_for_every_thread(source):
    device, _ = watched()
    data = [bytes([i]) * 1000 for i in range(50)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(device.resident, data * 8))
    assert found == found[:50] * 8
    assert len(device._buffers.regions) == 50
