"""Making a model's compressed layers as fast as they get here: joined where they share their input, and packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._entries import MAX_ENTRIES
from upg_jax._errors import FormatError
from upg_jax._mdcsr import STATIC_FIELDS, MdCSR
from upg_jax._pack import pack
from upg_jax._values import value_bytes
from upg_jax.models._decoder import Params
from upg_jax.models._linear import Linears, joined
from upg_jax.models._names import ATTENTION_INPUTS, EXPERT_INPUTS, MLP_INPUTS
from upg_jax.models._weights import stack_layers


def pack_params(params: Params) -> Params:
    """Returns parameters that decode faster and mean the same: a copy of the compressed planes, made on the host.

    Projections that share their input become one, and every compressed matrix takes the `index` that multiplies fastest
    here (`upg_jax.pack`), unless that cannot hold it: kernels are defined on more than what encoders make.

    Args:
        params: the decoder's.
    """
    layers = params["layers"]
    for names in (ATTENTION_INPUTS, MLP_INPUTS, EXPERT_INPUTS):
        if all(name in layers for name in names):
            layers = join_projections(layers, names)
    packed = {key: _pack_all(weights) for key, weights in layers.items()}
    head = {"lm_head": _pack(params["lm_head"])} if "lm_head" in params else {}
    return {**params, **head, "layers": packed}


def _pack(weight: Any) -> Any:
    if not isinstance(weight, MdCSR):
        return weight
    try:
        return pack(weight)
    except FormatError:
        return weight


def _pack_all(weights: Any) -> Any:
    """Packs one projection of all layers; those of a stack alike, so that it stays one."""
    weights = stack_layers(weights) if isinstance(weights, tuple) else weights
    packed = tuple(map(_pack, weights)) if isinstance(weights, tuple) else _pack(weights)
    return jax.tree.map(jnp.asarray, packed)


def join_projections(layers: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Returns a decoder's `layers` parameters with compressed projections joined, on the host, layer by layer.

    Unchanged where the projections are not compressed alike, or only some have a bias.

    Args:
        layers: the decoder's `layers` parameters.
        names: projections that share their input, in the order in which their outputs are split.
    """
    first = layers[names[0]]
    count = len(first) if isinstance(first, tuple) else first.stack_size
    biases = [layers[f"{name}.bias"] for name in names if f"{name}.bias" in layers]
    parts = [[matrix_of(layers[name], i) for name in names] for i in range(count)]
    if not all(map(can_join, parts)) or len(biases) not in (0, len(names)):
        return dict(layers)
    rest = {key: value for key, value in layers.items() if key.removesuffix(".bias") not in names}
    rest[joined(names)] = tuple(map(join_rows, parts))
    if biases:
        rest[f"{joined(names)}.bias"] = jnp.concatenate(biases, axis=-1)
    return rest


def matrix_of(weights: Linears, layer: int) -> Any:
    """One layer's matrix, its planes on the host if it is compressed."""
    if isinstance(weights, tuple):
        weight = weights[layer]
        return jax.tree.map(np.asarray, weight) if isinstance(weight, MdCSR) else weight
    return jax.tree.map(lambda plane: np.asarray(plane)[layer], weights)


def can_join(matrices: Sequence[Any]) -> bool:
    """Whether all are compressed, and differ in nothing but their rows."""
    if not all(isinstance(matrix, MdCSR) for matrix in matrices):
        return False
    if sum(matrix.nnz for matrix in matrices) > MAX_ENTRIES:
        return False
    fields = [field for field in STATIC_FIELDS if field != "shape"]
    return len({(m.manifold, m.in_features, *(getattr(m, f) for f in fields)) for m in matrices}) == 1


def join_rows(matrices: Sequence[MdCSR]) -> MdCSR:
    """One layer with the rows of several, in order; lossless. All planes are on the host.

    Args:
        matrices: unstacked, such that `can_join`.
    """
    lengths = [matrix.nnz for matrix in matrices]
    starts = np.cumsum([0, *lengths[:-1]])

    def join(plane: str) -> np.ndarray:
        # Tails that no row owns would lie between rows.
        columns = plane == "delta_indices" and matrices[0].index == "delta8"
        cut = columns or plane in ("values", "prime_indices")
        bits = matrices[0].value_bits if plane == "values" else 8
        planes = [np.asarray(getattr(matrix, plane)) for matrix in matrices]
        return np.concatenate(
            [p[: value_bytes(n, bits)] if cut else p for p, n in zip(planes, lengths, strict=True)]
        )

    pointers = [
        np.asarray(m.row_pointers).astype(np.int64) + at for m, at in zip(matrices, starts, strict=True)
    ]
    return dataclasses.replace(
        matrices[0],
        shape=(sum(matrix.out_features for matrix in matrices), matrices[0].in_features),
        values=join("values"),
        delta_indices=join("delta_indices"),
        prime_indices=None if matrices[0].prime_indices is None else join("prime_indices"),
        scales=join("scales"),
        group_scales=None if matrices[0].group_scales is None else join("group_scales"),
        row_pointers=np.concatenate([[0], *(p[1:] for p in pointers)]).astype(np.uint32),
    )
