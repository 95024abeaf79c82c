"""Programs for NVIDIA GPUs, made where there is none: what they call, with what, and that NVRTC compiles it."""

from __future__ import annotations

import itertools
import json
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.backends import needs_four_devices
from helpers.bounds import assert_within_bound
from helpers.layers import Case
from helpers.versions import needs
from jax.sharding import NamedSharding, PartitionSpec

import metal_ops
from upg_jax import BackendError, MdCSR, _cuda, pack, shard, sparse_dense, stack, use_backend
from upg_jax._sparse_dense import _cuda_lowering
from upg_jax._sparse_dense._primitive import operands

pytestmark = pytest.mark.skipif(
    _cuda.unavailable_reason() is not None, reason=f"cuda: {_cuda.unavailable_reason()}"
)
MANY = [Case("random", (330, 670), manifold) for manifold in ("unit", "prime")]
UNIT, PRIME = Case("random", (33, 67)), Case("random", (33, 67), "prime")
CHECKS = [jax.export.DisabledSafetyCheck.custom_call(_cuda.LAUNCH)]


def program(f, *args) -> str:
    return jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=CHECKS)(*args).mlir_module()


def kernels(text: str) -> list[str]:
    return re.findall(r'kernel = "([^"]+)"', text)


@pytest.mark.parametrize("case", [UNIT, PRIME], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("batch", "vectors"), [((), 1), ((1,), 1), ((2, 1), 2), ((3,), 4), ((9,), 16)])
def test_products_of_few_vectors_are_one_call(case, dtype, batch, vectors):
    text = program(sparse_dense, jnp.ones((*batch, 67), dtype), case.layer)
    (name,) = kernels(text)
    file, macros, kernel = name.split("/")
    assert file == "sparse_matvec_stream"
    assert f"VECTORS={min(vectors, 8) if dtype == 'float32' else vectors}" in macros.split(",")
    assert kernel == f"sparse_matvec_stream_{case.manifold}_{dtype}"
    assert f"tensor<1x{case.layer.values.shape[0]}xi8>" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_are_rounded_by_the_kernel_unless_something_is_added(dtype):
    x, bias = jnp.ones((2, 67), dtype), jnp.ones(33, dtype)
    text = program(sparse_dense, x, PRIME.layer)
    assert "ROUNDED=1" in text
    assert "stablehlo.convert" not in text
    assert "ROUNDED" not in program(sparse_dense, x, PRIME.layer, bias)
    derivative = jax.jvp(lambda x: sparse_dense(x, PRIME.layer), (x,), (x,))[1]
    assert derivative.dtype == dtype


def test_vectors_that_do_not_fit_in_shared_memory_are_taken_in_tiles_of_columns():
    layer = Case("last_column", (3, 20_000)).layer
    (name,) = kernels(program(sparse_dense, jnp.ones((9, 20_000), "bfloat16"), layer))
    assert set(name.split("/")[1].split(",")) >= {"TILED=1", "VECTORS=16"}


def test_a_layer_of_a_stack_is_read_in_place():
    layers = stack([UNIT.layer] * 3)
    text = program(lambda x, s, i: sparse_dense(x, s, index=i), jnp.ones(67), layers, jnp.int32(1))
    (call,) = [line for line in text.splitlines() if "custom_call" in line and _cuda.LAUNCH in line]
    assert f"tensor<3x{layers.values.shape[1]}xi8>" in call
    assert "dynamic_slice" not in text


def test_a_vmapped_stack_is_one_call():
    text = program(jax.vmap(sparse_dense, (None, 0)), jnp.ones((2, 67)), stack([PRIME.layer] * 3))
    assert len(kernels(text)) == 1


@pytest.mark.parametrize(("case", "dtype"), [(MANY[0], "bfloat16"), (MANY[1], "float32")])
def test_many_vectors_multiply_dense_levels_that_are_exact(case, dtype):
    x = jnp.ones((512, 670), "bfloat16" if dtype == "bfloat16" else "float16")
    text = program(sparse_dense, x, case.layer)
    (name,) = kernels(text)
    assert name.split("/")[2] == f"mdcsr_levels_{case.manifold}_{dtype}"
    (product,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert product.count("f32" if dtype == "float32" else "bf16") >= 2
    assert product.rstrip().split("->")[1].count("f32") == 1


def test_float32_vectors_meet_narrow_levels_as_three_bfloat16_ones():
    text = program(sparse_dense, jnp.ones((512, 670)), MANY[0].layer)
    assert [name.split("/")[2] for name in kernels(text)] == ["mdcsr_levels_unit_bfloat16"]
    assert "tensor<1x1536x670xbf16>" in text
    x = jax.random.normal(jax.random.key(0), (1, 5, 67)) * jnp.logspace(-20, 12, 5)[None, :, None]
    parts = _cuda_lowering._three_parts(x)
    assert {part.dtype for part in parts} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in parts), x)
    largest = jnp.finfo(jnp.float32).max
    assert sum(float(part) for part in _cuda_lowering._three_parts(largest)) == largest


def test_prime_levels_meet_bfloat16_vectors_as_three_bfloat16_matrices():
    text = program(sparse_dense, jnp.ones((512, 670), "bfloat16"), MANY[1].layer)
    assert [name.split("/")[2] for name in kernels(text)] == ["mdcsr_levels_prime_float32"]
    (product,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert "tensor<1x3x330x670xbf16>" in product
    assert "HIGHEST" not in product


def test_products_of_prime_levels_as_three_matrices_are_within_the_bound():
    case = PRIME
    assert np.abs(case.levels).max() > 2**16  # more than two parts hold
    x = np.asarray(case.x(9), "bfloat16")
    y = jax.jit(_cuda_lowering._multiply, static_argnums=2)(x[None], case.levels[None].astype(np.float32), 2)[
        0
    ]
    assert_within_bound(y, lambda x, q: x @ q.T, x, case.levels, terms=case.terms)


@pytest.mark.parametrize(
    ("layers", "vectors", "scatters"), [(1, 1, False), (1, 4, False), (40, 1, True), (40, 4, True)]
)
def test_gradients_scatter_where_dense_levels_would_take_gigabytes(layers, vectors, scatters):
    work = metal_ops.Work(
        operation="transposed", rows=35840, columns=5120, capacity=18_350_080, layers=layers, groups=layers,
        vectors=vectors, manifold="unit", dtype="bfloat16",
    )  # fmt: skip
    assert _cuda_lowering.dense_is_faster(work) is not scatters


@pytest.mark.parametrize(("dtype", "scatters"), [("float32", False), ("bfloat16", True)])
def test_prime_levels_count_with_their_bfloat16_parts(dtype, scatters):
    work = metal_ops.Work(
        operation="transposed", rows=40960, columns=8192, capacity=1 << 25, layers=1, groups=1, vectors=4,
        manifold="prime", dtype=dtype,
    )  # fmt: skip
    assert _cuda_lowering.dense_is_faster(work) is not scatters


def test_groups_that_share_a_layer_scatter_their_gradients():
    layers = stack([UNIT.layer] * 2)
    text = program(lambda g, i: jax.vjp(lambda x: sparse_dense(x, layers, index=i), jnp.ones((3, 67)))[1](g),
                   jnp.ones((3, 33)), jnp.array([0, 1, 1]))  # fmt: skip
    assert kernels(text)[0].split("/")[2] == "dense_sparse_unit_float32"


def test_gradients_and_decoding_have_kernels_of_their_own():
    x = jnp.ones(67)
    text = program(jax.grad(lambda x, layer: sparse_dense(x, layer).sum()), x, UNIT.layer)
    assert next(k.split("/")[2] for k in kernels(text)) == "mdcsr_levels_unit_bfloat16"
    text = program(lambda layer: layer.to_dense(), PRIME.layer)
    assert [k.split("/")[2] for k in kernels(text)] == ["mdcsr_decode_prime"]


def test_columns_beyond_shared_memory_take_the_kernel_that_stages_nothing():
    layer = Case("last_column", (3, 70_000)).layer
    (name,) = kernels(program(sparse_dense, jnp.ones(70_000), layer))
    assert name.split("/")[0] == "sparse_matvec_simd"


@needs_four_devices
@needs("shard_map")
@pytest.mark.parametrize(("dim", "block"), [("out", (83, 670)), ("in", (330, 168))])
@pytest.mark.parametrize(("batch", "kernel"), [(1, "sparse_matvec_stream"), (512, "mdcsr_levels")])
def test_a_sharded_layer_is_one_call_for_a_device_s_block(dim, block, batch, kernel):
    layer = shard(MANY[1].layer, jax.make_mesh((4,), ("model",)), "model", dim)
    text = program(sparse_dense, jnp.ones((batch, 670)), layer)
    ((file, _, _),) = [name.split("/") for name in kernels(text)]
    assert file == kernel
    (call,) = [line for line in text.splitlines() if "custom_call" in line and _cuda.LAUNCH in line]
    assert f"tensor<1x{block[0] + 1}xui32>" in call
    assert f"x{block[1]}xf32>" in call
    assert text.count("all_reduce") == (dim == "in")
    assert "all_gather" not in text


@needs_four_devices
@needs("shard_map")
@pytest.mark.parametrize("types", ["Explicit Explicit", "Explicit Auto"])
@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize(("batch", "kernel"), [(2, "sparse_matvec_stream"), (512, "mdcsr_levels")])
def test_vmap_over_sharded_vectors_and_a_sharded_layer_is_one_call(batch, kernel, dim, types):
    types = tuple(getattr(jax.sharding.AxisType, name) for name in types.split())
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=types)
    x = jax.device_put(np.ones((batch, 670), np.float32), NamedSharding(mesh, PartitionSpec("data")))
    text = program(jax.vmap(sparse_dense, (0, None)), x, shard(MANY[0].layer, mesh, "model", dim))
    ((file, _, _),) = [name.split("/") for name in kernels(text)]
    assert file == kernel


def grids(text: str) -> list[list[int]]:
    found = [json.loads(grid) for grid in re.findall(r"grid = dense<(\[[\d, ]+\])>", text)]
    assert len(found) == len(kernels(text))
    return found


def test_more_vectors_than_a_grid_takes_are_multiplied_by_halves():
    """Of as many entries as a plane of 400,000 vectors needs, in shapes alone."""
    planes = {
        "values": ((2_621_440,), "int8"),
        "delta_indices": ((2_621_440,), "uint8"),
        "prime_indices": ((2_621_440,), "uint16"),
        "scales": ((5120,), "float32"),
        "row_pointers": ((5121,), "uint32"),
    }
    layer = MdCSR(
        **{name: jax.ShapeDtypeStruct(*plane) for name, plane in planes.items()}, shape=(5120, 5120)
    )
    text = program(sparse_dense, jax.ShapeDtypeStruct((400_000, 5120), "bfloat16"), layer)
    assert len(grids(text)) == 2
    assert max(max(grid[1:]) for grid in grids(text)) <= 65_535
    text = program(
        lambda g, layer: jax.vjp(lambda x: sparse_dense(x, layer), jnp.zeros((70_000, 5120)))[1](g),
        jax.ShapeDtypeStruct((70_000, 5120), "float32"),
        layer,
    )
    assert max(max(grid[1:]) for grid in grids(text)) <= 65_535


def test_gradients_of_more_vectors_than_a_grid_takes_are_scattered_by_halves():
    layout, scales, planes = operands(UNIT.layer)

    def scattered(g):
        index = jnp.zeros((), jnp.int32)
        return _cuda_lowering.dense_sparse(g, scales, index, *planes, layout=layout, algorithm="sparse")

    text = program(scattered, jax.ShapeDtypeStruct((140_000, 33), "float32"))
    assert {name.split("/")[2] for name in kernels(text)} == {"dense_sparse_unit_float32"}
    assert sorted(grid[1] for grid in grids(text)) == [35_000] * 4
    assert "tensor<140000x67xf32>" in text


@pytest.mark.parametrize("index", ["mask", "dense"])
def test_packed_layers_run_the_reference(index):
    assert kernels(program(sparse_dense, jnp.ones(67), pack(UNIT.layer, index))) == []


@pytest.mark.parametrize("batch", [(), (0,), (2, 0)])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (5, 5)])
def test_empty_operands_launch_nothing(shape, batch):
    layer = Case("zero", shape).layer
    text = program(sparse_dense, jnp.ones((*batch, shape[1])), layer)
    assert kernels(text) == []


def test_without_a_gpu_the_backend_cannot_be_forced():
    if _cuda.no_gpu_reason() is None:
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(BackendError, match="no NVIDIA GPU"), use_backend("cuda"):
        pass


@needs_four_devices
@needs("shard_map")
@pytest.mark.parametrize("dim", ["out", "in"])
def test_rows_of_a_sharded_layer_are_rounded_by_the_kernel_and_sums_over_devices_are_not(dim):
    layer = shard(PRIME.layer, jax.make_mesh((4,), ("model",)), "model", dim)
    text = program(sparse_dense, jnp.ones((2, 67), "bfloat16"), layer)
    assert ("ROUNDED=1" in text) == (dim == "out")
    assert "ROUNDED" not in program(sparse_dense, jnp.ones((2, 67), "bfloat16"), layer, jnp.ones(33))


TILED = [Case("last_column", (3, 20_000), manifold) for manifold in ("unit", "prime")]


@pytest.mark.parametrize(
    ("case", "vectors"),
    [*itertools.product(MANY, (1, 16, 512)), (TILED[0], 16), (TILED[1], 16)],
    ids=str,
)
def test_nvrtc_compiles_what_the_programs_name(case, vectors, tmp_path, monkeypatch):
    monkeypatch.setenv("METAL_OPS_CACHE", str(tmp_path))
    (name,) = kernels(program(sparse_dense, jnp.ones((vectors, case.shape[1]), "bfloat16"), case.layer))
    cubin = metal_ops.compile_named(name, "sm_90")
    assert cubin.startswith(b"\x7fELF")
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"from the cache")
    assert metal_ops.compile_named(name, "sm_90") == b"from the cache"


@pytest.mark.parametrize(
    "name",
    ["nothing//nothing", "sparse_matvec_stream//nothing", "../../etc/passwd", "sparse_matvec_stream/A=1"],
)
def test_names_of_no_kernel_are_refused(name):
    with pytest.raises((metal_ops.SourceError, ValueError)):
        metal_ops.compile_named(name, "sm_90")
