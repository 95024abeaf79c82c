"""Language models that answer: loading, tokenizing, sampling, generating, measuring."""

from __future__ import annotations

from upg_jax.inference._answer import Generation, StreamedToken
from upg_jax.inference._comparison import Comparison, WeightError, compare, weight_errors
from upg_jax.inference._engine import Engine
from upg_jax.inference._lm_eval import evaluate_tasks, lm_eval_adapter
from upg_jax.inference._logprobs import TokenLogprobs
from upg_jax.inference._model import UPGModel
from upg_jax.inference._perplexity import Perplexity, perplexity
from upg_jax.inference._request import EngineBusyError, EngineClosedError, Request
from upg_jax.inference._sampling import Sampling, sample
from upg_jax.inference._settings import GenerationSettings
from upg_jax.inference._tokenizer import TextStream, Tokenizer

__all__ = [
    "Comparison",
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "Generation",
    "GenerationSettings",
    "Perplexity",
    "Request",
    "Sampling",
    "StreamedToken",
    "TextStream",
    "TokenLogprobs",
    "Tokenizer",
    "UPGModel",
    "WeightError",
    "compare",
    "evaluate_tasks",
    "lm_eval_adapter",
    "perplexity",
    "sample",
    "weight_errors",
]
