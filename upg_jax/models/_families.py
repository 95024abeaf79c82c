"""The model families that this build knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upg_jax._errors import CheckpointError
from upg_jax.models import _gemma, _llama, _mistral, _mixtral, _phi3, _qwen2, _qwen3
from upg_jax.models._config import DecoderConfig
from upg_jax.models._weights import Weight, WeightSource, load_params

_FAMILIES = {
    family.architecture: family
    for family in (
        _llama.FAMILY,
        _mistral.FAMILY,
        _mixtral.FAMILY,
        _phi3.FAMILY,
        _qwen2.FAMILY,
        _qwen3.FAMILY,
        _gemma.GEMMA_2,
        _gemma.GEMMA_3,
    )
}
_MODEL_TYPES = {family.model_type: family.architecture for family in _FAMILIES.values()}


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face `config.json`.

    Args:
        config: its content. `architectures` decides the family; where it is absent, `model_type` does.

    Raises:
        CheckpointError: for an architecture that is not known, naming those that are, or for a setting that is
            missing, malformed or not supported, naming its key.
    """
    declared = config.get("architectures") or [_MODEL_TYPES.get(config.get("model_type", ""), "")]
    known = [name for name in declared if name in _FAMILIES] if isinstance(declared, list) else []
    if not known:
        raise CheckpointError(
            f"model config: architecture {config.get('architectures') or config.get('model_type')!r} is not "
            f"supported; this build knows {', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[known[0]].parse(config)


def weights(config: DecoderConfig) -> list[Weight]:
    """Lists the tensors of a model that `parse_config` knows, those of its layers once for all."""
    return _FAMILIES[config.architecture].weights(config)


def load(config: DecoderConfig, source: WeightSource, dtype: Any) -> dict[str, Any]:
    """Builds the decoder's parameters from a checkpoint's tensors.

    Args:
        config: what `parse_config` returned.
        source: where the tensors are.
        dtype: of the activations; norms, biases and dense matrices are converted to it.

    Raises:
        CheckpointError: if a tensor is missing, is not part of the model, has another shape, or is compressed
            where only a dense one can be used; the message names it.
    """
    family = _FAMILIES[config.architecture]
    return load_params(
        family.weights(config),
        config.num_layers,
        source,
        dtype,
        ignored=lambda name: family.ignored(config, name),
    )
