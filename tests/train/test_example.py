"""The example in examples/ does what it says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import jax

from upg_jax import UPGModel
from upg_jax.compress import Settings, compress_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_sparse.py"


def test_a_loop_of_ones_own_lowers_the_loss_and_saves_a_model(gguf_model, tmp_path, monkeypatch, capsys):
    compress_checkpoint(gguf_model, tmp_path / "half", Settings(density=0.5))
    (tmp_path / "text.txt").write_text("he says that she is here, and she says that he is there. " * 20)
    files = (tmp_path / "half", gguf_model, tmp_path / "text.txt", tmp_path / "t.safetensors")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, files), "--steps", "12", "--window", "32"])
    # As users run it; optax needs JAX's own promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    model = UPGModel.from_file(tmp_path / "t.safetensors")
    assert model.forward([[1, 2, 3]])[0].shape == (1, 3, model.config.vocab_size)
