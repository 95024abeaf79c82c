"""Compressing a checkpoint: rules, pruning, and the resumable pipeline from files to a file."""

from __future__ import annotations

from upg_jax.compress._pipeline import Report, TensorReport, compress_checkpoint
from upg_jax.compress._plan import Plan, TensorPlan, plan
from upg_jax.compress._progress import Progress
from upg_jax.compress._prune import METHODS, prune_mask
from upg_jax.compress._settings import EMBEDDINGS, Embedding, Encoding, Rule, Settings

__all__ = [
    "EMBEDDINGS",
    "METHODS",
    "Embedding",
    "Encoding",
    "Plan",
    "Progress",
    "Report",
    "Rule",
    "Settings",
    "TensorPlan",
    "TensorReport",
    "compress_checkpoint",
    "plan",
    "prune_mask",
]
