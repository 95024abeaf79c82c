"""The text model inside a Hugging Face checkpoint that also reads images, as a checkpoint of its own would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from upg_jax._errors import CheckpointError

# By the class that reads images, too: that of its text model alone.
_TEXT_MODELS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
# What a name begins with in published files, and what it is in the text model's; `transformers` has the second in
# memory, and some tools save it like that.
_TEXT = {"language_model.": "", "model.language_model.": "model."}
_IMAGES = tuple(
    f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)

Tensor = TypeVar("Tensor")


def text_model(
    where: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Leaves out what reads images, and gives the rest the keys and names of a model of text.

    Args:
        where: names the checkpoint in messages.
        config: content of its `config.json`.
        tensors: by the names in its files.

    Returns:
        Configuration and tensors of the text model, both as they are for a checkpoint that has nothing else, and the
        names of what was left out.

    Raises:
        CheckpointError: if there is no description of the text model, or two tensors have one name in it.
    """
    declared = config.get("architectures")
    known = [name for name in declared if name in _TEXT_MODELS] if isinstance(declared, list) else []
    if not known:
        return config, tensors, []
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"{where}: {known[0]} must have an object 'text_config'; got {text!r}")
    # Beside the text model's own: the token that ends a turn of a chat is named here.
    outer = {key: config[key] for key in ("eos_token_id",) if key in config}
    left_out = [name for name in tensors if name.startswith(_IMAGES)]
    renamed: dict[str, str] = {}
    for name in sorted(tensors.keys() - left_out):
        new = _renamed(name)
        if new in renamed:
            raise CheckpointError(
                f"{where}: {renamed[new]} and {name} are one tensor of the text model; the checkpoint must have one of "
                "them"
            )
        renamed[new] = name
    found = {new: tensors[name] for new, name in renamed.items()}
    return {**text, **outer, "architectures": [_TEXT_MODELS[known[0]]]}, found, left_out


def _renamed(name: str) -> str:
    for prefix, instead in _TEXT.items():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name
