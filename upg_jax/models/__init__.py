"""Decoder-only transformers on dense or compressed layers, as pure functions of a parameter pytree."""

from __future__ import annotations

from upg_jax.models._cache import KVCache, init_cache
from upg_jax.models._config import DecoderConfig
from upg_jax.models._decoder import Params, embed, forward, head, run_layers
from upg_jax.models._embedding import decoded_rows
from upg_jax.models._families import load, parse_config, weights
from upg_jax.models._linear import Linear, Linears, is_stacked
from upg_jax.models._packing import pack_params
from upg_jax.models._tensor_parallel import (
    on_own_mesh,
    placement,
    replicated,
    shard_params,
    sharded_cache,
)
from upg_jax.models._weights import Weight, WeightSource, can_stack, stack_layers

__all__ = [
    "DecoderConfig",
    "KVCache",
    "Linear",
    "Linears",
    "Params",
    "Weight",
    "WeightSource",
    "can_stack",
    "decoded_rows",
    "embed",
    "forward",
    "head",
    "init_cache",
    "is_stacked",
    "load",
    "on_own_mesh",
    "pack_params",
    "parse_config",
    "placement",
    "replicated",
    "run_layers",
    "shard_params",
    "sharded_cache",
    "stack_layers",
    "weights",
]
