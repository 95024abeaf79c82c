"""What the shared decoder needs to know of a model."""

from __future__ import annotations

import dataclasses

from upg_jax._errors import CheckpointError
from upg_jax.models._rope import Rope


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What the layers of a model may differ in.

    Attributes:
        rope: rotary position embedding.
        window: positions that a token sees, its own included; None if it sees all before it.
    """

    rope: Rope
    window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer: residual blocks of grouped-query attention and a gated MLP.

    Hashable, so that it can be a static argument of jitted functions. What else a family has shows in its parameters:
    see `Params`.

    Attributes:
        architecture: Hugging Face name of the family's class, e.g. `"LlamaForCausalLM"`.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP.
        kinds: the different kinds of layers.
        layers: for each layer its place in `kinds`.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: features of one head; even.
        max_position_embeddings: positions that the model was made for; generation stays within them.
        rms_norm_eps: added to the mean square.
        norm_offset: added to the norms' weights.
        activation: of the MLP's gate, `"silu"` or `"gelu_tanh"`.
        attention_scale: what scores are multiplied by.
        attention_cap: limits scores to +-cap by a hyperbolic tangent; None leaves them.
        logit_cap: the same for logits.
        embedding_scale: what embeddings are multiplied by.
        experts: MLPs of a layer that a router chooses among; 0 without one.
        experts_per_token: how many it chooses.
        tie_word_embeddings: the head is the embedding.
        attention_bias: all attention projections have biases.
        mlp_bias: the MLP's projections have biases.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    kinds: tuple[LayerKind, ...]
    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    norm_offset: float = 0.0
    activation: str = "silu"
    attention_scale: float
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    experts: int = 0
    experts_per_token: int = 0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"model config: num_key_value_heads must divide num_attention_heads; got {self.num_kv_heads} "
                f"and {self.num_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"model config: head_dim must be even for rotary positions; got {self.head_dim}"
            )
        if self.experts_per_token > self.experts:
            raise CheckpointError(
                f"model config: num_experts_per_tok must be at most num_local_experts; got {self.experts_per_token} "
                f"and {self.experts}"
            )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    def only(self, layer: int) -> DecoderConfig:
        """The configuration of a model that has this layer alone."""
        return dataclasses.replace(self, layers=(self.layers[layer],))
