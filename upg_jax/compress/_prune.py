"""Which weights to keep."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np

from upg_jax._encode import kept_weights
from upg_jax._errors import EncodingError
from upg_jax.compress._selection import Pattern, keep_pattern

Method: TypeAlias = Literal["magnitude", "wanda", "sparsegpt"]
METHODS: tuple[Method, ...] = get_args(Method)
"""Every method."""
CALIBRATED: tuple[Method, ...] = ("wanda", "sparsegpt")
"""Those that need a calibration."""

_PATTERNS: dict[Method, str] = {"magnitude": "layer", "wanda": "row", "sparsegpt": "row"}


def prune_mask(
    w: Any, density: float, method: Method = "magnitude", *, norms: Any = None, pattern: str | None = None
) -> np.ndarray:
    """Chooses the weights of a matrix to keep: those with the largest scores, ties in row-major order.

    Args:
        w: float matrix `(out_features, in_features)`.
        density: fraction of the weights to keep, in `[0, 1]`.
        method: `"magnitude"` scores by magnitude; `"wanda"` by magnitude times the norm of the weight's input (Sun et
            al., "A Simple and Effective Pruning Approach for Large Language Models", 2023). What `"sparsegpt"` keeps
            depends on what it does to the weights: see `sparsegpt`.
        norms: for `"wanda"`, float32 `(in_features,)`: the Euclidean norm of each input over the calibration tokens.
        pattern: `"layer"` keeps `round(density * w.size)` weights of the whole matrix, `"row"`
            `round(density * in_features)` of every row, and `"N:M"`, such as `"2:4"`, N of every M consecutive ones of
            a row. By default `"layer"` for magnitude pruning, then the mask is that of
            `MdCSR.from_dense(w, density=...)`, and `"row"` for Wanda.

    Returns:
        Boolean matrix of `w`'s shape, True where a weight is kept.

    Raises:
        EncodingError: for an unknown method, a density outside `[0, 1]`, a pattern that does not fit, or norms that
            are not finite.
    """
    check_method(method)
    w = np.asarray(w)
    if method == "sparsegpt":
        raise EncodingError("prune_mask: sparsegpt chooses weights while it changes them; call sparsegpt")
    if (norms is None) != (method == "magnitude"):
        raise EncodingError("prune_mask: method wanda needs the norms of the inputs, and magnitude has none")
    chosen = Pattern.parse(pattern or default_pattern(method))
    if method == "magnitude" and chosen.scope == "layer":
        return kept_weights(w, density, None)(0, w.shape[0])
    if not 0.0 <= density <= 1.0:
        raise EncodingError(f"prune_mask: density must be in [0, 1]; got {density}")
    scores = jnp.abs(jnp.asarray(w, jnp.float32))
    if norms is not None:
        if not np.isfinite(norms).all():
            raise EncodingError(
                "prune_mask: norms must be finite; got NaN or infinity; the model may have weights that are infinite "
                "or no numbers before this matrix"
            )
        scores = scores * jnp.asarray(norms, jnp.float32)[None]
    return np.asarray(keep_pattern(scores, density, chosen))


def default_pattern(method: Method) -> str:
    """The pattern that a method is known with, or is best with."""
    return _PATTERNS[method]


def check_method(method: str) -> None:
    """Raises `EncodingError` for an unknown method."""
    if method not in METHODS:
        raise EncodingError(f"prune: method must be one of {', '.join(METHODS)}; got {method!r}")
