"""One trilinear form on a fixed pattern, whose three partial derivatives are a trainable layer's products.

With float weights `w` at fixed positions of a matrix `W(w)`, `T(y, w, x) = sum(y * (x @ W(w).T))` is linear in each
argument. Its derivative for `y` is the product `x @ W.T`, for `x` the transposed product `y @ W`, and for `w` the
sampled product: `y.T @ x` at the stored positions. One primitive computes any of them from the other two arguments,
so it is closed under differentiation, forward and reverse, to every order.

A training step has hundreds of vectors, for which a processor's matrix product is so much faster than walking entries
that the matrix is made dense first, once a product; its gradient is never dense beyond a tile of rows.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from upg_jax._compat import Primitive, ad, batching, mlir, unify_varying

Role: TypeAlias = Literal["y", "w", "x"]
_ROLES: tuple[Role, ...] = ("y", "w", "x")

pattern_p = Primitive("pattern_product")


def contract(
    out: Role, a: Any, b: Any, positions: jax.Array, *, shape: tuple[int, int], precision: str
) -> jax.Array:
    """The derivative of `T` for `out`, given its other two arguments.

    Args:
        out: which derivative.
        a: the first of the other two in the order `y (n, out_features)`, `w (tiles, width)`, `x (n, in_features)`.
        b: the second.
        positions: int32 `(tiles, width)`, see `TrainableMdCSR`.
        shape: `(out_features, in_features)`.
        precision: `"float32"`, or `"bfloat16"` for factors rounded to it; sums are float32.

    Returns:
        float32, of `out`'s shape.
    """
    args = unify_varying(a, b, positions)
    return pattern_p.bind(*args, out=out, shape=shape, precision=precision)


def decode(w: jax.Array, positions: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`W(w)`, `(out_features, in_features)` in `w`'s dtype."""
    out_features, in_features = shape
    rows = tile_rows(out_features, w.shape[0])

    def tile(entries: Any) -> jax.Array:
        weights, at = entries
        zeros = jnp.zeros(rows * in_features, w.dtype)
        return zeros.at[at].set(weights, mode="drop", unique_indices=True, indices_are_sorted=True)

    tiles = lax.map(tile, (w, positions))
    return tiles.reshape(-1, in_features)[:out_features]


def tile_rows(out_features: int, tiles: int) -> int:
    """Rows of a tile; the last ones may have fewer."""
    return -(-out_features // max(tiles, 1))


def _evaluate(
    a: jax.Array, b: jax.Array, positions: jax.Array, *, out: Role, shape: tuple[int, int], precision: str
) -> jax.Array:
    a, b = a.astype(precision), b.astype(precision)
    if out == "y":
        return _dot(b, decode(a, positions, shape), 1, 1)
    if out == "x":
        return _dot(a, decode(b, positions, shape), 1, 0)
    return _sampled(a, b, positions, shape)


def _sampled(y: jax.Array, x: jax.Array, positions: jax.Array, shape: tuple[int, int]) -> jax.Array:
    tiles = positions.shape[0]
    rows = tile_rows(shape[0], tiles)
    padded = jnp.pad(y, ((0, 0), (0, tiles * rows - shape[0])))

    def tile(columns: Any) -> jax.Array:
        transposed, at = columns
        return _dot(transposed, x, 1, 0).reshape(-1).at[at].get(mode="fill", fill_value=0)

    # Transposed before the loop: inside, XLA's CPU backend would fold it into the product and lose half its speed.
    return lax.map(tile, (padded.T.reshape(tiles, rows, -1), positions))


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    return lax.dot_general(
        a,
        b,
        (((contract_a,), (contract_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


@pattern_p.def_abstract_eval
def _abstract_eval(
    a: Any, b: Any, positions: Any, *, out: Role, shape: tuple[int, int], precision: str
) -> Any:
    if out == "w":
        return a.update(shape=positions.shape, dtype=jnp.dtype("float32"), weak_type=False)
    given, features = (b, shape[0]) if out == "y" else (a, shape[1])
    return given.update(shape=(given.shape[0], features), dtype=jnp.dtype("float32"), weak_type=False)


@functools.cache
def _compiled(out: Role, shape: tuple[int, int], precision: str) -> Any:
    return jax.jit(functools.partial(pattern_p.bind, out=out, shape=shape, precision=precision))


@pattern_p.def_impl
def _run(*args: Any, out: Role, shape: tuple[int, int], precision: str) -> jax.Array:
    with jax.disable_jit(False):
        return _compiled(out, shape, precision)(*args)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    a, b, positions = primals
    a_dot, b_dot = tangents[:2]
    value = pattern_p.bind(*unify_varying(a, b, positions), **params)
    terms = []
    if type(a_dot) is not ad.Zero:
        terms.append(pattern_p.bind(*unify_varying(a_dot, b, positions), **params))
    if type(b_dot) is not ad.Zero:
        terms.append(pattern_p.bind(*unify_varying(a, b_dot, positions), **params))
    return value, sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(value)


def _transpose(ct: Any, a: Any, b: Any, positions: Any, *, out: Role, **params: Any) -> list[Any]:
    if type(ct) is ad.Zero:
        return [None, None, None]
    roles = [role for role in _ROLES if role != out]
    wanted = roles[0] if ad.is_undefined_primal(a) else roles[1]
    given = {out: ct, roles[0]: a, roles[1]: b}
    first, second = (given[role] for role in _ROLES if role != wanted)
    found = contract(wanted, first, second, positions, **params).astype(given[wanted].aval.dtype)
    return [found, None, None] if wanted == roles[0] else [None, found, None]


def _batch(args: Any, axes: Any, *, out: Role, **params: Any) -> tuple[Any, int]:
    """Examples of one layer become more vectors of one product; anything else is mapped over what it computes."""
    vectors = {"y": 1, "x": 0}.get(out)
    if vectors is not None and [axis is None for axis in axes] == [i != vectors for i in range(3)]:
        moved = jnp.moveaxis(args[vectors], axes[vectors], 0)
        flat = [*args]
        flat[vectors] = moved.reshape(-1, moved.shape[-1])
        result = contract(out, *flat, **params)
        return result.reshape(*moved.shape[:-1], result.shape[-1]), 0
    # A checkpoint, so that a gradient taken outside keeps no dense matrices.
    one = jax.checkpoint(functools.partial(_evaluate, out=out, **params))
    return jax.vmap(one, tuple(axes))(*args), 0


ad.primitive_jvps[pattern_p] = _jvp
ad.primitive_transposes[pattern_p] = _transpose
batching.primitive_batchers[pattern_p] = _batch
mlir.register_lowering(pattern_p, mlir.lower_fun(_evaluate, multiple_results=False))
