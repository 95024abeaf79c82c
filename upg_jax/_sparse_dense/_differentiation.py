"""Derivatives of the two primitives.

With `z = q-plane @ x` the product is `y = scales * z`: linear in `x` and in `scales`, so each tangent is the
primitive itself with one operand replaced, and each transpose is the other primitive, or, for `scales`,
the sum over vectors of `z * cotangent`. Rules bind primitives only, so every order of differentiation works.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from upg_jax._compat import Primitive, ad, unify_varying
from upg_jax._sparse_dense._primitive import bind, dense_sparse_p, sparse_dense_p


def _register(primitive: Primitive, transposed: Primitive) -> None:
    def jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
        x, scales, *rest = primals
        x_dot, scales_dot = tangents[:2]
        y = bind(primitive, x, scales, *rest, **params)
        params.pop("dtype", None)  # tangents are added in float32
        terms = []
        if type(x_dot) is not ad.Zero:
            terms.append(bind(primitive, x_dot, scales, *rest, **params))
        if type(scales_dot) is not ad.Zero:
            terms.append(bind(primitive, x, scales_dot, *rest, **params))
        return y, sum(terms[1:], start=terms[0]).astype(y.dtype) if terms else jnp.zeros_like(y)

    def transpose(ct: Any, x: Any, scales: Any, index: Any, *planes: Any, **params: Any) -> list[Any]:
        nothing = [None] * (1 + len(planes))
        params.pop("dtype", None)
        if type(ct) is ad.Zero:
            return [None, None, *nothing]
        if ad.is_undefined_primal(x):
            ct_x = bind(transposed, ct, scales, index, *planes, **params)
            return [ct_x.astype(x.aval.dtype), None, *nothing]
        into, out_of = (x, ct) if primitive is sparse_dense_p else (ct, x)
        ones = jnp.ones(scales.aval.shape, jnp.float32)
        z = bind(sparse_dense_p, into, ones, index, *planes, **params)
        per_vector = z * out_of.astype(jnp.float32)
        group = index.ndim
        summed = per_vector.sum(axis=tuple(range(group, per_vector.ndim - 1)))
        zeros, index, summed = unify_varying(jnp.zeros(scales.aval.shape, jnp.float32), index, summed)
        return [None, zeros.at[index].add(summed), *nothing]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


_register(sparse_dense_p, dense_sparse_p)
_register(dense_sparse_p, sparse_dense_p)
