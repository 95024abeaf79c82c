"""What `sparse_dense` is compared with on NVIDIA GPUs, as far as it runs on a CPU."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.filterwarnings("ignore:Sparse")  # torch calls its support a beta
def test_torchs_sparse_product_takes_int32_indices(rng):
    torch = pytest.importorskip("torch", reason='pip install "upg-jax[oracle]"')
    from benchmarks._nvidia_peers import csr_of

    dense = rng.integers(-3, 4, (33, 67)) * (rng.random((33, 67)) < 0.3)
    x = rng.integers(-3, 4, 67)
    matrix = csr_of(torch.tensor(dense, dtype=torch.float32))
    planes = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    assert [plane.dtype for plane in planes] == [torch.int32, torch.int32, torch.float32]
    y = torch.mv(matrix, torch.tensor(x, dtype=torch.float32))
    np.testing.assert_array_equal(y.numpy(), dense @ x)
