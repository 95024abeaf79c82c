"""Which weights to keep."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from upg_jax._encode import kept_weights
from upg_jax._errors import EncodingError

Method: TypeAlias = Literal["magnitude"]
METHODS: tuple[Method, ...] = get_args(Method)


def prune_mask(w: Any, density: float, method: Method = "magnitude") -> np.ndarray:
    """Chooses the weights of a matrix to keep.

    Args:
        w: float matrix `(out_features, in_features)`.
        density: fraction of the weights to keep, in `[0, 1]`.
        method: `"magnitude"` keeps the `round(density * w.size)` largest magnitudes of the whole matrix, ties
            in row-major order: what `MdCSR.from_dense(w, density=...)` does.

    Returns:
        Boolean matrix of `w`'s shape, True where a weight is kept.

    Raises:
        EncodingError: for an unknown method, or a density outside `[0, 1]`.
    """
    check_method(method)
    w = np.asarray(w)
    return kept_weights(w, density, None)(0, w.shape[0])


def check_method(method: str) -> None:
    """Raises `EncodingError` for an unknown method."""
    if method not in METHODS:
        raise EncodingError(f"prune: method must be one of {', '.join(METHODS)}; got {method!r}")
