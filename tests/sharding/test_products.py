"""`sparse_dense` with sharded layers: values and gradients, with and without `jax.shard_map` around, what is sent."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, stacked
from helpers.versions import needs
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from upg_jax import combine, partition, shard, sparse_dense, use_backend
from upg_jax._sparse_dense import unavailable_reason

pytestmark = needs("shard_map")

DEVICES = 4
EVEN, UNEVEN = (16, 24), (10, 23)
each_dim = pytest.mark.parametrize("dim", ["out", "in"])
each_kind = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


@functools.cache
def mesh(kind="Auto"):
    """Of the axes' types: one for both, or two with a space between."""
    data, *model = (getattr(jax.sharding.AxisType, name) for name in kind.split())
    types = (data, *(model or [data]))
    return jax.make_mesh((2, DEVICES), ("data", "model"), axis_types=types)


@functools.cache
def sharded(case, kind, dim):
    return shard(case.layer, mesh(kind), "model", dim)


def put(x, kind, *spec):
    return jax.device_put(x, NamedSharding(mesh(kind), P(*spec)))


def formula(x, w, b):
    return x @ w.T + b


def check(f, case, x, ct, bias, layer):
    """Value and all gradients of `f(x, layer, bias)` against the whole matrix."""
    params, rest = partition(layer)

    def value_and_pullback(x, params, bias, ct):
        y, vjp = jax.vjp(lambda x, p, b: f(x, combine(p, rest), b), x, params, bias)
        return y, *vjp(ct)

    y, x_bar, params_bar, bias_bar = jax.jit(value_and_pullback)(x, params, bias, ct)
    terms = case.terms + DEVICES
    x, ct, bias = map(np.asarray, (x, ct, bias))
    assert_within_bound(y, formula, x, case.weight, bias, terms=terms)
    assert_within_bound(x_bar, lambda g, w: g @ w, ct, case.weight, terms=terms)
    assert_within_bound(bias_bar, lambda g: g.sum(0), ct, terms=terms)
    scales_bar = np.asarray(params_bar.block.scales)[: case.shape[0]]
    assert_within_bound(scales_bar, lambda g, x, q: (g * (x @ q.T)).sum(0), ct, x, case.levels, terms=terms)
    return y


CASES = [
    Case("random", shape, manifold, index=index)
    for shape, (manifold, index) in itertools.product(
        (EVEN, UNEVEN),
        (("unit", "delta8"), ("prime", "delta8"), ("unit", "mask"), ("unit", "dense"), ("prime", "mask")),
    )
]


@each_dim
@each_kind
@pytest.mark.parametrize("added", [False, True], ids=["alone", "bias"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_vectors_are_rounded_once(dtype, added, kind, dim):
    case = CASES[0]
    x = np.asarray(case.x(3), dtype)
    bias = np.linspace(-1, 1, case.shape[0], dtype=np.float32) * added
    y = jax.jit(sparse_dense)(put(x, kind), sharded(case, kind, dim), put(bias, kind) if added else None)
    assert y.dtype == dtype
    assert_within_bound(y, formula, x, case.weight, bias, terms=case.terms + DEVICES, dtype=dtype)


# A mesh's kind of axes and a layer's encoding meet nowhere in the code.
@each_dim
@pytest.mark.parametrize(
    ("kind", "case"),
    [*(("Auto", case) for case in CASES), ("Explicit", CASES[0]), ("Explicit", CASES[6])],
    ids=str,
)
def test_values_and_gradients(case, kind, dim, one_backend):
    y = check(sparse_dense, case, case.x(6), case.cotangent(6), case.cotangent(), sharded(case, kind, dim))
    features = "model" if dim == "out" and case.shape == EVEN else None
    assert y.sharding.is_equivalent_to(NamedSharding(mesh(kind), P(None, features)), 2)


@each_dim
@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_explicit_axes_keep_the_sharding_of_leading_dimensions(case, dim, one_backend):
    spec = P("data", "model" if dim == "out" and case.shape == EVEN else None)
    x, ct = put(case.x(6), "Explicit", "data"), put(case.cotangent(6), "Explicit", *spec)
    y = check(sparse_dense, case, x, ct, case.cotangent(), sharded(case, "Explicit", dim))
    assert jax.typeof(y).sharding.spec == spec


def test_a_row_parallel_product_takes_sharded_features_as_they_are(one_backend):
    case = Case("random", EVEN)
    layer = sharded(case, "Explicit", "in")
    x = put(case.x(6), "Explicit", "data", "model")
    y = check(sparse_dense, case, x, put(case.cotangent(6), "Explicit", "data"), case.cotangent(), layer)
    assert jax.typeof(y).sharding.spec == P("data", None)


def test_vectors_sharded_over_the_layers_axis_are_refused_by_name():
    case = Case("random", EVEN)
    x = put(case.x(8), "Explicit", "model")
    with pytest.raises(
        ValueError, match=r"only the last dimension of x may be sharded over .* 'model'; got .*reshard"
    ):
        sparse_dense(x, sharded(case, "Explicit", "out"))


@each_dim
def test_eager_and_other_dtypes(dim, one_backend):
    case = Case("random", UNEVEN, "prime", "bfloat16")
    y = sparse_dense(case.x(2, 3), sharded(case, "Auto", dim))
    assert_within_bound(
        y, lambda x, w: x @ w.T, case.x(2, 3), case.weight, terms=case.terms + DEVICES, dtype="bfloat16"
    )


def local(dim):
    """Specs of `x`, the bias and the result inside a map."""
    features = [P("data", None), P("data", "model")]
    return features[dim == "in"], P("model") if dim == "out" else P(), features[dim == "out"]


@each_dim
def test_inside_shard_map_the_block_is_used_as_it_is(dim, one_backend):
    case = Case("random", EVEN, "prime")
    layer = sharded(case, "Auto", dim)
    x_spec, bias_spec, y_spec = local(dim)
    f = jax.shard_map(sparse_dense, mesh=mesh(), in_specs=(x_spec, layer.specs, bias_spec), out_specs=y_spec)
    check(f, case, case.x(6), case.cotangent(6), case.cotangent(), layer)


def test_a_layer_that_did_not_come_in_by_its_specs_is_refused():
    case = Case("random", EVEN)
    layer = sharded(case, "Auto", "out")
    f = jax.shard_map(sparse_dense, mesh=mesh(), in_specs=(P(), P()), out_specs=P(None, "model"))
    with pytest.raises(ValueError, match=r"must be this device's block; .*layer\.specs among in_specs"):
        f(case.x(6), layer)


def test_column_then_row_parallel_is_one_sum(one_backend):
    """The two layers of an MLP: features stay where they are in between."""
    up, down = Case("random", (24, 13), "prime"), Case("random", (13, 24), "prime")
    layers = sharded(up, "Auto", "out"), sharded(down, "Auto", "in")
    f = jax.jit(lambda x, up, down: sparse_dense(sparse_dense(x, up), down))
    y = f(up.x(3), *layers)
    terms = up.terms + down.terms + DEVICES
    assert_within_bound(y, lambda x, v, w: x @ v.T @ w.T, up.x(3), up.weight, down.weight, terms=terms)
    assert collectives(f, up.x(3), *layers) == ["all-reduce"]


@each_dim
def test_vmap_over_vectors_and_over_a_stack(dim, one_backend):
    cases = [Case("random", UNEVEN, seed=s) for s in range(3)]
    stack = shard(stacked(*cases), mesh(), "model", dim)
    x = cases[0].x(3, 2)
    weights = np.stack([case.weight for case in cases])
    terms = cases[0].terms + DEVICES
    y = jax.jit(jax.vmap(sparse_dense))(x, stack)
    assert_within_bound(y, lambda x, w: np.einsum("sni,soi->sno", x, w), x, weights, terms=terms)
    y = jax.jit(jax.vmap(lambda x: sparse_dense(x, stack, index=1), 1, 1))(x)
    assert_within_bound(y, lambda x, w: x @ w.T, x, weights[1], terms=terms)


@each_dim
@each_kind
def test_index_and_scan_read_a_stack_in_place(dim, kind, one_backend):
    cases = [Case("random", (13, 13), seed=s) for s in range(3)]
    stack = shard(stacked(*cases), mesh(kind), "model", dim)
    x = cases[0].x(3, 2)
    weights = np.stack([case.weight for case in cases])
    terms = 3 * (cases[0].terms + DEVICES)
    y = jax.jit(sparse_dense)(x, stack, index=jnp.array([2, 0, 2]))
    assert_within_bound(y, lambda x, w: np.einsum("sni,soi->sno", x, w), x, weights[[2, 0, 2]], terms=terms)
    y = jax.jit(lambda x, stack: jax.lax.scan(lambda x, w: (sparse_dense(x, w), None), x, stack)[0])(x, stack)
    assert_within_bound(y, lambda x, u, v, w: x @ u.T @ v.T @ w.T, x, *weights, terms=terms)


MIXED = ["Explicit Auto", "Auto Explicit"]
NARROW = Case("random", (10, 70), row_alignment=8, index="mask", value_bits=4)


@each_dim
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_meshes_of_explicit_and_automatic_axes(case, kind, dim, one_backend):
    """`x` has its vectors over one axis, and its features over the other where its columns are cut."""
    over = "model" if case.shape == EVEN else None
    x = put(case.x(6), kind, "data", over if dim == "in" else None)
    ct = put(case.cotangent(6), kind, "data", over if dim == "out" else None)
    check(sparse_dense, case, x, ct, case.cotangent(), sharded(case, kind, dim))


def every_backend(*names):
    """Sharded products are of the platform's kernels or the reference, which these tests must meet, too."""
    reasons = {name: unavailable_reason(name) for name in names}
    return [
        pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])
        for name, reason in reasons.items()
    ]


@each_dim
@pytest.mark.parametrize("kind", ["Explicit", *MIXED])
@pytest.mark.parametrize("backend", every_backend("native", "reference"))
@pytest.mark.parametrize("case", [CASES[6], NARROW], ids=str)
def test_vmap_over_vectors_that_are_sharded(case, backend, kind, dim):
    def loss(x, ct, layer):
        y = jax.vmap(sparse_dense, (0, None))(x, layer)
        return (y * ct).sum(), y

    x, ct = case.x(6), case.cotangent(6)
    with use_backend(backend):
        x_bar, y = jax.jit(jax.grad(loss, has_aux=True))(put(x, kind, "data"), ct, sharded(case, kind, dim))
    terms = case.terms + DEVICES
    assert_within_bound(y, lambda x, w: x @ w.T, x, case.weight, terms=terms)
    assert_within_bound(x_bar, lambda g, w: g @ w, ct, case.weight, terms=terms)
    if kind == "Explicit":
        assert jax.typeof(y).sharding.spec[0] == "data"


def collectives(f, *args):
    text = f.lower(*args).compile().as_text()
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= \S+ ({names})(?:-start)?\(", text)


native = pytest.mark.skipif(unavailable_reason("native") is not None, reason="needs the compiled kernels")


@native
@each_kind
@pytest.mark.parametrize("index", ["delta8", "mask", "dense"])
@pytest.mark.parametrize(
    ("dim", "shape", "expected"),
    [("out", EVEN, []), ("in", EVEN, ["all-reduce"]), ("in", UNEVEN, ["all-reduce"])],
)
def test_the_compiled_kernels_gather_nothing(dim, shape, expected, index, kind):
    layer = sharded(Case("random", shape, index=index), kind, dim)
    with use_backend("native"):
        f = jax.jit(sparse_dense)
        x = jnp.ones((6, shape[1]))
        assert "upg_" in f.lower(x, layer).compile().as_text()
        assert collectives(f, x, layer) == expected


@native
@each_dim
def test_gradients_by_the_compiled_kernels_gather_no_weights(dim):
    layer = sharded(Case("random", EVEN), "Auto", dim)
    params, rest = partition(layer)

    def loss(x, params, rest):
        return (sparse_dense(x, combine(params, rest)) ** 2).sum()

    with use_backend("native"):
        f = jax.jit(jax.grad(loss, (0, 1)))
        text = f.lower(jnp.ones((6, EVEN[1])), params, rest).compile().as_text()
    gathered = re.findall(r"= (\S+) all-gather", text)
    assert not [shape for shape in gathered if re.match(r"[su](8|16|32)", shape)]
