"""Which dtype comes out of every path, from `eval_shape` alone, so that it costs nothing."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case
from helpers.versions import enable_x64

from upg_jax import combine, partition, sparse_dense, stack

CASE = Case("random", (13, 13), "prime")
DTYPES = ("float32", "bfloat16", "float16")
LAYERS = stack([CASE.layer] * 2)
PARAMS, REST = partition(CASE.layer)

PATHS = {
    "plain": lambda x: sparse_dense(x, CASE.layer),
    "vector": lambda x: sparse_dense(x[0], CASE.layer),
    "jit": lambda x: jax.jit(sparse_dense)(x, CASE.layer),
    "spmv": lambda x: CASE.layer.spmv(x[0]),
    "bias of x's dtype": lambda x: sparse_dense(x, CASE.layer, jnp.ones(13, x.dtype)),
    "float32 bias": lambda x: sparse_dense(x, CASE.layer, jnp.ones(13)),
    "vmap": lambda x: jax.vmap(lambda x: sparse_dense(x, CASE.layer))(x),
    "vmap over layers": lambda x: jax.vmap(sparse_dense, (None, 0))(x, LAYERS),
    "index": lambda x: sparse_dense(x, LAYERS, index=1),
    "array of indices": lambda x: sparse_dense(x, LAYERS, index=jnp.array([0, 1, 0])),
    "scan": lambda x: jax.lax.scan(lambda x, w: (sparse_dense(x, w), None), x, LAYERS)[0],
    "gradient of x": lambda x: jax.grad(lambda x: sparse_dense(x, CASE.layer).sum())(x),
    "tangent": lambda x: jax.jvp(lambda x: sparse_dense(x, CASE.layer), (x,), (x,))[1],
    "transpose": lambda x: jax.linear_transpose(lambda x: sparse_dense(x, CASE.layer), x)(x)[0],
    "hessian": lambda x: jax.hessian(lambda x: (sparse_dense(x, CASE.layer) ** 2).sum())(x),
    "gradient of the bias": lambda x: jax.grad(lambda b: sparse_dense(x, CASE.layer, b).sum())(
        jnp.ones(13, x.dtype)
    ),
}
SCALES = {
    "gradient of scales": lambda x: (
        jax.grad(lambda p: sparse_dense(x, combine(p, REST)).astype(jnp.float32).sum())(PARAMS).scales
    ),
    "gradient of scales in vmap": lambda x: (
        jax.vmap(
            jax.grad(lambda p, x: sparse_dense(x, combine(p, REST)).astype(jnp.float32).sum()), (None, 0)
        )(PARAMS, x).scales
    ),
    "gradient of a float32 bias": lambda x: jax.grad(
        lambda b: sparse_dense(x, CASE.layer, b).astype(jnp.float32).sum()
    )(jnp.ones(13)),
}


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    with enable_x64() if request.param else contextlib.nullcontext():
        yield request.param


def dtype_out(f, dtype) -> str:
    return str(jax.eval_shape(f, jax.ShapeDtypeStruct((3, 13), dtype)).dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_returns_the_dtype_of_x(dtype, x64):
    assert {
        name: dtype_out(path, dtype) for name, path in PATHS.items() if not x64 or "bias" not in name
    } == {name: dtype for name in PATHS if not x64 or "bias" not in name}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_float32_parameters_are_float32(dtype):
    assert {name: dtype_out(path, dtype) for name, path in SCALES.items()} == dict.fromkeys(SCALES, "float32")


def test_results_are_never_weakly_typed():
    y = jax.eval_shape(lambda x: sparse_dense(x * 1.0, CASE.layer), jax.ShapeDtypeStruct((3, 13), "float32"))
    assert not y.weak_type


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32", "bool", "complex64"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"float32, bfloat16 or float16; got {dtype}"):
        dtype_out(PATHS["plain"], dtype)


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_64_bit_inputs_are_refused_where_they_exist(dtype):
    with enable_x64(), pytest.raises(TypeError, match=f"float32, bfloat16 or float16; got {dtype}"):
        dtype_out(PATHS["plain"], dtype)


@pytest.mark.parametrize("dtype", ["float64", "int32"])
def test_other_biases_are_refused(dtype):
    with enable_x64(), pytest.raises(TypeError, match=f"bias must be float32 .* got {dtype}"):
        jax.eval_shape(
            lambda x, b: sparse_dense(x, CASE.layer, b),
            jax.ShapeDtypeStruct((3, 13), "float32"),
            jax.ShapeDtypeStruct((13,), dtype),
        )


def test_values_do_not_depend_on_x64(one_backend):
    x = CASE.x(3)

    def both(x, layers, i):
        y, vjp = jax.vjp(lambda x: sparse_dense(x, layers, index=i), x)
        return y, vjp(y)[0], layers.to_dense()

    for index in (1, [1, 1, 1]):  # as many vectors of one layer, or a layer for each
        narrow = jax.jit(both)(x, LAYERS, jnp.asarray(index))
        with enable_x64():
            wide = jax.jit(both)(x, LAYERS, jnp.asarray(index))
        for a, b in zip(narrow, wide, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [*DTYPES, None])
def test_to_dense_returns_the_dtype_asked_for_or_the_original(dtype):
    for original in DTYPES:
        layer = Case("random", (5, 7), "unit", original).layer
        decoded = jax.eval_shape(lambda a: a.to_dense(dtype), layer)
        assert decoded.dtype == (dtype or original)
        assert decoded.shape == (5, 7)
