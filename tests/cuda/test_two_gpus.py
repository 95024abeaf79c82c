"""On two NVIDIA GPUs of one host, through NCCL: `JAX_PLATFORMS=cuda,cpu pytest tests/cuda/test_two_gpus.py`."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case
from sharding import models
from sharding.models import GREEDY, PROMPTS

from upg_jax import UPGModel, _cuda, combine, partition, shard, sparse_dense, use_backend


def _gpus() -> list:
    return [] if _cuda.no_gpu_reason() else [d for d in jax.devices() if d.platform in ("gpu", "cuda")]


pytestmark = pytest.mark.skipif(len(_gpus()) < 2, reason="needs two NVIDIA GPUs that JAX can use")
CASE = Case("random", (301, 1003), "prime")


@pytest.fixture
def mesh():
    return jax.sharding.Mesh(np.array(_gpus()[:2]), ("model",))


@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("batch", [1, 16, 100])
def test_products_and_gradients(batch, dim, mesh):
    params, rest = partition(shard(CASE.layer, mesh, "model", dim))
    x, ct = CASE.x(batch), CASE.cotangent(batch)

    @jax.jit
    def value_and_pullback(x, params, ct):
        y, vjp = jax.vjp(lambda x, p: sparse_dense(x, combine(p, rest)), x, params)
        return y, *vjp(ct)

    with use_backend("cuda"):
        y, x_bar, _ = value_and_pullback(x, params, ct)
    assert_within_bound(y, lambda x, w: x @ w.T, x, CASE.weight, terms=CASE.terms + 2)
    assert_within_bound(x_bar, lambda g, w: g @ w, ct, CASE.weight, terms=CASE.terms + 2)


@pytest.mark.parametrize(("dim", "expected"), [("out", set()), ("in", {"all-reduce"})])
def test_only_products_are_sent(dim, expected, mesh):
    layer = shard(Case("random", (300, 1000)).layer, mesh, "model", dim)
    with use_backend("cuda"):
        text = jax.jit(sparse_dense).lower(jnp.ones((4, 1000)), layer).compile().as_text()
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert set(re.findall(rf" ({names})(?:-start)?\(", text)) == expected


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3", "mixtral"])
def test_the_same_tokens_as_on_one_gpu(name, mesh, tmp_path):
    path = models.write(tmp_path, name)
    expected = [one.ids for one in UPGModel.from_file(path).generate(PROMPTS, **GREEDY)]
    model = UPGModel.from_file(path, mesh=mesh)
    assert [one.ids for one in model.generate(PROMPTS, **GREEDY)] == expected
