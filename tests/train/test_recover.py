"""`recover`: from a compressed model and its original to a better one, in one piece or with a stop on the way."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import jax
import numpy as np
import pytest

from upg_jax import CheckpointError, UPGDecompressor, UPGModel
from upg_jax.compress import Settings, compress_checkpoint
from upg_jax.inference import compare
from upg_jax.train import RecoverySettings, _recover, recover
from upg_jax.train._checkpoint import TrainingCheckpoint

TEXT = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, 4000))
BUDGET = RecoverySettings(
    tokens=32 * 8 * 24, window=32, batch=4, micro_batches=2, learning_rate=3e-3, precision="float32"
)


@pytest.fixture(scope="module")
def models(gguf_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("recover")
    compress_checkpoint(gguf_model, directory / "half", Settings(density=0.5))
    return gguf_model, directory / "half"


@pytest.fixture(scope="module")
def recovered(models, tmp_path_factory):
    dense, half = models
    seen = []
    out = tmp_path_factory.mktemp("out") / "better"
    done = recover(half, dense, [TEXT], out, BUDGET, progress=seen.append)
    return out, done, seen


def planes(directory):
    with UPGDecompressor.from_safetensors(directory) as file:
        found = {}
        for name in file.names():
            mdcsr = file.info(name).kind == "mdcsr"
            found[name] = (file.get_layer if mdcsr else file.get_array)(name, device=False)
        return jax.tree.map(np.array, found)


def test_the_model_is_nearer_to_the_dense_one(models, recovered):
    dense, before, after = (UPGModel.from_file(path) for path in (*models, recovered[0]))
    other_text = "".join(chr(97 + i) for i in np.random.default_rng(1).integers(0, 26, 400))
    was, now = (compare(model, dense, other_text, window=32).kl for model in (before, after))
    assert now < 0.9 * was


def test_only_values_scales_and_norms_change(models, recovered):
    before, after = planes(models[1]), planes(recovered[0])
    assert before.keys() == after.keys()
    changed = set()
    for name, old in before.items():
        new = after[name]
        if not all(
            np.array_equal(a, b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        ):
            changed.add(name.split(".")[-2])
        if hasattr(old, "values"):
            # A weight that training made too small for its row's scale is no longer stored.
            assert new.true_nnz <= old.true_nnz
            kept = np.asarray(new.to_dense()) != 0
            assert not np.any(kept & (np.asarray(old.to_dense()) == 0))
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert changed == projections | {"norm", "input_layernorm", "post_attention_layernorm"}


def test_the_result_is_valid_and_says_how_it_was_made(recovered):
    out, done, seen = recovered
    with UPGDecompressor.from_safetensors(out) as file:
        file.verify()
        recovery = file.provenance["recovery"]
    assert recovery["settings"]["tokens"] == BUDGET.tokens
    assert recovery["steps"] == done.steps == 24
    assert [p.step for p in seen] == list(range(1, 25))
    assert seen[-1].spent == 1
    assert seen[-1].kl < seen[0].kl
    assert (out / "config.json").is_file()
    assert not out.with_name(out.name + ".partial").exists()


def test_a_stopped_run_goes_on_to_the_same_bytes(models, recovered, tmp_path):
    dense, half = models

    def stop(p):
        if p.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(half, dense, [TEXT], tmp_path / "m", BUDGET, progress=stop)
    steps = []
    recover(half, dense, [TEXT], tmp_path / "m", BUDGET, progress=lambda p: steps.append(p.step))
    assert steps == list(range(6, 25))
    wanted, found = (planes(path) for path in (recovered[0], tmp_path / "m"))
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs a signal for one thread")
def test_ctrl_c_in_the_middle_of_a_step_goes_on_to_the_same_bytes(models, recovered, tmp_path, monkeypatch):
    dense, half = models
    step = _recover.train_step
    taken = []

    def pressed(*args, **settings):
        taken.append(None)
        results = step(*args, **settings)  # what it was given is gone
        if len(taken) == 6:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return results

    monkeypatch.setattr(_recover, "train_step", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            recover(half, dense, [TEXT], tmp_path / "m", BUDGET)
    finally:
        signal.signal(signal.SIGINT, before)
    steps = []
    recover(half, dense, [TEXT], tmp_path / "m", BUDGET, progress=lambda p: steps.append(p.step))
    assert steps == list(range(7, 25))
    wanted, found = (planes(path) for path in (recovered[0], tmp_path / "m"))
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_that_fails_leaves_the_last_checkpoint(models, tmp_path, monkeypatch):
    dense, half = models
    step = _recover.train_step
    taken = []

    def failing(*args, **settings):
        taken.append(None)
        results = step(*args, **settings)
        if len(taken) == 6:
            raise RuntimeError("no memory left")
        return results

    monkeypatch.setattr(_recover, "train_step", failing)
    often = dataclasses.replace(BUDGET, checkpoint_minutes=1e-9)
    with pytest.raises(RuntimeError, match="no memory left"):
        recover(half, dense, [TEXT], tmp_path / "m", often)
    steps = []
    recover(half, dense, [TEXT], tmp_path / "m", often, progress=lambda p: steps.append(p.step))
    assert steps == list(range(6, 25))


def test_unfinished_work_from_other_settings_is_refused(models, tmp_path):
    dense, half = models

    def stop(p):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(half, dense, [TEXT], tmp_path / "m", BUDGET, progress=stop)
    other = dataclasses.replace(BUDGET, learning_rate=1e-3)
    with pytest.raises(CheckpointError, match=r"begun with settings .*--restart"):
        recover(half, dense, [TEXT], tmp_path / "m", other)
    state = tmp_path / "m.partial" / "training.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        recover(half, dense, [TEXT], tmp_path / "m", BUDGET)


def test_beginning_anew_removes_directories_but_not_what_links_lead_to(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").touch()
    checkpoint = TrainingCheckpoint(tmp_path / "m", {})
    (checkpoint.path / "half.tmp" / "inner").mkdir(parents=True)
    checkpoint.output.symlink_to(mine)
    checkpoint.open(restart=True)
    assert list(checkpoint.path.iterdir()) == []
    assert (mine / "notes.txt").exists()


@pytest.mark.skipif(os.name != "posix", reason="directories have no locks on Windows")
def test_a_second_run_of_the_same_destination_is_refused_before_it_trains(models, tmp_path):
    dense, half = models
    refused = []

    def second_run(progress):
        for restart in (False, True):
            with pytest.raises(CheckpointError, match="another run is at work"):
                recover(half, dense, [TEXT], tmp_path / "m", BUDGET, restart=restart, force=True)
            refused.append(progress.step)

    settings = dataclasses.replace(BUDGET, tokens=32 * 8 * 2)
    for restart in (False, True):
        recover(
            half, dense, [TEXT], tmp_path / "m", settings, progress=second_run, restart=restart, force=restart
        )
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert refused == [1, 1, 2, 2] * 2


def test_minutes_end_a_training(models, tmp_path):
    dense, half = models
    settings = dataclasses.replace(BUDGET, tokens=None, minutes=0.01)
    done = recover(half, dense, [TEXT], tmp_path / "m", settings)
    assert 0.6 <= done.seconds < 120
    assert done.steps >= 1


def test_places_that_are_in_the_way_are_refused(models, recovered, tmp_path):
    dense, half = models
    with pytest.raises(CheckpointError, match=r"compressed model already.*--force"):
        recover(half, dense, [TEXT], recovered[0], BUDGET)
    with pytest.raises(CheckpointError, match="not a compressed model"):
        recover(half, dense, [TEXT], tmp_path, BUDGET)
    with pytest.raises(CheckpointError, match="must not lie in the model"):
        recover(half, dense, [TEXT], half / "inner", BUDGET)
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not an unfinished training"):
        recover(half, dense, [TEXT], tmp_path / "m", BUDGET)
    assert (tmp_path / "m.partial" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "give minutes or tokens"),
        ({"tokens": 0}, "tokens must be above 0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"distillation": 0.0, "language_model": 0.0}, "not both 0"),
        ({"precision": "float16"}, "float32 or bfloat16"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BUDGET, **changes)


def test_the_learning_rate_rises_and_falls():
    settings = dataclasses.replace(BUDGET, warmup=0.1, learning_rate=2.0)
    rates = [settings.rate(share) for share in (0.0, 0.05, 0.1, 0.55, 1.0, 1.2)]
    np.testing.assert_allclose(rates, [0, 1, 2, 1, 0, 0], atol=1e-12)
