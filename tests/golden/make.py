"""Made the golden files in this folder, once, with version 0.1.0. They are never made again.

A format that changes gets new files beside the old ones, because readers must go on reading what exists. Run
with the name of an empty folder to see what this version would write: `python tests/golden/make.py FOLDER`.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import scipy.sparse

from upg_jax import MdCSR, save


def weights() -> np.ndarray:
    """A matrix with an empty row, a full row, gaps of 254 to 600 columns, and its last column in use."""
    w = np.zeros((6, 700), np.float32)
    w[0, [0, 5, 12, 15]] = [1.0, -0.5, 0.25, 127.0]
    w[2, [254, 509, 699]] = [0.1, -0.2, 0.3]
    w[3, 600] = -3.0
    w[4] = np.sin(np.arange(700, dtype=np.float32) + 1)
    w[5, [0, 255, 511]] = [1e-3, 1e3, -1e3]
    return w


def v1_content() -> dict:
    pattern = scipy.sparse.csr_matrix(weights()[:4])
    values = np.array([1, -2, 3, -127, 4, 5, -6, 7], np.int8)
    planes = {"shape": (4, 700), "values": values}
    return {
        "model_type": "llama",
        "source": "golden",
        "compression_method": "prime_sparse_v1",
        "tensors": {
            "absolute": {
                **planes,
                "indices": pattern.indices.astype(np.int32),
                "row_pointers": pattern.indptr.astype(np.int32),
                "scales": np.array([0.5, 1.0, 2.0, 0.25], np.float32),
                "prime_indices": np.array([0, 1, 2, 9999, 500, 0, 77, 4], np.uint16),
            },
            "deltas": {
                **planes,
                "values": np.array([1, -2, 3, -127], np.int8),
                "delta_indices": np.array([0, 5, 7, 3], np.uint8),
                "indptr": np.array([0, 4, 4, 4, 4], np.int64),
                "scales": 0.125,
            },
            "scipy_int8": scipy.sparse.csr_matrix((values, pattern.indices, pattern.indptr), pattern.shape),
            "scipy_float": pattern,
            "norm": np.arange(5, dtype=np.float16),
        },
    }


def main(folder: Path) -> None:
    """Writes every golden file to a folder."""
    w = weights()
    dense = {"norm": np.arange(7, dtype=np.float32), "embed": w[:2, :9].astype(ml_dtypes.bfloat16)}
    options = {"metadata": {"license": "Apache-2.0"}, "model": {"layers": 1}, "provenance": {"by": "make.py"}}
    for manifold in ("unit", "prime"):
        layers = {f"layers.{i}.w": MdCSR.from_dense(w * (i + 1), manifold=manifold) for i in range(2)}
        layers["aligned"] = MdCSR.from_dense(w.astype(ml_dtypes.bfloat16), manifold=manifold, row_alignment=8)
        save(folder / f"{manifold}.safetensors", layers | dense, **options)
    # Of format version 2.1.
    narrow = {
        f"{index}.{bits}bits": MdCSR.from_dense(w, value_bits=bits, group_size=size, index=index)
        for index, bits, size in (("delta8", 4, 32), ("mask", 4, 64), ("mask", 3, 64), ("dense", 3, 128))
    }
    save(folder / "narrow.safetensors", narrow | dense, **options)
    (folder / "sharded").mkdir()
    save(folder / "sharded" / "model.safetensors", layers | dense, **options, max_shard_bytes=8_000)
    (folder / "v1_protocol4.upg").write_bytes(pickle.dumps(v1_content(), protocol=4))
    # NumPy 1 and older scipy had their classes elsewhere.
    old = pickle.dumps(v1_content(), protocol=2).replace(b"numpy._core", b"numpy.core")
    (folder / "v1_protocol2.upg").write_bytes(old.replace(b"scipy.sparse._csr", b"scipy.sparse.csr"))
    entry = {
        "name": "w",
        "shape": [6, 700],
        "dtype": "float32",
        "original_bytes": 16800,
        "compressed_bytes": 4200,
    }
    entry |= {"compression_method": "prime_sparse_v1", "sparsity_level": 0.5, "quantization": "int8"}
    entry["manifold_encoded"] = True
    catalogue = {"files": [{"filename": "model.safetensors", "tensors": [entry]}]}
    (folder / "v1_catalogue.upg").write_bytes(pickle.dumps(catalogue, protocol=4))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
