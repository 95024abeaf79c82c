"""The CUDA driver by ctypes, and how each Metal kernel is launched with it (docs/metal_ops.md)."""

from __future__ import annotations

import ctypes

import numpy as np
from nvidia_layers import Layers

import metal_ops


class Cuda:
    """The few functions of the CUDA driver that this script needs."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)
        device, context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)
        self("cuStreamCreate", ctypes.byref(self.stream), 1)
        name, parts = ctypes.create_string_buffer(100), []
        self("cuDeviceGetName", name, 100, device)
        for attribute in (75, 76, 16):  # compute capability, multiprocessors
            value = ctypes.c_int()
            self("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            parts.append(value.value)
        self.name, self.architecture = name.value.decode(), "sm_{}{}".format(*parts)
        self.multiprocessors = parts[2]

    def __call__(self, function: str, *arguments: object) -> None:
        code = getattr(self.driver, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'?').decode()}")

    def empty(self, size: int) -> ctypes.c_void_p:
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return ctypes.c_void_p(address.value)

    def put(self, array: np.ndarray) -> ctypes.c_void_p:
        array = np.ascontiguousarray(array)
        address = self.empty(array.nbytes)
        self("cuMemcpyHtoD_v2", address, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes))
        return address

    def get(self, address: ctypes.c_void_p, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, np.float32)
        self("cuStreamSynchronize", self.stream)
        self("cuMemcpyDtoH_v2", array.ctypes.data_as(ctypes.c_void_p), address, ctypes.c_size_t(array.nbytes))
        return array

    def seconds(self, launches: list, repeats: int = 30) -> float:
        """Median time of one of the launches, which run as one CUDA graph."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuStreamBeginCapture_v2", self.stream, 0)
        for launch in launches:
            launch()
        self("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        self("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        events = [ctypes.c_void_p() for _ in range(2)]
        for event in events:
            self("cuEventCreate", ctypes.byref(event), 0)
        found = []
        for _ in range(repeats + 3):
            self("cuEventRecord", events[0], self.stream)
            self("cuGraphLaunch", executable, self.stream)
            self("cuEventRecord", events[1], self.stream)
            self("cuEventSynchronize", events[1])
            elapsed = ctypes.c_float()
            self("cuEventElapsedTime", ctypes.byref(elapsed), *events)
            found.append(elapsed.value * 1e-3 / len(launches))
        self("cuGraphExecDestroy", executable)
        self("cuGraphDestroy", graph)
        return float(np.median(found[3:]))


def up(n: int, to: int) -> int:
    return -(-n // to)


class Gpu:
    """Kernels compiled for one GPU, and how each is launched (docs/metal_ops.md)."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.table = cuda.put(metal_ops.prime_table())
        self.compiled: dict = {}

    def source(self, name: str, macros: dict) -> tuple:
        key = (name, tuple(sorted(macros.items())))
        if key not in self.compiled:
            source = metal_ops.load_source(name, macros)
            cubin = metal_ops.compile_cuda(source, self.cuda.architecture)
            module = ctypes.c_void_p()
            self.cuda("cuModuleLoadData", ctypes.byref(module), cubin)
            self.compiled[key] = source.constants, module, metal_ops.translate(source).signatures
        return self.compiled[key]

    def put(self, layers: Layers) -> dict:
        c = self.cuda
        buffers = {1: layers.values, 2: layers.deltas, 5: layers.scales, 6: layers.row_pointers}
        placed = {i: c.put(a) for i, a in buffers.items()}
        return {
            **placed,
            3: self.table,
            4: placed[1] if layers.primes is None else c.put(layers.primes),
            8: placed[5],
        }

    def free(self, buffers: dict) -> None:
        for address in {a.value for a in buffers.values() if a.value != self.table.value}:
            self.cuda("cuMemFree_v2", ctypes.c_void_p(address))

    def launcher(
        self, name: str, host: str, buffers: dict, parameters: bytes, grid, threads: int, memory, macros
    ):
        _, module, signatures = self.source(name, macros)
        function = ctypes.c_void_p()
        self.cuda("cuModuleGetFunction", ctypes.byref(function), module, host.encode())
        held = [
            ctypes.create_string_buffer(parameters, len(parameters))
            if i == 10
            else ctypes.c_void_p(buffers[i].value)
            for i in sorted(signatures[host].buffers())
        ]
        pieces = [memory] if isinstance(memory, int) else memory
        held += [ctypes.c_uint(sum(pieces[:i])) for i in range(len(signatures[host].threadgroup_memory()))]
        memory = sum(pieces)
        if memory > 48 << 10:
            self.cuda("cuFuncSetAttribute", function, 8, memory)
        pointers = (ctypes.c_void_p * len(held))(*[ctypes.addressof(h) for h in held])

        def launch() -> None:
            self.cuda(
                "cuLaunchKernel", function, *grid, threads, 1, 1, memory, self.cuda.stream, pointers, None
            )

        launch.held = held  # type: ignore[attr-defined]
        return launch

    def product(self, name: str, layers: Layers, buffers: dict, dtype: str, vectors: int, groups: int,
                bias: bool = False, threads: int = 128, macros: dict | None = None,
                per_multiprocessor: int = 2):  # fmt: skip
        """A launch of one of the products; buffers 0, 7 and 9 are x, index and y."""
        macros = macros or {}
        rows, columns = layers.shape
        constants = self.source(name, macros)[0]
        tile = min(columns, 8192)
        if name == "sparse_matvec_stream":
            at_once = constants["VECTORS"]
            size = 4 if at_once == 1 or dtype == "float32" else 2
            memory = [up(columns * at_once * size, 16) * 16, 40_000 if layers.manifold == "prime" else 16]
            grid = (
                min(self.cuda.multiprocessors * per_multiprocessor, up(rows, threads // 32)),
                up(vectors, at_once),
                groups,
            )
            parameters = metal_ops.Parameters(
                rows=rows, columns=columns, capacity=layers.values.shape[1], layers=len(layers.values),
                vectors=vectors, groups=groups, has_bias=int(bias),
            )  # fmt: skip
            host = f"{name}_{layers.manifold}_{dtype}"
            return self.launcher(name, host, buffers, parameters.pack(), grid, threads, memory, macros)
        each = {"sparse_matvec": threads, "sparse_matvec_batch": threads // 32}.get(name)
        each = each or threads // 32 * constants["ROWS_PER_SIMDGROUP"]
        parameters = metal_ops.Parameters(
            rows=rows, columns=columns, capacity=layers.values.shape[1], layers=len(layers.values), vectors=vectors,
            groups=groups, tile=tile, has_bias=int(bias),
        )  # fmt: skip
        grid = (up(rows, each), up(vectors, constants.get("VECTORS_PER_PASS", 1)), groups)
        memory = 4 * tile if name == "sparse_matvec_shared" else 0
        host = f"{name}_{layers.manifold}_{dtype}"
        return self.launcher(name, host, buffers, parameters.pack(), grid, threads, memory, macros)

    def transposed(self, layers: Layers, buffers: dict, dtype: str, vectors: int, groups: int, parts: int,
                   threads: int = 128):  # fmt: skip
        """Launches of the transposed product; buffers 0, 7, 11 and 9 are g, index, the parts' sums and y."""
        rows, columns = layers.shape
        parameters = metal_ops.Parameters(
            rows=rows, columns=columns, capacity=layers.values.shape[1], layers=len(layers.values), vectors=vectors,
            groups=groups, parts=parts,
        ).pack()  # fmt: skip
        host, first = f"dense_sparse_{layers.manifold}_{dtype}", {**buffers, 9: buffers[11]}
        grid = (up(parts, threads // 32), vectors, groups)
        launches = [self.launcher("dense_sparse", host, first, parameters, grid, threads, 0, {})]
        second, grid = {0: buffers[11], 9: buffers[9]}, (up(columns, threads), vectors, groups)
        launches += [
            self.launcher("dense_sparse", "dense_sparse_sum", second, parameters, grid, threads, 0, {})
        ]
        return launches

    def decode(self, layers: Layers, buffers: dict, threads: int = 128):
        """A launch that decodes every layer into buffer 9."""
        rows, columns = layers.shape
        tile = min(columns, 1024)
        parameters = metal_ops.Parameters(
            rows=rows, columns=columns, capacity=layers.values.shape[1], layers=len(layers.values), tile=tile
        )
        grid, memory = (up(rows, threads // 32), 1, len(layers.values)), 4 * tile * (threads // 32)
        host = f"mdcsr_decode_{layers.manifold}"
        return self.launcher("mdcsr_decode", host, buffers, parameters.pack(), grid, threads, memory, {})
