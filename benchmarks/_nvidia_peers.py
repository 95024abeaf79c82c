"""What `benchmarks.nvidia` compares with: cuBLAS by JAX and by torch, cuSPARSE, JAX's own sparse product, a copy."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._nvidia_timing import copies_of, graph_of_torch, microseconds, over_stack


def cublas(rows: int, columns: int, batch: int) -> Iterator[dict[str, Any]]:
    """Dense bfloat16 by jitted JAX, alone and for one vector with what may fuse behind it, and by torch."""
    copies = copies_of(2 * rows * columns)
    stack = [jax.random.normal(jax.random.key(i), (rows, columns), jnp.bfloat16) for i in range(copies)]
    x = jax.random.normal(jax.random.key(9), (batch, columns), jnp.bfloat16)
    for then, act in (("", lambda y: y), (", then silu", jax.nn.silu))[: 2 if batch == 1 else 1]:
        call = over_stack(lambda x, s, i, act=act: act(x @ s[i].T), copies)
        taken = microseconds(functools.partial(call, x, stack), copies)
        yield {"contender": f"cuBLAS bf16 (jax){then}", "microseconds": taken}
    stack.clear()
    yield {"contender": "cuBLAS bf16 (torch)", "microseconds": torch_dense(rows, columns, batch, copies)}


def torch_dense(rows: int, columns: int, batch: int, copies: int) -> float:
    import torch

    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
    taken = graph_of_torch(lambda i: torch.mm(x, weights[i].T), copies)
    weights.clear()
    torch.cuda.empty_cache()
    return taken


def csr_of(w: Any) -> Any:
    """A torch matrix as CSR with int32 indices, 8 bytes an entry; torch's own conversion makes int64 ones."""
    import torch

    found = w.to_sparse_csr()
    indices = found.crow_indices().int(), found.col_indices().int()
    return torch.sparse_csr_tensor(*indices, found.values().clone(), size=w.shape)


def cusparse(rows: int, columns: int, density: float) -> dict[str, Any]:
    """torch's product of a float32 CSR matrix and a vector, not captured in a graph."""
    import torch

    w = torch.randn(rows, columns, device="cuda") * (torch.rand(rows, columns, device="cuda") < density)
    matrices = [csr_of(w) for _ in range(copies_of(8 * int(w.count_nonzero())))]
    del w
    x = torch.randn(columns, device="cuda")
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for matrix in matrices:
            torch.mv(matrix, x)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(matrices))
    del matrices
    torch.cuda.empty_cache()
    return {
        "contender": "cuSPARSE float32 (torch)",
        "density": density,
        "microseconds": statistics.median(times),
    }


def bcsr(rows: int, columns: int, density: float) -> dict[str, Any]:
    """`jax.experimental.sparse`."""
    from jax.experimental import sparse as jax_sparse

    w = jax.random.normal(jax.random.key(0), (rows, columns))
    w = jnp.where(jax.random.uniform(jax.random.key(1), w.shape) < density, w, 0)
    matrix = jax_sparse.BCSR.fromdense(w)
    del w
    x = jax.random.normal(jax.random.key(9), (columns,))
    call = jax.jit(lambda m, x: m @ x)
    taken = microseconds(lambda: call(matrix, x), 1, 3)
    return {"contender": "BCSR float32 (jax)", "density": density, "microseconds": taken}


def copy_bandwidth() -> float:
    """Gigabytes a second, read and written, by torch's copy of 1 GiB."""
    import torch

    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    seconds = graph_of_torch(lambda i: b.copy_(a), 4) * 1e-6
    return 2 * a.numel() / seconds * 1e-9
