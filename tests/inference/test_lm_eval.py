"""`lm-eval` on a small model and a task of four questions, with its data on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_models import byte_level

from upg_jax import UPGModel
from upg_jax.inference import evaluate_tasks, lm_eval_adapter

pytest.importorskip("lm_eval", reason="tasks: pip install 'upg-jax[tasks]'")
# What lm-eval and its dependencies deprecate is not ours to change.
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    {"question": "he is", "choices": ["here", "there", "the"], "answer": 0},
    {"question": "she said that he", "choices": ["was", "he", "x"], "answer": 1},
    {"question": "where", "choices": ["q", "he she he"], "answer": 1},
    {"question": "the", "choices": ["end", "he"], "answer": 0},
]
TASK = """
task: four_questions
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return UPGModel.from_file(byte_level.write(tmp_path_factory.mktemp("model") / "small.gguf"))


def log_likelihood(model, context, continuation):
    ids = model.encode(context + continuation)
    logits = np.asarray(model.forward(np.asarray([ids]))[0])[0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    at = np.arange(len(model.encode(context)), len(ids))
    greedy = logits[at - 1].argmax(-1) == np.asarray(ids)[at]
    return log_p[at - 1, np.asarray(ids)[at]].sum(), bool(greedy.all())


@pytest.mark.slow  # importing lm-eval's tasks and datasets alone takes seconds
def test_accuracy_is_that_of_the_likeliest_choices(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "four.yaml").write_text(TASK.format(data=data))
    right = [
        int(np.argmax([log_likelihood(model, q["question"], " " + c)[0] for c in q["choices"]]))
        == q["answer"]
        for q in QUESTIONS
    ]
    results = evaluate_tasks(model, ["four_questions"], include_path=tmp_path / "tasks")
    assert results["four_questions"]["acc,none"] == np.mean(right)
    with pytest.raises(ValueError, match="no task 'no_such_task'"):
        evaluate_tasks(model, ["no_such_task"])


def request(*arguments):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def test_scores_are_those_of_the_logits(model):
    pairs = [("he says ", "that"), ("the", " end of it"), ("x" * 90, "he")]
    found = lm_eval_adapter(model).loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (score, greedy), (context, continuation) in zip(found, pairs, strict=True):
        # Spaces at the end of a context belong to what follows.
        spaces = context[len(context.rstrip()) :]
        wanted, is_greedy = log_likelihood(model, context.rstrip(), spaces + continuation)
        assert score == pytest.approx(wanted, abs=1e-3)
        assert greedy == is_greedy


def test_answers_end_before_a_stop_string(model):
    whole = model.generate("he says", max_new_tokens=8).text
    stop = whole[len(whole) // 2]
    (answer,) = lm_eval_adapter(model).generate_until(
        [request("he says", {"until": [stop], "max_gen_toks": 8})]
    )
    assert answer == whole[: whole.index(stop)]


def test_a_long_text_is_scored_in_pieces(model):
    text = "he says that she is here " * 10
    (found,) = lm_eval_adapter(model).loglikelihood_rolling([request(text)])
    ids, longest = model.encode(text), model.config.max_position_embeddings - 1
    assert len(ids) > longest
    before = [model.eos_token_ids[0], *ids]
    total = 0.0
    for start in range(0, len(ids), longest):
        part = before[start : start + longest + 1]
        logits = np.asarray(model.forward(np.asarray([part]))[0])[0].astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        total += log_p[np.arange(len(part) - 1), part[1:]].sum()
    assert found == pytest.approx(total, abs=1e-2)
