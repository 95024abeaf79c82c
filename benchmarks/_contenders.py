"""Everything that multiplies by a matrix, as functions without arguments that run once and wait.

Contenders inside XLA are one compiled program, for a small shape a chain of `Matrix.chain` products. The others are
called from Python once a product, and so pay for the call; they share their CSR arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from benchmarks._matrices import Matrix
from upg_jax import sparse_dense
from upg_jax.cli._measure import usable_threads

# Nothing larger than this is made for one contender.
MOST_BYTES = 1 << 30
# A contender that is expected to take longer for one product is left out.
MOST_SECONDS = 2.5


def prepare_peers() -> None:
    """Sets the thread count of OpenMP libraries, and how long their idle threads spin; before they are loaded."""
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_threads()))
    # MKL's threads would spin for 200 ms by default, on cores that the next contender needs.
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("mkl") or []:
            if file.name.startswith("libmkl_rt.so"):  # sparse_dot_mkl does not look where pip installs it
                os.environ.setdefault("MKL_RT", str(file.locate()))


@dataclasses.dataclass
class Contenders:
    """What runs for one matrix and batch.

    Attributes:
        calls: name -> runs once.
        per_call: name -> products in that.
        nbytes: name -> bytes that one product reads and writes.
        skipped: name -> why it does not run.
    """

    calls: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)
    per_call: dict[str, int] = dataclasses.field(default_factory=dict)
    nbytes: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def row(self, topic: str, case: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
        """A raw row."""
        return {
            "topic": topic,
            "case": case,
            "per call": self.per_call,
            "bytes": self.nbytes,
            "skipped": self.skipped,
            "seconds": seconds,
        }


@dataclasses.dataclass(frozen=True)
class Peer:
    """A contender from another library.

    Attributes:
        make: from matrix and batch, the call and its number of products.
        nbytes: bytes of its form of a matrix.
        seconds: about what a product takes on one core of today, from matrix and batch.
        package: what must be installed.
    """

    make: Callable[[Matrix, int], tuple[Callable[[], object], int]]
    nbytes: Callable[[Matrix], float]
    seconds: Callable[[Matrix, int], float]
    package: str = "jax"


def contenders(matrix: Matrix, batch: int, peers: Collection[str] | None = None) -> Contenders:
    """All forms of our layer, and peers: all of them, or those named."""
    found = Contenders()
    vectors = 4 * batch * (matrix.rows + matrix.columns)
    for name, layer in matrix.layers.items():
        found.calls[name], found.per_call[name] = _ours(matrix, batch, name)
        found.nbytes[name] = layer.nbytes + vectors
    for name in PEERS if peers is None else peers:
        peer = PEERS[name]
        reason = _unfit(peer, matrix, batch)
        if reason is None:
            try:
                found.calls[name], found.per_call[name] = peer.make(matrix, batch)
                found.nbytes[name] = int(peer.nbytes(matrix)) + vectors
            except ImportError as error:
                reason = f"does not load: {error}"
        if reason:
            found.skipped[name] = reason
    return found


def vectors(matrix: Matrix, batch: int, rows: bool = False) -> np.ndarray:
    """Random vectors `(columns,)`, or `(batch, columns)`; with `rows`, as long as the matrix has rows."""
    length = matrix.rows if rows else matrix.columns
    shape = (length,) if batch == 1 else (batch, length)
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def _unfit(peer: Peer, matrix: Matrix, batch: int) -> str | None:
    if importlib.util.find_spec(peer.package) is None:
        return f"{peer.package} is not installed"
    if peer.nbytes(matrix) > MOST_BYTES:
        return f"takes {peer.nbytes(matrix) / 1e9:.1f} GB"
    if peer.seconds(matrix, batch) > MOST_SECONDS:
        return f"takes about {peer.seconds(matrix, batch):.0f} s"
    return None


def _chain(product: Callable[[jax.Array, Any], jax.Array], columns: int, chain: int) -> Callable:
    """x, matrices -> the product by each in turn, every one on the result of the one before."""

    def run(x: jax.Array, *matrices: Any) -> jax.Array:
        for matrix in matrices:
            x = product(x, matrix)
            if chain > 1:
                x = x[..., :columns]
        return x

    return run


def _jitted(run: Callable, x: jax.Array, operands: Iterator[tuple]) -> Callable[[], object]:
    compiled = jax.jit(run).lower(x, *next(operands)).compile()
    return lambda: jax.block_until_ready(compiled(x, *next(operands)))


def _ours(matrix: Matrix, batch: int, name: str) -> tuple[Callable[[], object], int]:
    stacks = matrix.layer_stacks(name)
    x = jnp.asarray(vectors(matrix, batch))
    if matrix.chain == 1:
        return _jitted(sparse_dense, x, ((layer,) for layer in stacks)), 1

    def run(x: jax.Array, stack: Any) -> jax.Array:
        for i in range(matrix.chain):
            x = sparse_dense(x, stack, index=i)[..., : matrix.columns]
        return x

    return _jitted(run, x, ((stack,) for stack in stacks)), matrix.chain


def _xla_dense(dtype: str) -> Callable[[Matrix, int], tuple[Callable[[], object], int]]:
    def make(matrix: Matrix, batch: int) -> tuple[Callable[[], object], int]:
        # XLA's fastest forms: `x @ w.T` takes 20 times as long as `w @ x` for one vector, 1.5 times for many.
        one = batch == 1
        x = jnp.asarray(vectors(matrix, batch)).astype(dtype)
        product = (lambda x, w: w @ x) if one else (lambda x, wt: x @ wt)
        run = _chain(product, matrix.columns, matrix.chain)
        return _jitted(run, x, matrix.dense_tuples(dtype, transposed=not one)), matrix.chain

    return make


def _jax_sparse(kind: type) -> Callable[[Matrix, int], tuple[Callable[[], object], int]]:
    def build(matrix: Matrix) -> Any:
        csr = matrix.csr
        if kind is sparse.BCSR:
            parts = (csr.data, csr.indices, csr.indptr)
        else:
            coo = csr.tocoo()
            parts = (csr.data, np.stack([coo.row, coo.col], axis=1))
        settings = {"indices_sorted": True, "unique_indices": True}
        return kind(tuple(map(jnp.array, parts)), shape=csr.shape, **settings)

    def make(matrix: Matrix, batch: int) -> tuple[Callable[[], object], int]:
        x = jnp.asarray(vectors(matrix, batch).T)
        nbytes = matrix.csr_bytes + (4 * matrix.nnz if kind is sparse.BCOO else 0)
        operands = matrix.turns(lambda: (build(matrix),), nbytes, kind.__name__)
        return _jitted(lambda x, m: m @ x, x, operands), 1

    return make


def _called(product: Callable[[Any, Any], object], x: Any, matrices: Iterator, chain: int) -> tuple:
    def call() -> None:
        for _ in range(chain):
            product(next(matrices), x)

    return call, chain


def _scipy(matrix: Matrix, batch: int) -> tuple[Callable[[], object], int]:
    x = np.ascontiguousarray(vectors(matrix, batch).T)
    return _called(lambda m, x: m @ x, x, matrix.csr_copies(), matrix.chain)


def _mkl(matrix: Matrix, batch: int) -> tuple[Callable[[], object], int]:
    from sparse_dot_mkl import dot_product_mkl

    x = np.ascontiguousarray(vectors(matrix, batch).T)
    return _called(dot_product_mkl, x, matrix.csr_copies(), matrix.chain)


def _torch() -> Any:
    import torch

    torch.set_num_threads(usable_threads())
    return torch


def _torch_csr(matrix: Matrix, batch: int) -> tuple[Callable[[], object], int]:
    torch = _torch()

    def view(csr: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its sparse tensors beta
            parts = (torch.from_numpy(a) for a in (csr.indptr, csr.indices, csr.data))
            return torch.sparse_csr_tensor(*parts, csr.shape, check_invariants=False)

    x = torch.from_numpy(np.ascontiguousarray(vectors(matrix, batch).T))
    matrices = matrix.turns(lambda: view(matrix.csr.copy()), matrix.csr_bytes, "torch csr")
    return _called(lambda m, x: m @ x, x, matrices, matrix.chain)


def _torch_dense(dtype: str) -> Callable[[Matrix, int], tuple[Callable[[], object], int]]:
    def make(matrix: Matrix, batch: int) -> tuple[Callable[[], object], int]:
        torch = _torch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jax's arrays are read-only, which nobody violates here
            dense = torch.from_numpy(np.asarray(matrix.decoded)).to(getattr(torch, dtype))
        x = torch.from_numpy(vectors(matrix, batch)).to(dense.dtype)
        matrices = matrix.turns(dense.clone, dense.nbytes, "torch", dtype, first=dense)

        @torch.inference_mode()
        def product(w: Any, x: Any) -> object:
            return torch.nn.functional.linear(x, w)

        return _called(product, x, matrices, matrix.chain)

    return make


def _dense_bytes(size: int) -> Callable[[Matrix], float]:
    return lambda m: size * m.rows * m.columns


def _dense_seconds(nanoseconds: float, per_vector: float) -> Callable[[Matrix, int], float]:
    return lambda m, batch: 1e-9 * m.rows * m.columns * (nanoseconds + per_vector * batch)


def _csr_bytes(m: Matrix) -> float:
    return m.csr_bytes


def _sparse_seconds(nanoseconds: float) -> Callable[[Matrix, int], float]:
    return lambda m, batch: 1e-9 * m.nnz * batch * nanoseconds


PEERS = {
    "XLA dense float32": Peer(_xla_dense("float32"), _dense_bytes(4), _dense_seconds(0.2, 0.02)),
    "XLA dense bfloat16": Peer(_xla_dense("bfloat16"), _dense_bytes(2), _dense_seconds(2.5, 0.05)),
    "BCOO": Peer(_jax_sparse(sparse.BCOO), lambda m: 1.5 * m.csr_bytes, _sparse_seconds(8)),
    "BCSR": Peer(_jax_sparse(sparse.BCSR), _csr_bytes, _sparse_seconds(6)),
    "scipy CSR": Peer(_scipy, _csr_bytes, _sparse_seconds(0.6), "scipy"),
    "MKL CSR": Peer(_mkl, _csr_bytes, _sparse_seconds(0.3), "sparse_dot_mkl"),
    "torch CSR": Peer(_torch_csr, _csr_bytes, _sparse_seconds(0.3), "torch"),
    "torch dense float32": Peer(_torch_dense("float32"), _dense_bytes(4), _dense_seconds(0.2, 0.02), "torch"),
    "torch dense bfloat16": Peer(
        _torch_dense("bfloat16"), _dense_bytes(2), _dense_seconds(0.1, 0.01), "torch"
    ),
}
