"""Products of one input with several layers, as one primitive: what a model can launch together, a GPU waits for once.

Only the Metal lowerings gain from it, so that elsewhere `sparse_dense_many` is `sparse_dense` for each layer.
Derivatives and most of batching fall apart into single products, whose rules they use.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._compat import Primitive, ad, batching, explicit_sharding, mlir, unify_varying
from upg_jax._mdcsr import MdCSR
from upg_jax._sparse_dense import _metal_lowering
from upg_jax._sparse_dense._api import check_operands, finish, sparse_dense
from upg_jax._sparse_dense._backend import requested_backend
from upg_jax._sparse_dense._primitive import Layout, bind, operands, sparse_dense_p

sparse_dense_many_p = Primitive("sparse_dense_many")
sparse_dense_many_p.multiple_results = True


def sparse_dense_many(
    x: Any, layers: Sequence[MdCSR], biases: Sequence[Any | None] | None = None, *, index: Any | None = None
) -> list[jax.Array]:
    """`[sparse_dense(x, layer, bias, index=index) for layer, bias in zip(layers, biases)]`, launched together.

    Args:
        x: `(..., in_features)`.
        layers: of equal `in_features`.
        biases: one or None for each layer; none of them, if not given.
        index: for stacks, which layer of each.

    Returns:
        `(..., out_features)` for each layer.
    """
    biases = [None] * len(layers) if biases is None else biases
    backend = requested_backend()
    x = jnp.asarray(x)
    if len(layers) < 2 or explicit_sharding(x) is not None or not _metal_lowering.gains(backend):
        return [sparse_dense(x, layer, b, index=index) for layer, b in zip(layers, biases, strict=True)]
    checked = [check_operands(x, layer, b, index) for layer, b in zip(layers, biases, strict=True)]
    flat, layouts = [], []
    for layer in layers:
        layout, scales, planes = operands(layer)
        layouts.append(layout)
        flat += [scales, *planes]
    products = _bind(x, checked[0][2], *flat, layouts=tuple(layouts), backend=backend)
    return [finish(y, x, bias) for y, (_, bias, _) in zip(products, checked, strict=True)]


def _bind(*args: Any, layouts: tuple[Layout, ...], backend: str) -> list[jax.Array]:
    return sparse_dense_many_p.bind(*unify_varying(*args), layouts=layouts, backend=backend)


def _split(flat: Sequence[Any], layouts: tuple[Layout, ...]) -> list[list[Any]]:
    """The scales and planes of each layer."""
    found, at = [], 0
    for layout in layouts:
        count = 5 if layout.manifold == "prime" or layout.value_bits != 8 else 4
        found.append(list(flat[at : at + count]))
        at += count
    return found


def _one_by_one(x: Any, index: Any, *flat: Any, layouts: tuple[Layout, ...], backend: str) -> list[jax.Array]:
    return [
        bind(sparse_dense_p, x, scales, index, *planes, layout=layout, backend=backend)
        for layout, (scales, *planes) in zip(layouts, _split(flat, layouts), strict=True)
    ]


@functools.cache
def _compiled(layouts: tuple[Layout, ...], backend: str) -> Any:
    return jax.jit(functools.partial(sparse_dense_many_p.bind, layouts=layouts, backend=backend))


@sparse_dense_many_p.def_impl
def _evaluate(*args: Any, layouts: tuple[Layout, ...], backend: str) -> list[jax.Array]:
    with jax.disable_jit(False):
        return _compiled(layouts, backend)(*args)


@sparse_dense_many_p.def_abstract_eval
def _abstract_eval(x: Any, index: Any, *flat: Any, layouts: tuple[Layout, ...], backend: str) -> list[Any]:
    return [
        x.update(shape=(*x.shape[:-1], layout.shape[0]), dtype=jnp.dtype("float32"), weak_type=False)
        for layout in layouts
    ]


def _jvp(primals: Any, tangents: Any, *, layouts: tuple[Layout, ...], backend: str) -> tuple[Any, Any]:
    x, index, *flat = primals
    x_dot, index_dot, *flat_dot = tangents
    out = _bind(x, index, *flat, layouts=layouts, backend=backend)
    out_dot = []
    pairs = zip(layouts, _split(flat, layouts), _split(flat_dot, layouts), strict=True)
    for layout, (scales, *planes), (scales_dot, *planes_dot) in pairs:
        rule = ad.primitive_jvps[sparse_dense_p]
        args, args_dot = (x, scales, index, *planes), (x_dot, scales_dot, index_dot, *planes_dot)
        out_dot.append(rule(args, args_dot, layout=layout, backend=backend)[1])
    return out, out_dot


def _transpose(
    cts: Any, x: Any, index: Any, *flat: Any, layouts: tuple[Layout, ...], backend: str
) -> list[Any]:
    ct_x = None
    found: list[Any] = []
    for ct, layout, (scales, *planes) in zip(cts, layouts, _split(flat, layouts), strict=True):
        rule = ad.primitive_transposes[sparse_dense_p]
        of_x, of_scales, _, *nothing = rule(ct, x, scales, index, *planes, layout=layout, backend=backend)
        if of_x is not None:
            ct_x = of_x if ct_x is None else ct_x + of_x
        found += [of_scales, *nothing]
    return [ct_x, None, *found]


def _batch(args: Any, axes: Any, *, layouts: tuple[Layout, ...], backend: str) -> tuple[Any, Any]:
    x, index, *flat = args
    x_axis, index_axis, *flat_axes = axes
    if index_axis is None and all(axis is None for axis in flat_axes):
        at = index.ndim
        out = _bind(jnp.moveaxis(x, x_axis, at), index, *flat, layouts=layouts, backend=backend)
        return out, [at] * len(out)
    single = functools.partial(_one_by_one, layouts=layouts, backend=backend)
    shared = x_axis is not None or index_axis is not None
    own = [any(axis is not None for axis in axes) for axes in _split(flat_axes, layouts)]
    out_axes = [0 if shared or mapped else None for mapped in own]
    return jax.vmap(single, tuple(axes), out_axes)(*args), out_axes


ad.primitive_jvps[sparse_dense_many_p] = _jvp
ad.primitive_transposes[sparse_dense_many_p] = _transpose
batching.primitive_batchers[sparse_dense_many_p] = _batch

_separately = mlir.lower_fun(_one_by_one, multiple_results=True)
mlir.register_lowering(sparse_dense_many_p, _separately)


def _lower(ctx: Any, *args: Any, layouts: tuple[Layout, ...], backend: str) -> Any:
    products, avals = _metal_lowering.PRODUCTS, ctx.avals_in
    if not _metal_lowering.takes(ctx, products, avals, layouts, backend):
        return _separately(ctx, *args, layouts=layouts, backend=backend)
    return _metal_lowering.lower_call(ctx, products, avals, args, backend)


mlir.register_lowering(sparse_dense_many_p, _lower, platform="cpu")
