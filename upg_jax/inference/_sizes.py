"""How large a model is, by its leaves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

from upg_jax._mdcsr import MdCSR
from upg_jax._sharded import ShardedMdCSR


def weights_of(tree: Any) -> list[Any]:
    """The arrays and compressed matrices of a pytree."""
    return jax.tree.leaves(tree, is_leaf=is_compressed)


def is_compressed(leaf: Any) -> bool:
    """Whether it is a compressed matrix, on however many devices."""
    return isinstance(leaf, (MdCSR, ShardedMdCSR))


def num_weights(leaf: Any) -> int:
    """Weights of the dense matrix."""
    return leaf.num_weights if is_compressed(leaf) else leaf.size


def index_bytes(tree: Any) -> dict[str, int]:
    """Bytes of compressed matrices by their `index`, the largest share first."""
    found: Counter[str] = Counter()
    for leaf in filter(is_compressed, weights_of(tree)):
        found[leaf.index] += leaf.nbytes
    return dict(found.most_common())
