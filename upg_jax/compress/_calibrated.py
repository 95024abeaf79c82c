"""The pipeline's middle for calibrated methods: matrices compressed in the order of the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._decode import to_dense
from upg_jax._errors import EncodingError
from upg_jax._index import dense_row_entries
from upg_jax._mdcsr import MdCSR
from upg_jax._precision import best_precision
from upg_jax._values import value_bytes
from upg_jax.compress._activations import OnDisk, run_network
from upg_jax.compress._calibration import Calibration
from upg_jax.compress._methods import compress_matrix
from upg_jax.compress._plan import Plan, linears
from upg_jax.compress._statistics import Inputs
from upg_jax.io import Checkpoint
from upg_jax.models import DecoderConfig, parse_config, weights


def check_tokens(checkpoint: Checkpoint, plan: Plan, calibration: Calibration) -> DecoderConfig:
    """Returns the model's configuration, after checking all that could end a run later.

    Raises:
        CheckpointError: for an architecture that is not supported.
        EncodingError: for tokens outside the vocabulary, or matrices that are no part of the model.
    """
    config = parse_config(checkpoint.config)
    if not 0 <= int(calibration.ids.min()) <= int(calibration.ids.max()) < config.vocab_size:
        raise EncodingError(
            f"compress: calibration tokens must be in [0, {config.vocab_size}), the model's vocabulary; got "
            f"{calibration.ids.min()} to {calibration.ids.max()}"
        )
    visited = {name for w in weights(config) if w.linear for name in w.names(config.num_layers)}
    for tensor in linears(plan.tensors):
        if tensor.name not in visited:
            raise EncodingError(
                f"compress: calibration never reaches tensor {tensor.name!r}; keep it dense by a rule"
            )
    return config


def encode_in_order(
    checkpoint: Checkpoint,
    plan: Plan,
    read_part: Callable[[str], MdCSR | None],
    write_part: Callable[[str, MdCSR], None],
    spill: Path | None = None,
) -> None:
    """Encodes every tensor that has no part yet, each with the inputs that those before it leave.

    A tensor that has a part is decoded, so that a run that goes on sees the activations of one that was not stopped.

    Args:
        checkpoint: the source.
        plan: what becomes of it, with a calibration.
        read_part: returns an encoded tensor, or None.
        write_part: keeps an encoded tensor.
        spill: directory for activations; None keeps them in memory.
    """
    assert plan.calibration is not None
    config = parse_config(checkpoint.config)
    planned = {tensor.name: tensor for tensor in plan.compressed}

    def matrix(name: str, inputs: Inputs | None) -> MdCSR | np.ndarray:
        encoding = planned[name].encoding if name in planned else None
        if encoding is None:
            return checkpoint.read(name)
        layer = read_part(name)
        if layer is None:
            try:
                layer = compress_matrix(checkpoint.read(name), encoding, plan.settings, inputs)
            except EncodingError as e:
                raise EncodingError(f"compress: tensor {name!r}: {e}") from e
            write_part(name, layer)
        return layer

    def read(name: str) -> Any:
        return _dense(matrix(name, None))

    def visit(names: Sequence[str], batches: Sequence[jax.Array]) -> dict[str, Any]:
        inputs = Inputs(batches, precision)
        return {name: _dense(matrix(name, inputs)) for name in names}

    precision = best_precision()
    hold = list if spill is None else partial(OnDisk, directory=spill)
    run_network(config, weights(config), read, plan.calibration.ids, visit, hold, precision)
    for name in planned:
        matrix(name, None)  # what the model does not use, such as the second copy of a tied head


def _dense(matrix: MdCSR | np.ndarray) -> jax.Array:
    if not isinstance(matrix, MdCSR):
        return jnp.asarray(matrix, jnp.float32)
    # Matrices of one shape differ in their entries; at one capacity they share a compiled program.
    rows, columns = matrix.shape
    capacity = rows * dense_row_entries(columns, matrix.row_alignment)
    tail = (0, capacity - matrix.capacity)
    padded = dataclasses.replace(
        matrix,
        values=np.pad(matrix.values, (0, value_bytes(tail[1], matrix.value_bits))),
        delta_indices=np.pad(matrix.delta_indices, tail)
        if matrix.index == "delta8"
        else matrix.delta_indices,
        prime_indices=None if matrix.prime_indices is None else np.pad(matrix.prime_indices, tail),
    )
    return to_dense(jax.tree.map(jnp.asarray, padded), jnp.float32)
