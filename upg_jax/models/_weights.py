"""From a checkpoint's tensor names to the decoder's parameter pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from upg_jax._errors import CheckpointError
from upg_jax._mdcsr import STATIC_FIELDS, MdCSR, stack
from upg_jax.models._embedding import is_rows
from upg_jax.models._linear import Linear, Linears

# A stack pads its layers to one length; beyond this share of padding they stay apart.
MAX_PADDING = 0.05


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter of the decoder and the tensor, or the tensors of all layers, that it is read from.

    Attributes:
        slot: key in the parameters, or in their `layers` if `name` has a `{layer}`.
        name: the checkpoint's tensor name.
        shape: of one tensor.
        linear: a matrix that is multiplied by, and may be compressed.
        experts: how many of them a layer has, one for each `{expert}` of the name; 0 if there is none in it.
    """

    slot: str
    name: str
    shape: tuple[int, ...]
    linear: bool = False
    experts: int = 0

    @property
    def per_layer(self) -> bool:
        """Whether each layer has such a tensor."""
        return "{layer}" in self.name

    def names(self, layers: int) -> list[str]:
        """The tensors' names; those of a layer's experts side by side."""
        if not self.per_layer:
            return [self.name]
        return [name for i in range(layers) for name in self.names_in(i)]

    def names_in(self, layer: int) -> list[str]:
        """The names of one layer's tensors."""
        return [self.name.format(layer=layer, expert=i) for i in range(max(self.experts, 1))]


class WeightSource(Protocol):
    """Named tensors, dense or compressed."""

    @property
    def where(self) -> str:
        """Names the source in messages."""

    def names(self) -> Sequence[str]:
        """All tensors' names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, of the dense one if it is compressed."""

    def read(self, name: str) -> Any:
        """A tensor, as an array or as an `MdCSR`."""

    def read_all(self, names: Sequence[str]) -> MdCSR | tuple[Any, ...]:
        """One projection of all layers."""


def load_params(
    weights: Sequence[Weight],
    layers: int,
    source: WeightSource,
    dtype: Any,
    ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Builds the decoder's parameters.

    Args:
        weights: every tensor that the model has.
        layers: number of layers.
        source: where the tensors are.
        dtype: of the activations; norms, biases and dense matrices are converted to it. An embedding that is only
            looked up stays as it is stored.
        ignored: whether a tensor that is not among `weights` is harmless.

    Raises:
        CheckpointError: if a tensor is missing, is not part of the model, has another shape, or is compressed
            where only a dense one can be used; the message names it.
    """
    _check_names(weights, layers, source, ignored)
    tied = all(weight.slot != "lm_head" for weight in weights)

    def dense(name: str) -> np.ndarray:
        array = source.read(name)
        if isinstance(array, MdCSR):
            raise CheckpointError(
                f"{source.where}: tensor {name!r} is compressed; it must be dense; exclude it"
            )
        return np.asarray(array)

    def embedding(name: str) -> Linear:
        array = source.read(name)
        if isinstance(array, MdCSR):
            if not is_rows(array):
                raise CheckpointError(
                    f"{source.where}: tensor {name!r} is compressed with index {array.index!r} and "
                    f"{array.value_bits}-bit values on the {array.manifold} manifold; rows are looked up in it, so it "
                    "must be dense, or have index 'dense' and 8-bit values on the unit manifold; compress the model "
                    "with --embedding int8 or float"
                )
            return array
        return jnp.asarray(array, dtype if tied else None)

    def matrix(weight: Linear) -> Linear:
        return weight if isinstance(weight, MdCSR) else jnp.asarray(weight, dtype)

    params: dict[str, Any] = {"layers": {}}
    for weight in weights:
        names = weight.names(layers)
        if weight.per_layer and weight.linear:
            found = source.read_all(names)
            params["layers"][weight.slot] = found if isinstance(found, MdCSR) else tuple(map(matrix, found))
        elif weight.per_layer:
            # On the host, where it compiles nothing.
            params["layers"][weight.slot] = jnp.asarray(np.stack([dense(name) for name in names]), dtype)
        elif weight.linear:
            params[weight.slot] = matrix(source.read(names[0]))
        elif weight.slot == "embed_tokens":
            params[weight.slot] = embedding(names[0])
        else:
            params[weight.slot] = jnp.asarray(dense(names[0]), dtype)
    return params


def can_stack(layers: Sequence[MdCSR], capacities: Sequence[int]) -> bool:
    """Whether compressed layers may share one stack: equal metadata, and little padding.

    Args:
        layers: one projection of all layers.
        capacities: the length that each layer's planes need.
    """
    kinds = {(layer.manifold, *(getattr(layer, field) for field in STATIC_FIELDS)) for layer in layers}
    return len(kinds) == 1 and max(capacities) * len(capacities) <= (1 + MAX_PADDING) * sum(capacities)


def stack_layers(layers: Sequence[Linear]) -> Linears:
    """Stores one projection of all layers in the form that the decoder reads fastest."""
    compressed = [layer for layer in layers if isinstance(layer, MdCSR)]
    if len(compressed) == len(layers) and can_stack(compressed, [layer.capacity for layer in compressed]):
        return stack(compressed)
    return tuple(layers)


def _check_names(
    weights: Sequence[Weight], layers: int, source: WeightSource, ignored: Callable[[str], bool]
) -> None:
    expected = {name: weight.shape for weight in weights for name in weight.names(layers)}
    present = set(source.names())
    missing = [name for name in expected if name not in present]
    if missing:
        raise CheckpointError(
            f"{source.where}: the model needs tensor {missing[0]!r}, which is missing{_more(missing)}"
        )
    extra = sorted(name for name in present if name not in expected and not ignored(name))
    if extra:
        raise CheckpointError(
            f"{source.where}: tensor {extra[0]!r} is not part of the model that the configuration describes"
            f"{_more(extra)}"
        )
    for name, shape in expected.items():
        if tuple(source.shape(name)) != shape:
            raise CheckpointError(
                f"{source.where}: tensor {name!r} must have shape {shape} by the configuration; "
                f"got {tuple(source.shape(name))}"
            )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
