"""Keys of the decoder's projections that belong together."""

from __future__ import annotations

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
MLP_INPUTS = ("gate_proj", "up_proj")
EXPERT_INPUTS = ("experts.gate_proj", "experts.up_proj")
EXPERT_OUTPUT = "experts.down_proj"
