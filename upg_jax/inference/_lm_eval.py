"""Benchmarks of EleutherAI's `lm-eval` on a `UPGModel`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._errors import MissingDependencyError
from upg_jax.inference._model import UPGModel
from upg_jax.models import DecoderConfig, Params, forward

# Requests are padded to multiples of this, so that few lengths are compiled.
_LENGTH = 64


def evaluate_tasks(
    model: UPGModel,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs tasks of `lm-eval`, such as multiple choice, whose data are on disk or can be downloaded.

    Args:
        model: with a tokenizer.
        tasks: names of tasks.
        include_path: a directory with task files of one's own.
        limit: documents of each task at most.
        few_shot: examples before each question; the task's own number by default.

    Returns:
        For each task its metrics, as `lm-eval` names them.

    Raises:
        MissingDependencyError: without `lm-eval`.
        ValueError: for a task that is not known.
    """
    adapter = lm_eval_adapter(model)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"evaluate_tasks: no task {unknown[0]!r}; own task files are found through include_path"
        )
    found = simple_evaluate(
        adapter, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=few_shot, bootstrap_iters=0
    )
    return dict(found["results"])


def lm_eval_adapter(model: UPGModel) -> Any:
    """A model as `lm-eval` wants it, an `lm_eval.api.model.LM`.

    Texts are cut at the left to the positions that the model was made for. Without a token for the end of a text, the
    first of the vocabulary stands before a continuation that has no context.

    Raises:
        MissingDependencyError: without `lm-eval`.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as e:
        raise MissingDependencyError('eval: tasks need lm-eval; pip install "upg-jax[tasks]"') from e

    class Adapter(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
        @property
        def eot_token_id(self) -> int:
            return model.eos_token_ids[0] if model.eos_token_ids else 0

        @property
        def tokenizer_name(self) -> str:
            return model.name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return model.encode(string) if string else []

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return [_score(model, [*context, *ids], len(ids)) for _, context, ids in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            longest = model.config.max_position_embeddings - 1
            found = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                parts = [ids[start : start + longest] for start in range(0, len(ids), longest)]
                before = [self.eot_token_id, *(part[-1] for part in parts)]
                scores = [
                    _score(model, [first, *part], len(part))
                    for first, part in zip(before, parts, strict=False)
                ]
                found.append(sum(score for score, _ in scores))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [_answer(model, *request.args) for request in requests]

    return Adapter()


def _score(model: UPGModel, ids: list[int], scored: int) -> tuple[float, bool]:
    """The log-likelihood of the last tokens, and whether each is the most likely."""
    ids = ids[-model.config.max_position_embeddings :]
    scored = min(scored, len(ids) - 1)
    padded = np.zeros((1, -(-len(ids) // _LENGTH) * _LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    first, length = np.int32(len(ids) - scored), np.int32(len(ids))
    total, wrong = _window(model.params, model.config, padded, first, length)
    return float(total), int(wrong) == 0


@partial(jax.jit, static_argnames="config")
def _window(
    params: Params, config: DecoderConfig, ids: jax.Array, first: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    log_p = jax.nn.log_softmax(forward(params, config, ids)[0][0, :-1])
    targets = ids[0, 1:]
    at = jnp.arange(1, ids.shape[1])
    counted = (at >= first) & (at < length)
    chosen = jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
    wrong = jnp.argmax(log_p, axis=-1).astype(targets.dtype) != targets
    return jnp.sum(jnp.where(counted, chosen, 0.0)), jnp.sum(counted & wrong)


def _answer(model: UPGModel, prompt: str, settings: dict[str, Any]) -> str:
    until = settings.get("until") or ()
    limit = int(settings.get("max_gen_toks", 256))
    room = max(model.config.max_position_embeddings - limit, 1)
    answer = model.generate(
        model.encode(prompt)[-room:],
        max_new_tokens=limit,
        temperature=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
        stop=until if isinstance(until, str) else tuple(until),
    )
    return answer.text or ""
