"""Tensors as version 1 files hold them, and what they mean."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from oracle import mdcsr as oracle

from upg_jax import UPGDecompressor

PRIMES = np.array(oracle.primes())


def pattern(shape=(9, 700), density=0.05, seed=0) -> scipy.sparse.csr_matrix:
    """A sorted CSR pattern with an empty row, a full row, gaps above 255 and the last column."""
    rng = np.random.default_rng(seed)
    keep = rng.random(shape) < density
    keep[1], keep[2], keep[3] = False, True, False
    keep[3, [254, 509, 699]] = True
    return scipy.sparse.csr_matrix(keep)


def entry(seed=0, primes=False, **changes) -> dict:
    """A tensor with absolute columns, as a dict of planes."""
    csr, rng = pattern(seed=seed), np.random.default_rng(seed)
    planes = {
        "shape": csr.shape,
        "values": (rng.integers(1, 128, csr.nnz) * rng.choice([-1, 1], csr.nnz)).astype(np.int8),
        "indices": csr.indices.astype(np.int32),
        "row_pointers": csr.indptr.astype(np.int32),
        "scales": rng.uniform(0.01, 1, csr.shape[0]).astype(np.float32),
    }
    if primes:
        planes["prime_indices"] = rng.integers(0, 10_000, csr.nnz).astype(np.uint16)
    return planes | changes


def with_deltas(planes: dict) -> dict:
    """The same tensor with deltas and fillers, made entry by entry."""
    values, deltas, primes, pointers = [], [], [], [0]
    for row in range(planes["shape"][0]):
        column = 0
        for i in range(planes["row_pointers"][row], planes["row_pointers"][row + 1]):
            gap = planes["indices"][i] - column
            while gap > 255:
                values.append(0), deltas.append(255), primes.append(0)
                gap -= 255
            values.append(planes["values"][i]), deltas.append(gap)
            primes.append(planes["prime_indices"][i] if "prime_indices" in planes else 0)
            column = planes["indices"][i]
        pointers.append(len(values))
    result = {key: planes[key] for key in ("shape", "scales")}
    result |= {"values": np.array(values, np.int8), "delta_indices": np.array(deltas, np.uint8)}
    if "prime_indices" in planes:
        result["prime_indices"] = np.array(primes, np.uint16)
    return result | {"indptr": np.array(pointers, np.int64)}


def dense(planes: dict) -> np.ndarray:
    """What a dict of absolute columns means, by scipy."""
    level = planes["values"].astype(np.int64)
    if "prime_indices" in planes:
        level = level * PRIMES[planes["prime_indices"]]
    csr = scipy.sparse.csr_matrix((level, planes["indices"], planes["row_pointers"]), planes["shape"])
    scales = np.broadcast_to(np.asarray(planes["scales"], np.float32), planes["shape"][0])
    return csr.toarray().astype(np.float32) * scales[:, None]


def decoded(f: UPGDecompressor, name: str) -> np.ndarray:
    return oracle.decode_layer(f.get_layer(name, device=False))
