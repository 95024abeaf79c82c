"""One matrix, compressed by any method: what to keep, what that becomes, and its encoding."""

from __future__ import annotations

import numpy as np

from upg_jax._encode import encode_dense, encode_levels, finite_float32
from upg_jax._mdcsr import MdCSR
from upg_jax._quantize import scales_of
from upg_jax.compress._prune import prune_mask
from upg_jax.compress._selection import Pattern
from upg_jax.compress._settings import Encoding, Settings
from upg_jax.compress._sparsegpt import prune, prune_to_few_bits
from upg_jax.compress._statistics import Inputs

# Weights grow where they make up for others; multipliers have levels to spare.
_ROOM = 2.0


def compress_matrix(w: np.ndarray, encoding: Encoding, settings: Settings, inputs: Inputs | None) -> MdCSR:
    """Prunes, quantizes and encodes one matrix; planes on the host.

    Args:
        w: `(out_features, in_features)`, as the checkpoint has it.
        encoding: what it is stored as.
        settings: method and pattern count, but for the token embedding and head as int8 rows.
        inputs: calibration, for the methods that need it.

    Raises:
        EncodingError: for weights that cannot be encoded, or a pattern that does not fit them.
    """
    if encoding.tokens or settings.method == "magnitude":
        pattern = "layer" if encoding.tokens else settings.counted
        mask = prune_mask(w, encoding.density, pattern=pattern)
        return _encode(w, mask, encoding)
    assert inputs is not None
    if settings.method == "wanda":
        mask = prune_mask(w, encoding.density, "wanda", norms=inputs.norms, pattern=settings.counted)
        return _encode(w, mask, encoding)
    return _by_sparsegpt(w, encoding, Pattern.parse(settings.counted), inputs)


def _encode(w: np.ndarray, mask: np.ndarray, encoding: Encoding) -> MdCSR:
    return encode_dense(
        w,
        mask=mask,
        manifold=encoding.manifold,
        index=encoding.index,
        value_bits=encoding.value_bits,
        group_size=encoding.group_size,
    )


def _by_sparsegpt(w: np.ndarray, encoding: Encoding, pattern: Pattern, inputs: Inputs) -> MdCSR:
    dense = finite_float32(w, where="sparsegpt")
    if not dense.size:
        return _encode(w, np.zeros(w.shape, bool), encoding)
    if encoding.manifold == "prime":
        pruned = prune(dense, inputs.factor, encoding.density, pattern, None)
        return _encode(pruned.weights.astype(w.dtype), pruned.mask, encoding)
    bits, groups = encoding.value_bits, encoding.group_size
    largest = np.abs(dense).max(axis=1, initial=0.0) * np.float32(1.0 if bits == 8 else _ROOM)
    scales = scales_of(largest, "unit", value_bits=bits)
    if groups is None:
        pruned = prune(dense, inputs.factor, encoding.density, pattern, scales)
    else:
        pruned = prune_to_few_bits(
            dense, inputs.factor, inputs.ordered, encoding.density, pattern, scales, bits, groups
        )
    assert pruned.levels is not None
    return encode_levels(
        pruned.levels,
        scales,
        dtype=w.dtype,
        index=encoding.index,
        value_bits=bits,
        group_scales=pruned.multipliers,
        group_size=groups,
    )
