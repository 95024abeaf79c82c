"""Splitting a pytree into what a gradient exists for and what it does not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def _is_none(x: Any) -> bool:
    return x is None


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a pytree into its floating-point leaves and all others.

    `jax.grad` refuses integer leaves, which every `MdCSR` has; differentiate with respect to the first part:

        params, rest = upg_jax.partition(layer)
        grads = jax.grad(lambda p: loss(upg_jax.combine(p, rest)))(params)

    Args:
        tree: any pytree, e.g. a layer or a model of layers.

    Returns:
        Two pytrees of `tree`'s structure with None where the leaf is in the other one: floating-point arrays
        (scales, biases, norms, dense weights) and the rest.
    """

    def trainable(leaf: Any) -> bool:
        return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)

    params = jax.tree.map(lambda leaf: leaf if trainable(leaf) else None, tree)
    rest = jax.tree.map(lambda leaf: None if trainable(leaf) else leaf, tree)
    return params, rest


def combine(params: Any, rest: Any) -> Any:
    """Joins what `partition` split.

    Raises:
        ValueError: if both parts have a leaf at the same place, naming it, or their structures differ.
    """

    def pick(path: Any, a: Any, b: Any) -> Any:
        if a is not None and b is not None:
            raise ValueError(f"combine: both parts have a leaf at {jax.tree_util.keystr(path)}")
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(pick, params, rest, is_leaf=_is_none)
