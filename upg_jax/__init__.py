"""Compressed linear layers for JAX: pruned int8 weights, read in place inside jit.

The names listed here are the public API; everything in underscore modules may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from upg_jax._version import __version__

if TYPE_CHECKING:
    from upg_jax._errors import (
        BackendError,
        CheckpointError,
        EncodingError,
        FormatError,
        MissingDependencyError,
        UPGError,
    )
    from upg_jax._mdcsr import MdCSR, stack
    from upg_jax._pack import pack, unpack
    from upg_jax._partition import combine, partition
    from upg_jax._sharded import ShardedMdCSR, shard
    from upg_jax._sparse_dense import sparse_dense, use_backend
    from upg_jax._trainable import TrainableMdCSR
    from upg_jax.inference import UPGModel
    from upg_jax.io import UPGDecompressor, save

__all__ = [
    "BackendError",
    "CheckpointError",
    "EncodingError",
    "FormatError",
    "MdCSR",
    "MissingDependencyError",
    "ShardedMdCSR",
    "TrainableMdCSR",
    "UPGDecompressor",
    "UPGError",
    "UPGModel",
    "__version__",
    "combine",
    "pack",
    "partition",
    "save",
    "shard",
    "sparse_dense",
    "stack",
    "unpack",
    "use_backend",
]

# Importing a name on first use keeps `upg-jax --help` from importing jax.
_MODULE_OF = {
    "BackendError": "upg_jax._errors",
    "CheckpointError": "upg_jax._errors",
    "EncodingError": "upg_jax._errors",
    "FormatError": "upg_jax._errors",
    "MissingDependencyError": "upg_jax._errors",
    "UPGError": "upg_jax._errors",
    "MdCSR": "upg_jax._mdcsr",
    "stack": "upg_jax._mdcsr",
    "pack": "upg_jax._pack",
    "unpack": "upg_jax._pack",
    "combine": "upg_jax._partition",
    "partition": "upg_jax._partition",
    "ShardedMdCSR": "upg_jax._sharded",
    "shard": "upg_jax._sharded",
    "sparse_dense": "upg_jax._sparse_dense",
    "use_backend": "upg_jax._sparse_dense",
    "TrainableMdCSR": "upg_jax._trainable",
    "UPGModel": "upg_jax.inference",
    "UPGDecompressor": "upg_jax.io",
    "save": "upg_jax.io",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'upg_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
