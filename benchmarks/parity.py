"""How far logits are from those of `transformers`, for every family.

    python -m benchmarks.parity --out rows.jsonl

The random models and the reference are those of tests/models/test_families.py, which use every feature of a family;
so this needs `pip install '.[test,oracle]'`. Ours run over a whole sequence at once and token by token through the
cache, with float32 and with bfloat16 activations; a row has the largest absolute difference of each from the logits of
`transformers` in float32, and for comparison that of `transformers` itself in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._rows import ROOT, Writer, environment
from upg_jax import UPGModel
from upg_jax.models import forward

sys.path.insert(0, str(ROOT / "tests"))
from helpers.hf_families import CASES, VOCABULARY, WINDOW, dense_model, make, reference_logits

TOKENS = 70
_compiled = jax.jit(forward, static_argnames=("config",))


def whole(model: UPGModel, ids: np.ndarray) -> np.ndarray:
    """Logits of all tokens at once."""
    return np.asarray(_compiled(model.params, model.config, jnp.asarray(ids))[0])


def token_by_token(model: UPGModel, ids: np.ndarray) -> np.ndarray:
    """Logits of one token after the other, through the cache."""
    cache, found = model.init_cache(*ids.shape), []
    for t in range(ids.shape[1]):
        logits, cache = _compiled(model.params, model.config, jnp.asarray(ids[:, t : t + 1]), cache)
        found.append(np.asarray(logits))
    return np.concatenate(found, axis=1)


def theirs_in_bfloat16(name: str, ids: np.ndarray) -> np.ndarray:
    """Logits of `transformers` with weights and activations in bfloat16."""
    import torch

    with torch.no_grad():
        model = copy.deepcopy(make(name)[0]).to(torch.bfloat16)
        return model(torch.tensor(ids), use_cache=False).logits.float().numpy()


def measure(name: str) -> dict[str, Any]:
    """The row of a family."""
    assert TOKENS > 3 * WINDOW
    ids = np.random.default_rng(TOKENS).integers(1, VOCABULARY, (2, TOKENS))
    expected = reference_logits(name, ids)
    found = {"transformers bfloat16": theirs_in_bfloat16(name, ids)}
    for dtype in ("float32", "bfloat16"):
        model = dense_model(name, dtype)
        found |= {dtype: whole(model, ids), f"{dtype}, token by token": token_by_token(model, ids)}
    return {
        "topic": "parity",
        "case": {"family": name, "architecture": type(make(name)[0]).__name__, "tokens": TOKENS},
        "largest logit": float(np.abs(expected).max()),
        "differences": {case: float(np.abs(logits - expected).max()) for case, logits in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    writer = Writer(parser.parse_args().out)
    writer.write(environment(transformers=importlib.metadata.version("transformers")))
    shown = (
        "float32",
        "float32, token by token",
        "bfloat16",
        "bfloat16, token by token",
        "transformers bfloat16",
    )
    print(f"| family | largest logit | {' | '.join(shown)} |\n|---{'|---:' * (len(shown) + 1)}|")
    for name in CASES:
        row = measure(name)
        writer.write(row)
        differences = (f"{row['differences'][case]:.1e}" for case in shown)
        print(f"| {name} | {row['largest logit']:.1f} | {' | '.join(differences)} |", flush=True)


if __name__ == "__main__":
    main()
