"""Winning back what compression lost: training on a compressed model's pattern, with the dense model as teacher.

`recover` does it from files to a file. A training loop of one's own uses the same pieces: `Student` and `Teacher`,
`distillation_loss`, and `TokenWindows`; examples/train_sparse.py is one.
"""

from __future__ import annotations

from upg_jax._precision import best_precision
from upg_jax.train._loss import Losses, distillation_loss
from upg_jax.train._network import Student, Teacher
from upg_jax.train._recover import Recovered, recover
from upg_jax.train._settings import RecoveryProgress, RecoverySettings
from upg_jax.train._text import TokenWindows

__all__ = [
    "Losses",
    "Recovered",
    "RecoveryProgress",
    "RecoverySettings",
    "Student",
    "Teacher",
    "TokenWindows",
    "best_precision",
    "distillation_loss",
    "recover",
]
