"""`sparse_dense`: argument checks, bias and rounding around the primitive."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._compat import explicit_sharding, in_auto_mode
from upg_jax._mdcsr import MdCSR
from upg_jax._sharded import ShardedMdCSR
from upg_jax._sparse_dense._backend import requested_backend
from upg_jax._sparse_dense._primitive import bind, operands, sparse_dense_p
from upg_jax._sparse_dense._sharded import is_local, leading_spec, mapped_product, product_of_block

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def sparse_dense(
    x: Any, layer: MdCSR | ShardedMdCSR, bias: Any | None = None, *, index: Any | None = None
) -> jax.Array:
    """Multiplies by a compressed layer: `x @ W.T + bias`.

    Works under jit, vmap, grad (of `x`, `bias` and `layer.scales`, any order), scan and `shard_map`. Products are
    accumulated in float32, scaled once per row, and rounded to `x`'s dtype once.

    Args:
        x: float32, bfloat16 or float16 `(..., in_features)`, any number of leading dimensions.
        layer: the compressed matrix, or a stack of them with `index`; or what `upg_jax.shard` made of it. Inside
            `jax.shard_map` over that one's axis, `x`, `bias` and the result have the features of the device's block.
        bias: optional `(out_features,)` in `x`'s dtype or float32.
        index: which layer of a stack to use, read in place: an integer, a traced scalar, or an integer array
            whose shape is a prefix of `x`'s leading shape (a layer for each group of vectors). Negative values
            count from the end; traced values are clamped to the stack as JAX clamps indices.

    Returns:
        `(..., out_features)` in `x`'s dtype.

    Raises:
        TypeError: for a layer that is no `MdCSR`, or an unsupported dtype.
        ValueError: for shapes that do not fit, a stack without `index` or the reverse.
        IndexError: for a Python `index` outside the stack.
        BackendError: if the backend asked for cannot be used here.
    """
    if isinstance(layer, ShardedMdCSR):
        return _sharded_product(x, layer, bias, index)
    x, bias, index = check_operands(x, layer, bias, index)
    sharding = explicit_sharding(x)
    backend = requested_backend()
    if sharding is None:
        return _product(x, layer, bias, index, backend=backend)
    return _in_explicit_mesh(sharding, x, layer, bias, index, backend)


def check_operands(
    x: Any, layer: MdCSR, bias: Any | None, index: Any | None
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Checks the arguments of `sparse_dense`; returns `x`, `bias` and the layer of the stack as arrays."""
    if not isinstance(layer, MdCSR):
        raise TypeError(f"sparse_dense: layer must be an upg_jax.MdCSR; got {type(layer).__name__}")
    if jnp.ndim(layer.values) not in (1, 2):
        raise ValueError(
            f"sparse_dense: layer must be a single one or a stack along one axis; got values of shape "
            f"{jnp.shape(layer.values)}; use jax.vmap for further axes"
        )
    x = jnp.asarray(x)
    _check_x(x, layer)
    if bias is not None:
        bias = _check_bias(jnp.asarray(bias), x, layer)
    return x, bias, _check_index(index, x, layer)


# Outside jit each operation would be a program of its own, and a plane's stack axis a copy of the plane.
@functools.partial(jax.jit, static_argnames="backend", inline=True)
def _product(
    x: jax.Array, layer: MdCSR, bias: jax.Array | None, index: jax.Array, *, backend: str
) -> jax.Array:
    layout, scales, planes = operands(layer)
    dtype = _result(x, bias)
    rounded = {} if dtype == "float32" else {"dtype": dtype}
    y = bind(sparse_dense_p, x, scales, index, *planes, layout=layout, backend=backend, **rounded)
    return finish(y, x, bias)


def _result(x: jax.Array, bias: jax.Array | None) -> str:
    """What the product is asked for in: `x`'s dtype, unless something is added before it is rounded."""
    return "float32" if bias is not None else str(x.dtype)


def _sharded_product(x: Any, layer: ShardedMdCSR, bias: Any | None, index: Any | None) -> jax.Array:
    if is_local(layer):
        x, bias, index = check_operands(x, layer.block, bias, index)
        y = product_of_block(x, layer, index, backend=requested_backend(), dtype=_result(x, bias))
        return finish(y, x, bias)
    # Planes of all blocks are no layer, but tell as much as the checks ask.
    x, bias, index = check_operands(x, dataclasses.replace(layer.block, shape=layer.shape), bias, index)
    lead, backend = leading_spec(x, layer), requested_backend()
    y = mapped_product(x, layer, index, lead=lead, backend=backend, dtype=_result(x, bias))
    return finish(y, x, bias)


def finish(y: jax.Array, x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Adds the bias to a float32 product and rounds it to `x`'s dtype, once."""
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return y.astype(x.dtype)


def _in_explicit_mesh(
    sharding: Any, x: jax.Array, layer: MdCSR, bias: jax.Array | None, index: jax.Array, backend: str
) -> jax.Array:
    """Under a mesh with explicit axes the result keeps the sharding of `x`'s leading dimensions."""
    spec: list[Any] = list(sharding.spec)
    *lead, features = spec + [None] * (x.ndim - len(spec))
    if features is not None:
        raise ValueError(
            f"sparse_dense: the last dimension of x must not be sharded; it is, over {features!r}; use "
            "jax.shard_map for a row-parallel product, or jax.reshard x first"
        )
    product = functools.partial(_product, backend=backend)
    return in_auto_mode(product, sharding, [*lead, None])(x, layer, bias, index)


def _check_x(x: jax.Array, layer: MdCSR) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"sparse_dense: x must be float32, bfloat16 or float16; got {x.dtype}; use x.astype(jnp.float32)"
        )
    if x.ndim == 0 or x.shape[-1] != layer.in_features:
        raise ValueError(
            f"sparse_dense: x must be (..., in_features={layer.in_features}); got shape {x.shape} for a layer of "
            f"shape (out, in) = {layer.shape}"
        )


def _check_bias(bias: jax.Array, x: jax.Array, layer: MdCSR) -> jax.Array:
    if bias.shape != (layer.out_features,):
        raise ValueError(
            f"sparse_dense: bias must be (out_features,) = ({layer.out_features},); got {bias.shape}"
        )
    if bias.dtype not in (x.dtype, jnp.float32):
        raise TypeError(f"sparse_dense: bias must be {x.dtype} (as x) or float32; got {bias.dtype}")
    return bias


def _check_index(index: Any, x: jax.Array, layer: MdCSR) -> jax.Array:
    size = layer.stack_size
    if size is None:
        if index is not None:
            raise ValueError("sparse_dense: index is for a stack of layers; this layer is a single one")
        return jnp.zeros((), jnp.int32)
    if index is None:
        raise ValueError(
            f"sparse_dense: a stack of {size} layers needs index=; or map over the stack with jax.vmap or lax.scan"
        )
    if size == 0:
        raise ValueError("sparse_dense: index needs a layer to choose; this stack has none")
    if not isinstance(index, jax.Array):
        index = np.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"sparse_dense: index must be integers; got {index.dtype}")
    if isinstance(index, np.ndarray) and index.ndim == 0 and not -size <= index < size:
        raise IndexError(f"sparse_dense: index {index} is out of range for a stack of {size} layers")
    if index.shape != x.shape[: index.ndim] or index.ndim >= x.ndim:
        raise ValueError(
            f"sparse_dense: index's shape must be a prefix of x's leading shape {x.shape[:-1]}; got {index.shape}"
        )
    index = jnp.asarray(index, jnp.int32)
    return jnp.clip(jnp.where(index < 0, index + size, index), 0, size - 1)
