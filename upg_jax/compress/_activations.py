"""A model's forward pass over calibration tokens, block by block, with a stop before every group of projections.

Any family of `upg_jax.models` runs as it is: each projection of a block is replaced by a function, which either
returns an output computed before or notes the input it gets. XLA leaves out whatever the noted input does not depend
on, so that every part of a block is computed once.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax.models import DecoderConfig, Weight, embed, head, run_layers

Visit: TypeAlias = Callable[[Sequence[str], Sequence[jax.Array]], Mapping[str, Any]]
"""Given the names of matrices that share their input, and that input in batches `(windows, tokens, features)`: returns
the float32 matrices to go on with."""

Hold: TypeAlias = Callable[[Iterable[jax.Array]], Sequence[jax.Array]]
"""Keeps a block's activations, batch by batch: `list`, or on disk."""

# So few that attention's scores stay in a processor's cache.
_BATCH_TOKENS = 1024


@dataclasses.dataclass
class _Notes:
    """Stands for a projection whose output is not known yet: notes its input."""

    key: str
    rows: int
    inputs: dict[str, jax.Array]

    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        self.inputs[self.key] = x
        return jnp.zeros((*x.shape[:-1], self.rows), x.dtype)


@dataclasses.dataclass
class _Given:
    """Stands for a projection whose output is known."""

    output: jax.Array

    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        return self.output if bias is None else self.output + bias[None, None]


@dataclasses.dataclass
class _Known:
    """A projection by a known matrix: notes its input."""

    key: str
    matrix: jax.Array
    inputs: dict[str, jax.Array]

    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        self.inputs[self.key] = x
        return _Given(_product(x, self.matrix))(x, bias)


Others: TypeAlias = dict[str, jax.Array]
Shapes: TypeAlias = tuple[tuple[str, int], ...]


def run_network(
    config: DecoderConfig,
    weights: Sequence[Weight],
    read: Callable[[str], Any],
    ids: np.ndarray,
    visit: Visit,
    hold: Hold = list,
    precision: str = "float32",
) -> None:
    """Runs a model over tokens; `visit` sees every group of projections in order and says what they become.

    In memory are the activations of one block, or of one batch if `hold` puts them elsewhere, its matrices, and what
    `read` and `visit` keep.

    Args:
        config: the model's.
        weights: its tensors.
        read: returns what is no projection by its name: the embedding, norms and biases.
        ids: int32 `(windows, tokens)`.
        visit: see `Visit`.
        hold: see `Hold`.
        precision: what the factors of projections are rounded to, `"float32"` or `"bfloat16"`; sums are float32.
    """
    slots = {weight.slot: weight for weight in weights}
    params = {slot: jnp.asarray(read(slots[slot].name), jnp.float32) for slot in ("embed_tokens", "norm")}
    windows = math.gcd(ids.shape[0], max(1, _BATCH_TOKENS // ids.shape[1]))
    batches = np.split(ids, ids.shape[0] // windows)
    stream = hold(embed(params, config, jnp.asarray(batch)) for batch in batches)
    del params
    groups: list[list[str]] = []
    for block in blocks(config, weights, read):
        one, names, others = block.config, block.names, block.others
        shapes = tuple(block.rows.items())
        groups = groups or _groups(one, shapes, others, stream[0])
        given: dict[str, Sequence[jax.Array]] = {}
        for group in groups:
            inputs = hold(
                _input_of(others, known, x, config=one, shapes=shapes, key=group[0])
                for known, x in _each(given, stream)
            )
            matrices = visit([names[key] for key in group], inputs)
            for key in group:
                given[key] = hold(_products(inputs, jnp.asarray(matrices[names[key]], precision)))
        stream = hold(_output_of(others, known, x, config=one) for known, x in _each(given, stream))
    if "lm_head" in slots:
        norm = jnp.asarray(read(slots["norm"].name), jnp.float32)
        visit([slots["lm_head"].name], hold(_input_of_head(norm, x, config=config) for x in stream))


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a model, but for its projections.

    Attributes:
        config: of a model that has no other block.
        names: of its projections, by key: a slot's name, or one for each expert.
        rows: output features of its projections, by key.
        others: its norms and biases by slot, float32, with a leading axis of 1.
    """

    config: DecoderConfig
    names: dict[str, str]
    rows: dict[str, int]
    others: Others


def blocks(config: DecoderConfig, weights: Sequence[Weight], read: Callable[[str], Any]) -> Iterator[Block]:
    """A model's blocks in order; arguments as of `run_network`."""
    in_layers = [weight for weight in weights if weight.per_layer]
    linear = [weight for weight in in_layers if weight.linear]
    rows = {key: w.shape[0] for w in linear for key in _keys(w)}
    for layer in range(config.num_layers):
        names = {key: name for w in linear for key, name in zip(_keys(w), w.names_in(layer), strict=True)}
        others = {
            weight.slot: jnp.asarray(read(weight.names_in(layer)[0]), jnp.float32)[None]
            for weight in in_layers
            if not weight.linear
        }
        yield Block(config.only(layer), names, rows, others)


def _each(given: Mapping[str, Sequence[jax.Array]], stream: Sequence[jax.Array]) -> Iterator[Any]:
    """Batch by batch: what is given of it by key, and the stream."""
    for i, x in enumerate(stream):
        yield {key: outputs[i] for key, outputs in given.items()}, x


def _products(inputs: Sequence[jax.Array], matrix: jax.Array) -> Iterator[jax.Array]:
    return (_product(x, matrix) for x in inputs)


class OnDisk(Sequence[jax.Array]):
    """Batches in a file without a name, read one at a time."""

    def __init__(self, batches: Iterable[jax.Array], directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: list[tuple[int, np.dtype, tuple[int, ...]]] = []
        for batch in batches:
            self._places.append((self._file.tell(), np.dtype(batch.dtype), batch.shape))
            self._file.write(np.asarray(batch).tobytes())

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        """A batch, in memory."""
        at, dtype, shape = self._places[index]
        self._file.seek(at)
        data = self._file.read(math.prod(shape) * dtype.itemsize)
        return jnp.asarray(np.frombuffer(data, dtype).reshape(shape))


def _keys(weight: Weight) -> list[str]:
    """What stands for a layer's matrices of one slot here: the slot itself, or one key for each expert."""
    return [f"{weight.slot}:{i:04d}" for i in range(weight.experts)] or [weight.slot]


def _by_slot(projections: Mapping[str, Any]) -> dict[str, Any]:
    """The projections of a model's only layer, as its parameters have them."""
    found: dict[str, Any] = {}
    for key in sorted(projections):
        slot = key.partition(":")[0]
        found[slot] = (*found.get(slot, ()), projections[key])
    return found


def _groups(config: DecoderConfig, shapes: Shapes, others: Others, x: jax.Array) -> list[list[str]]:
    """The projections of a block in the order of their use, those of one and the same input together."""
    seen: list[tuple[Any, list[str]]] = []

    class Note(_Notes):
        def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
            if seen and seen[-1][0] is x:
                seen[-1][1].append(self.key)
            else:
                seen.append((x, [self.key]))
            return super().__call__(x, bias)

    def block(others: Others, x: jax.Array) -> jax.Array:
        projections = _by_slot({key: Note(key, rows, {}) for key, rows in shapes})
        return run_layers(others | projections, config, x)[0]

    jax.eval_shape(block, others, x)
    return [group for _, group in seen]


@partial(jax.jit, static_argnames=("config", "shapes", "key"))
def _input_of(
    others: Others, given: Others, x: jax.Array, *, config: DecoderConfig, shapes: Shapes, key: str
) -> jax.Array:
    inputs: dict[str, jax.Array] = {}
    projections = {k: _Given(given[k]) if k in given else _Notes(k, rows, inputs) for k, rows in shapes}
    run_layers(others | _by_slot(projections), config, x)
    return inputs[key]


@partial(jax.jit, static_argnames="config")
def _output_of(others: Others, given: Others, x: jax.Array, *, config: DecoderConfig) -> jax.Array:
    return run_layers(others | _by_slot({key: _Given(y) for key, y in given.items()}), config, x)[0]


@partial(jax.jit, static_argnames="config")
def run_block(
    others: Others, matrices: Mapping[str, jax.Array], x: jax.Array, *, config: DecoderConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs a block whose projections are all known.

    Args:
        others: the block's.
        matrices: its projections by key, of the dtype that products round their factors to.
        x: float32 `(windows, tokens, hidden)`.
        config: the block's.

    Returns:
        What it leaves, and by key the sums of squares of each projection's input features.
    """
    inputs: dict[str, jax.Array] = {}
    projections = {key: _Known(key, matrix, inputs) for key, matrix in matrices.items()}
    x = run_layers(others | _by_slot(projections), config, x)[0]
    return x, {key: jnp.sum(jnp.square(values), axis=(0, 1)) for key, values in inputs.items()}


@partial(jax.jit, static_argnames="config")
def _input_of_head(norm: jax.Array, x: jax.Array, *, config: DecoderConfig) -> jax.Array:
    inputs: dict[str, jax.Array] = {}
    head({"norm": norm, "lm_head": _Notes("lm_head", 1, inputs)}, config, x)
    return inputs["lm_head"]


@jax.jit
def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum(
        "bti,oi->bto", x.astype(matrix.dtype), matrix, precision="highest", preferred_element_type=jnp.float32
    )
