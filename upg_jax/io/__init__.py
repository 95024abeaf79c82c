"""Model files: UPG version 2 (read and write), version 1 (converted), and source checkpoints."""

from __future__ import annotations

from upg_jax.io._checkpoint import Checkpoint, open_checkpoint
from upg_jax.io._info import TensorInfo
from upg_jax.io._reader import UPGDecompressor
from upg_jax.io._v1 import convert_v1
from upg_jax.io._writer import save

__all__ = ["Checkpoint", "TensorInfo", "UPGDecompressor", "convert_v1", "open_checkpoint", "save"]
