"""On an NVIDIA GPU: `JAX_PLATFORMS=cuda,cpu python -m pytest tests/cuda`.

The products, derivatives and transforms are tested there by
`JAX_PLATFORMS=cuda,cpu UPG_JAX_BACKEND=cuda python -m pytest tests/sparse_dense`.
"""

from __future__ import annotations

import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case
from sharding import models
from sharding.models import GREEDY, PROMPTS

from upg_jax import UPGModel, _cuda, sparse_dense, stack, use_backend

pytestmark = pytest.mark.skipif(_cuda.no_gpu_reason() is not None, reason=f"cuda: {_cuda.no_gpu_reason()}")
CHECKS = [jax.export.DisabledSafetyCheck.custom_call(_cuda.LAUNCH)]
CASE = Case("random", (300, 1000), "prime")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("batch", [1, 2, 5, 16, 40, 100])
def test_products_are_within_the_bound(batch, manifold, dtype):
    case = Case("random", (300, 1000), manifold)
    x = jax.random.normal(jax.random.key(batch), (batch, 1000), dtype)
    y = jax.jit(sparse_dense)(x, case.layer)
    w = np.asarray(case.layer.to_dense(jnp.float32), np.float64)
    assert_within_bound(y, lambda x, w: x @ w.T, x, w, terms=1002, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_products_of_many_columns_are_within_the_bound(batch, manifold, dtype):
    case = Case("random", (70, 20_000), manifold)
    x = jax.random.normal(jax.random.key(batch), (batch, 20_000), dtype)
    y = jax.jit(sparse_dense)(x, case.layer)
    w = np.asarray(case.layer.to_dense(jnp.float32), np.float64)
    assert_within_bound(y, lambda x, w: x @ w.T, x, w, terms=20_002, dtype=dtype)


@pytest.mark.parametrize("manifold", ["unit", "prime"])
def test_decoded_weights_are_the_reference_s_bits(manifold):
    layer = Case("random", (300, 1000), manifold).layer
    with use_backend("reference"):
        expected = layer.to_dense(jnp.float32)
    np.testing.assert_array_equal(layer.to_dense(jnp.float32), expected)


def test_donated_vectors_in_a_loop_over_layers():
    layers = stack([Case("random", (67, 67), seed=i).layer for i in range(3)])

    def step(x, i):
        return jnp.tanh(sparse_dense(x, layers, index=i)), None

    donating = jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(3))[0], donate_argnums=0)
    x = jax.random.normal(jax.random.key(0), (67,))
    with use_backend("reference"):
        expected = jax.lax.scan(step, x, jnp.arange(3))[0]
    np.testing.assert_allclose(donating(x), expected, rtol=1e-5, atol=1e-6)


def test_greedy_tokens_of_a_model_are_the_reference_s(tmp_path):
    path = models.write(tmp_path, "llama")

    def tokens(backend):
        with use_backend(backend), jax.default_matmul_precision("highest"):
            model = UPGModel.from_file(path, pack=False)
            return [one.ids for one in model.generate(PROMPTS, **GREEDY)]

    assert tokens("cuda") == tokens("reference")


def test_products_in_a_loop_lie_in_a_command_buffer():
    """A CUDA graph: what XLA has put into one is a computation of that name in the compiled program."""
    layers = stack([Case("random", (67, 67), seed=i).layer for i in range(8)])

    def step(x, i):
        for _ in range(8):  # XLA makes no graph of a few kernels
            x = jnp.tanh(sparse_dense(x, layers, index=i))
        return x, None

    looped = jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(8))[0])
    with use_backend("cuda"):
        text = looped.lower(jnp.ones(67)).compile().as_text()
    # Of a computation, the head and the closing brace alone stand at the beginning of a line.
    found = re.findall(r"^(\S.*) {\n((?: .*\n)+)}", text, re.MULTILINE)
    launching = [head for head, lines in found if _cuda.LAUNCH in lines]
    assert launching
    assert all("command_buffer" in head for head in launching)


def test_a_saved_program_runs_in_a_process_that_never_lowered_one(tmp_path):
    x = jnp.linspace(-1, 1, 1000)
    exported = jax.export.export(jax.jit(lambda x: sparse_dense(x, CASE.layer)), disabled_checks=CHECKS)(x)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.save(tmp_path / "y.npy", sparse_dense(x, CASE.layer))
    code = """
import sys, jax, numpy as np, upg_jax
from pathlib import Path
upg_jax.sparse_dense
folder = Path(sys.argv[1])
y = jax.export.deserialize((folder / "program").read_bytes()).call(jax.numpy.linspace(-1, 1, 1000))
np.testing.assert_array_equal(y, np.load(folder / "y.npy"))
"""
    subprocess.run([sys.executable, "-c", "import jax.export\n" + code, str(tmp_path)], check=True)
