"""What a compression will do and how large its result will be, before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from upg_jax._entries import MAX_DELTA
from upg_jax._errors import EncodingError
from upg_jax._index import dense_row_entries
from upg_jax._mdcsr import DTYPES
from upg_jax._values import smallest_alignment
from upg_jax._version import __version__
from upg_jax.compress._calibration import Calibration
from upg_jax.compress._prune import Method
from upg_jax.compress._selection import Pattern
from upg_jax.compress._settings import Encoding, Settings
from upg_jax.io import Checkpoint
from upg_jax.io._header import CODE_OF
from upg_jax.io._layout import Item, arrange, check_names, place, stored_bytes
from upg_jax.io._metadata import MatrixFacts, to_strings
from upg_jax.io._writer import file_bytes

# Perplexity of SmolLM2-135M-Instruct on held-out Wikipedia articles after one-shot pruning of all its linear layers
# (20 windows of 512 tokens; standard error of its logarithm 6 to 7%): docs/compression.md.
DENSE_PERPLEXITY = "21.9"
MEASURED_PERPLEXITY: dict[Method, dict[float, str]] = {
    "magnitude": {0.7: "34.6", 0.5: "445", 0.4: "3,524", 0.3: "80,775"},
    "wanda": {0.7: "25.1", 0.5: "47.9", 0.4: "135", 0.3: "699"},
    "sparsegpt": {0.7: "24.9", 0.5: "42.0", 0.4: "80.7", 0.3: "219"},
}
_WARN_AT = 0.5


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape.
        dtype: name of the dtype it has in the checkpoint.
        encoding: what it is stored as; None if it stays dense.
        nbytes: bytes in the result if every kept weight is stored and no filler is needed, padding included.
            A weight that rounds to 0 is not stored (about 1% of Gaussian weights that were not pruned, under
            the unit manifold); a gap of over 255 columns needs fillers (rare above density 0.1).
        max_nbytes: bytes that it cannot exceed (but by 5%, where rules give the layers of a stack different
            densities and the file pads them to one length).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: Encoding | None
    nbytes: int
    max_nbytes: int

    @property
    def density(self) -> float | None:
        """Fraction of weights to keep; None if it stays dense."""
        return None if self.encoding is None else self.encoding.density

    @property
    def num_weights(self) -> int:
        """Elements of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits_per_weight(self) -> float:
        """Bits in the result, all overheads included, per element."""
        return 8 * self.nbytes / max(self.num_weights, 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of a checkpoint.

    Attributes:
        settings: the settings it was made for.
        calibration: what to calibrate on, if that was given.
        tensors: one entry per tensor, in layer order.
        file_bytes: size of the result's `model.safetensors`, under the assumptions of `TensorPlan.nbytes`.
        max_file_bytes: what that size cannot exceed.
        warnings: what to know before starting.
    """

    settings: Settings
    calibration: Calibration | None
    tensors: list[TensorPlan]
    file_bytes: int
    max_file_bytes: int
    warnings: list[str]

    @property
    def compressed(self) -> list[TensorPlan]:
        """The tensors that are to be encoded."""
        return [t for t in self.tensors if t.encoding is not None]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the linear layers that are encoded, all overheads included."""
        return bits_per_weight(linears(self.tensors))


def linears(tensors: Sequence[Any]) -> list[Any]:
    """Of tensors with an `encoding`: the encoded ones but the token embedding and the head as int8 rows."""
    return [t for t in tensors if t.encoding is not None and not t.encoding.tokens]


def bits_per_weight(tensors: Sequence[Any]) -> float:
    """Bits per weight of tensors with `nbytes` and `num_weights`, together."""
    return 8 * sum(t.nbytes for t in tensors) / max(sum(t.num_weights for t in tensors), 1)


def plan(checkpoint: Checkpoint, settings: Settings, calibration: Calibration | None = None) -> Plan:
    """Predicts the result's size from the checkpoint's shapes; reads no weights.

    Args:
        checkpoint: from `open_checkpoint`.
        settings: how to compress it.
        calibration: for the methods that need it; may be left out here.

    Raises:
        EncodingError: if a rule matches nothing, nothing is left to compress, a dtype cannot be encoded, or a pattern
            does not fit a matrix.
    """
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    encodings = settings.encodings(shapes)
    if all(encoding is None for encoding in encodings.values()):
        raise EncodingError("compress: no tensor is left to compress; the rules keep all of them dense")
    dtypes = {name: checkpoint.dtype(name) for name in shapes}
    for name, encoding in encodings.items():
        if encoding is not None and str(dtypes[name]) not in (*DTYPES, "float64"):
            raise EncodingError(
                f"compress: tensor {name!r} is {dtypes[name]}, which cannot be encoded; convert the "
                "checkpoint to bfloat16 first, or keep the tensor dense by a rule"
            )
        if encoding is not None and not encoding.tokens:
            try:
                Pattern.parse(settings.counted).check_columns(shapes[name][1])
            except EncodingError as e:
                raise EncodingError(f"compress: tensor {name!r}: {e}") from e
    expected = [_item(name, shapes[name], dtypes[name], e, most=False) for name, e in encodings.items()]
    at_most = [_item(name, shapes[name], dtypes[name], e, most=True) for name, e in encodings.items()]
    check_names(at_most)
    strings = to_strings(
        {item.name: item.facts for item in at_most if item.facts is not None},
        {},
        checkpoint.config,
        provenance(
            settings, calibration, [(f.name, f.stat().st_size, "0" * 64) for f in checkpoint.source_files()]
        ),
    )
    sizes, max_sizes = ({item.name: stored_bytes(item) for item in arrange(i)} for i in (expected, at_most))
    tensors = [
        TensorPlan(
            name, shape, str(dtypes[name]), encodings[name], sizes[name], max(sizes[name], max_sizes[name])
        )
        for name, shape in shapes.items()
    ]
    warnings = _warnings(tensors, settings.method)
    if checkpoint.left_out:
        images = f"{len(checkpoint.left_out)} tensors for reading images, from {checkpoint.left_out[0]} on"
        warnings.append(f"left out, since the result is a model of text: {images}")
    file_sizes = [file_bytes(place(arrange(items)), strings) for items in (expected, at_most)]
    return Plan(settings, calibration, tensors, file_sizes[0], max(file_sizes), warnings)


def provenance(
    settings: Settings, calibration: Calibration | None, sources: list[tuple[str, int, str]]
) -> dict[str, Any]:
    """What a file says of its making.

    Args:
        settings: how it was made.
        calibration: what it was calibrated on.
        sources: name, size in bytes and sha256 of every source file.
    """
    return {
        "tool": f"upg_jax {__version__}",
        "settings": settings.to_json() | ({"calibration": calibration.to_json()} if calibration else {}),
        "sources": [{"name": name, "bytes": size, "sha256": sha256} for name, size, sha256 in sources],
    }


def _item(
    name: str, shape: tuple[int, ...], dtype: np.dtype, encoding: Encoding | None, *, most: bool
) -> Item:
    weights = int(np.prod(shape, dtype=np.int64))
    if encoding is None:
        return Item(name, dtype=CODE_OF[dtype], shape=shape, nbytes=weights * dtype.itemsize)
    rows, columns = shape
    entries = round(encoding.density * weights)
    alignment = smallest_alignment(encoding.value_bits)
    facts = MatrixFacts(
        shape=(rows, columns),
        manifold=encoding.manifold,
        row_alignment=alignment,
        true_nnz=entries,
        index=encoding.index,
        value_bits=encoding.value_bits,
        dtype="float32" if dtype == np.float64 else str(dtype),
        group_size=encoding.group_size,
    )
    if encoding.index == "dense":
        return Item(name, facts=facts, owned=rows * dense_row_entries(columns, alignment))
    # A row's gaps add up to at most columns - 1, and a filler stands for 255 of them.
    fillers = rows * max(columns - 1, 0) // MAX_DELTA if most else 0
    owned = entries + min(fillers, weights - entries)
    # Rows of equal length need no more than this; of others, each may end with almost a whole unit of padding.
    per_row = -(-owned // max(rows, 1))
    padded = owned + rows * (alignment - 1) if most else rows * dense_row_entries(per_row, alignment)
    return Item(name, facts=facts, owned=owned if alignment == 1 else padded - padded % -alignment)


def _warnings(tensors: list[TensorPlan], method: Method) -> list[str]:
    pruned = linears(tensors)
    warnings = []
    densities = [t.encoding.density for t in pruned] or [1.0]
    average = sum(t.encoding.density * t.num_weights for t in pruned) / max(
        sum(t.num_weights for t in pruned), 1
    )
    lowest, equal = min(densities), len(set(densities)) == 1
    # Densities by matrix go down to half the average, and are better than equal ones.
    if lowest <= (_WARN_AT if equal or average <= _WARN_AT else _WARN_AT / 2):
        reached = f"density {lowest:g}" if equal else f"densities from {lowest:g}, {average:.2f} on average,"
        measured = ", ".join(f"{p} at density {d}" for d, p in MEASURED_PERPLEXITY[method].items())
        harm = "ruins most models" if method == "magnitude" else "harms most models"
        advice = "choose another --method, and measure" if method == "magnitude" else "measure"
        warnings.append(
            f"one-shot pruning by {method} to {reached} {harm}: SmolLM2-135M's perplexity went from "
            f"{DENSE_PERPLEXITY} (nothing pruned) to {measured}; {advice} the result (`upg-jax eval`)"
        )
    bits = bits_per_weight(pruned)
    for limit, what in ((32, "float32"), (16, "bfloat16"), (8, "dense int8")):
        if bits > limit:
            warnings.append(
                f"the compressed layers take {bits:.2f} bits per weight, more than {what} ({limit}): this "
                "makes them no smaller than that"
            )
            break
    return warnings
