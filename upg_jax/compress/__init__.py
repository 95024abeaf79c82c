"""Compressing a checkpoint: rules, pruning, and the resumable pipeline from files to a file."""

from __future__ import annotations

from upg_jax.compress._allocation import allocate
from upg_jax.compress._calibration import Calibration, default_texts, read_texts
from upg_jax.compress._pipeline import Report, TensorReport, compress_checkpoint
from upg_jax.compress._plan import Plan, TensorPlan, plan
from upg_jax.compress._progress import Progress
from upg_jax.compress._prune import CALIBRATED, METHODS, prune_mask
from upg_jax.compress._settings import EMBEDDINGS, Embedding, Encoding, Rule, Settings
from upg_jax.compress._sparsegpt import Pruned, sparsegpt

__all__ = [
    "CALIBRATED",
    "EMBEDDINGS",
    "METHODS",
    "Calibration",
    "Embedding",
    "Encoding",
    "Plan",
    "Progress",
    "Pruned",
    "Report",
    "Rule",
    "Settings",
    "TensorPlan",
    "TensorReport",
    "allocate",
    "compress_checkpoint",
    "default_texts",
    "plan",
    "prune_mask",
    "read_texts",
    "sparsegpt",
]
