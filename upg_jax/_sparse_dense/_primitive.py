"""The two primitives: the product `x @ W.T` and its transpose `g @ W`, over one layer of a stack.

Both take the operands `(x, scales, index, *planes)` where every plane has a leading stack axis `S` (1 for a
single layer) and `index`, int32 of shape `group`, says which layer of the stack each group of vectors uses. `x`
is `(*group, *batch, features)`. Both return float32 and are linear in `x` and linear in `scales`; adding a bias
and rounding to the caller's dtype happen outside, once. `sparse_dense_p` may be asked for the rounded result, in a
parameter `dtype`, for kernels that can write it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._compat import Primitive, unify_varying
from upg_jax._index import Index
from upg_jax._mdcsr import Manifold, MdCSR


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is static about a layer's planes; a parameter of the primitives."""

    shape: tuple[int, int]
    row_alignment: int
    manifold: Manifold
    index: Index = "delta8"
    value_bits: int = 8
    group_size: int | None = None


sparse_dense_p = Primitive("sparse_dense")
dense_sparse_p = Primitive("dense_sparse")


def operands(layer: MdCSR) -> tuple[Layout, jax.Array, list[jax.Array]]:
    """Returns a layer's layout, scales and planes, with a stack axis on the arrays."""
    planes = [layer.row_pointers, layer.values, layer.delta_indices]
    planes += [plane for plane in (layer.prime_indices, layer.group_scales) if plane is not None]
    arrays = [jnp.asarray(array) for array in (layer.scales, *planes)]
    if layer.stack_size is None:
        arrays = [array[None] for array in arrays]
    layout = Layout(
        *(layer.shape, layer.row_alignment, layer.manifold, layer.index),
        value_bits=layer.value_bits,
        group_size=layer.group_size,
    )
    return layout, arrays[0], arrays[1:]


def bind(primitive: Primitive, *args: Any, **params: Any) -> jax.Array:
    """Binds a primitive; every bind goes through here so that operands agree under `jax.shard_map`."""
    return primitive.bind(*unify_varying(*args), **params)


def _abstract_eval(features_in: int, features_out: int, x: Any, index: Any, dtype: str = "float32") -> Any:
    if x.shape[-1] != features_in or x.shape[: len(index.shape)] != index.shape:
        raise TypeError(
            f"sparse_dense: x must be (*group, *batch, {features_in}) with group {index.shape}; got {x.shape}"
        )
    return x.update(shape=(*x.shape[:-1], features_out), dtype=jnp.dtype(dtype), weak_type=False)


@sparse_dense_p.def_abstract_eval
def _sparse_dense_abstract_eval(
    x: Any, scales: Any, index: Any, *planes: Any, layout: Layout, backend: str, dtype: str = "float32"
) -> Any:
    out_features, in_features = layout.shape
    return _abstract_eval(in_features, out_features, x, index, dtype)


@dense_sparse_p.def_abstract_eval
def _dense_sparse_abstract_eval(
    g: Any, scales: Any, index: Any, *planes: Any, layout: Layout, backend: str
) -> Any:
    out_features, in_features = layout.shape
    return _abstract_eval(out_features, in_features, g, index)


@functools.cache
def _compiled(primitive: Primitive, **params: Any) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(primitive.bind, **params))


def evaluate(primitive: Primitive, *args: Any, **params: Any) -> jax.Array:
    """Runs a primitive outside jit by compiling it alone."""
    with jax.disable_jit(False):
        return _compiled(primitive, **params)(*args)


PRIMITIVES: Sequence[Primitive] = (sparse_dense_p, dense_sparse_p)
for _primitive in PRIMITIVES:
    _primitive.def_impl(functools.partial(evaluate, _primitive))
