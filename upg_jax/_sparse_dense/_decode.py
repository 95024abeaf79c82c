"""Decoding to dense as a primitive: linear in `scales`, and one call for a whole stack.

The operands are `(scales, *planes)` as in `_primitive`; the result is float32 `(S, out, in)`, each weight rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from upg_jax._compat import Primitive, ad, batching
from upg_jax._sparse_dense._primitive import Layout, bind, evaluate

decode_p = Primitive("mdcsr_decode")
decode_p.def_impl(functools.partial(evaluate, decode_p))


@decode_p.def_abstract_eval
def _abstract_eval(scales: Any, *planes: Any, layout: Layout, backend: str) -> Any:
    return scales.update(shape=(scales.shape[0], *layout.shape), dtype=jnp.dtype("float32"), weak_type=False)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    scales, *planes = primals
    out = bind(decode_p, scales, *planes, **params)
    if type(tangents[0]) is ad.Zero:
        return out, jnp.zeros_like(out)
    return out, bind(decode_p, tangents[0], *planes, **params)


def _transpose(ct: Any, scales: Any, *planes: Any, **params: Any) -> list[Any]:
    nothing = [None] * len(planes)
    if type(ct) is ad.Zero:
        return [None, *nothing]
    levels = bind(decode_p, jnp.ones(scales.aval.shape, jnp.float32), *planes, **params)
    return [(ct * levels).sum(axis=-1), *nothing]


def _batch(args: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    scales, *planes = args
    if all(axis is None for axis in axes[1:]):
        scales = jnp.moveaxis(scales, axes[0], 0)
        levels = bind(decode_p, jnp.ones(scales.shape[1:], jnp.float32), *planes, **params)
        return scales[..., None] * levels[None], 0
    at_front = [
        jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(args, axes, strict=True)
    ]
    stacks = at_front[0].shape[1]
    folded = [a.reshape(size * stacks, a.shape[-1]) for a in at_front]
    out = bind(decode_p, *folded, **params)
    return out.reshape(size, stacks, *out.shape[1:]), 0


ad.primitive_jvps[decode_p] = _jvp
ad.primitive_transposes[decode_p] = _transpose
batching.primitive_batchers[decode_p] = _batch
