"""What one family of models adds to the shared decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from upg_jax.models._config import DecoderConfig
from upg_jax.models._weights import Weight


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's differences.

    Attributes:
        architecture: Hugging Face name of its class.
        model_type: Hugging Face's short name, for configurations without `architectures`.
        parse: reads a Hugging Face configuration.
        weights: lists every tensor that the model has.
        ignored: whether a checkpoint may have this tensor although the model does not use it.
    """

    architecture: str
    model_type: str
    parse: Callable[[Mapping[str, Any]], DecoderConfig]
    weights: Callable[[DecoderConfig], list[Weight]]
    ignored: Callable[[DecoderConfig, str], bool]
