"""Shares a model's density out among its matrices, by what pruning each of them costs.

One pass over the weights, block by block: besides the states of the calibration tokens, each block gets the states
that come of pruning one of the earlier blocks, and adds those that come of pruning it. How far the predictions at the
end are from the dense model's is what pruning that block costs. In the same pass run the states of models in which
every matrix of one kind is pruned, such as every `down_proj`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._errors import EncodingError
from upg_jax._precision import best_precision
from upg_jax.compress._activations import Block, blocks, run_block
from upg_jax.compress._calibrated import check_tokens
from upg_jax.compress._calibration import Calibration
from upg_jax.compress._plan import linears, plan
from upg_jax.compress._progress import Meter, Progress
from upg_jax.compress._prune import prune_mask
from upg_jax.compress._selection import Pattern
from upg_jax.compress._settings import Rule, Settings
from upg_jax.io import Checkpoint, open_checkpoint
from upg_jax.models import DecoderConfig, Weight, embed, head, weights

# Memory for states is that of these tokens times the number of blocks and of twice the kinds. Predictions are compared
# at every second position: they cost as much as the blocks, and costs are some percent exact in any case.
_WINDOWS, _WINDOW, _EVERY = 4, 128, 2
# From the first density that kinds are measured at to the second.
_STEP = 0.2
# How far above the average a matrix may get, and what share of it it keeps.
_ABOVE, _LEAST = 0.35, 0.5
# Costs below are noise; a cost that hardly falls, or falls to nothing, was measured badly.
_NOTHING, _FALLS = 1e-9, (1.0, 30.0)


def allocate(
    source: str | Path | Checkpoint,
    settings: Settings,
    calibration: Calibration,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> Settings:
    """Gives each matrix a density of its own, at the same total.

    The divergence from the dense model's predictions is measured when one block is pruned, and when all matrices of one
    kind are, at two densities (Wanda's choice of weights; all others as they are). A block's cost is taken to be that
    of its matrices in proportion to their kinds', to fall exponentially with density, and to add up. The densities
    make that sum least: one more weight gains the same everywhere, between half the average density and 0.35 above it.

    Args:
        source: a Hugging Face directory, a GGUF file, or an opened checkpoint.
        settings: how it is to be compressed. What its rules say stays as it is.
        calibration: tokens to run the model over; the first 128 of each of four windows are used.
        progress: called often, with bytes of weights (each as often as it is multiplied by), rate and time left.

    Returns:
        `settings` with a rule for each matrix that had none, to read, to keep and to give to `compress_checkpoint`.

    Raises:
        CheckpointError: for a source that cannot be read.
        EncodingError: for a pattern N:M, which fixes all densities, a density of 0 or 1, which leaves nothing to
            share out, tokens outside the vocabulary, or weights that are not finite.
    """
    if not 0.0 < settings.density < 1.0:
        raise EncodingError(f"allocate: density must be above 0 and below 1; got {settings.density}")
    if Pattern.parse(settings.counted).keep is not None:
        raise EncodingError(
            f"allocate: pattern {settings.counted} fixes the density of every matrix; leave out one of the two"
        )
    checkpoint = open_checkpoint(source) if isinstance(source, str | Path) else source
    found = shares(measure(checkpoint, settings, calibration, progress), settings.density)
    rules = tuple(Rule(f"^{re.escape(name)}$", round(d, 4)) for name, d in found.items())
    return dataclasses.replace(settings, rules=settings.rules + rules)


class Costs(NamedTuple):
    """Divergences from the dense model, in nats a token.

    Attributes:
        densities: the two that were measured.
        blocks: with this block alone pruned, to the first density.
        kinds: with all matrices of this kind pruned, to the first density and to the second.
        places: block and kind of each matrix by name.
        sizes: weights of each.
    """

    densities: tuple[float, float]
    blocks: list[float]
    kinds: dict[str, tuple[float, float]]
    places: dict[str, tuple[int, str]]
    sizes: dict[str, int]


def shares(costs: Costs, density: float) -> dict[str, float]:
    """The densities at which one more weight gains the same in every matrix, by name.

    Args:
        costs: what was measured.
        density: of all matrices together.
    """
    if not costs.places:
        return {}
    low, high = costs.densities
    names = list(costs.places)
    size = np.array([costs.sizes[name] for name in names], np.float64)
    of_block = np.maximum([costs.blocks[costs.places[name][0]] for name in names], _NOTHING)
    of_kind = np.maximum([costs.kinds[costs.places[name][1]] for name in names], _NOTHING)
    kinds = [costs.places[name][1] for name in names]
    whole = np.array([size[[kind == other for other in kinds]].sum() for kind in kinds])
    # A block's cost is that of its matrices together, which rules may have left it only some of.
    in_block, parts = [costs.places[name][0] for name in names], of_kind[:, 0] * size / whole
    together = np.bincount(in_block, parts)[in_block]
    falls = np.clip(np.log(of_kind[:, 0] / of_kind[:, 1]) / (high - low), *_FALLS)
    # The logarithm of what a weight's worth of density gains at density 0.
    gains = np.log(of_block / together * of_kind[:, 0] / whole * falls) + falls * low
    least, most = density * _LEAST, min(1.0, density + _ABOVE)

    def at(gain: float) -> np.ndarray:
        return np.clip((gains - gain) / falls, least, most)

    lower, upper = (gains - falls).min(), gains.max()  # where every density is 1, and 0, but for its limits
    for _ in range(100):
        gain = (lower + upper) / 2
        if at(gain) @ size > density * size.sum():
            lower = gain
        else:
            upper = gain
    return dict(zip(names, at(upper).tolist(), strict=True))


def measure(
    checkpoint: Checkpoint,
    settings: Settings,
    calibration: Calibration,
    progress: Callable[[Progress], None] | None = None,
) -> Costs:
    """Measures what pruning costs; arguments as of `allocate`."""
    planned = plan(checkpoint, settings, calibration)
    config = check_tokens(checkpoint, planned, calibration)
    sizes = {
        tensor.name: tensor.num_weights
        for tensor in linears(planned.tensors)
        if not any(rule.finds(tensor.name) for rule in settings.rules)
    }
    densities = (settings.density, settings.density + min(_STEP, (1 - settings.density) / 2))
    if not sizes:
        return Costs(densities, [0.0] * config.num_layers, {}, {}, {})
    count = min(len(calibration.ids), _WINDOWS)
    ids = calibration.ids[np.arange(count) * len(calibration.ids) // count, :_WINDOW]
    precision = best_precision()
    tensors = weights(config)
    of_blocks: dict[int, jax.Array] = {}
    of_kinds: dict[tuple[str, float], jax.Array] = {}
    places = _places(config, tensors, sizes)
    meter = Meter("measure", _work(config, tensors, places), progress)
    names = {w.slot: w.name for w in tensors if not w.per_layer}

    def outer(*slots: str) -> dict[str, jax.Array]:
        return {slot: jnp.asarray(checkpoint.read(names[slot]), jnp.float32) for slot in slots}

    def run(block: Block, number: int, matrices: dict[str, jax.Array], x: jax.Array) -> Any:
        found = jax.block_until_ready(run_block(block.others, matrices, x, config=block.config))
        meter.add(_block_bytes(tensors), f"block {number}")
        return found

    states = embed(outer("embed_tokens", "norm"), config, jnp.asarray(ids))
    for number, block in enumerate(blocks(config, tensors, checkpoint.read)):
        dense = {key: jnp.asarray(checkpoint.read(name), precision) for key, name in block.names.items()}
        free = {key: places[name][1] for key, name in block.names.items() if name in places}
        after, squares = run(block, number, dense, states)
        pruned: dict[float, dict[str, jax.Array]] = {d: {} for d in densities}
        for key in free:
            w, norms = np.asarray(dense[key], np.float32), jnp.sqrt(squares[key])
            for d in densities:
                pruned[d][key] = jnp.where(prune_mask(w, d, "wanda", norms=norms), dense[key], 0)
        for kind in dict.fromkeys(free.values()):
            for d in densities:
                of_kinds.setdefault((kind, d), states)
        for at, x in of_blocks.items():
            of_blocks[at] = run(block, number, dense, x)[0]
        if free:
            of_blocks[number] = run(block, number, dense | pruned[densities[0]], states)[0]
        for (kind, d), x in of_kinds.items():
            chosen = {key: pruned[d][key] for key in free if free[key] == kind}
            of_kinds[kind, d] = run(block, number, dense | chosen, x)[0]
        states = after
    last = outer("norm", "lm_head" if "lm_head" in names else "embed_tokens")
    expected = _log_probabilities(last, states, config=config)
    meter.add(_head_bytes(config), "head")

    def cost(x: jax.Array) -> float:
        found = float(_divergence(last, expected, x, config=config))
        meter.add(_head_bytes(config), "head")
        if not math.isfinite(found):
            raise EncodingError(
                f"allocate: what pruning costs must be a finite number; got {found}; the checkpoint may have weights "
                "that are infinite or no numbers"
            )
        return found

    at_blocks = dict.fromkeys(range(config.num_layers), 0.0) | {at: cost(x) for at, x in of_blocks.items()}
    low, high = densities
    kinds = {
        kind: (cost(of_kinds[kind, low]), cost(of_kinds[kind, high])) for kind, d in of_kinds if d == low
    }
    return Costs(densities, list(at_blocks.values()), kinds, places, sizes)


def _places(
    config: DecoderConfig, tensors: Sequence[Weight], names: Container[str]
) -> dict[str, tuple[int, str]]:
    """Block and kind of the matrices with these names."""
    return {
        name: (layer, weight.slot)
        for layer in range(config.num_layers)
        for weight in tensors
        if weight.per_layer
        for name in weight.names_in(layer)
        if name in names
    }


def _work(config: DecoderConfig, tensors: Sequence[Weight], places: Mapping[str, tuple[int, str]]) -> int:
    """Bytes of weights, each as often as it is multiplied by: later blocks take more states, and so more time."""
    begins = sorted({block for block, _ in places.values()})
    for kind in {kind for _, kind in places.values()}:
        begins += [min(block for block, other in places.values() if other == kind)] * 2
    runs = sum(config.num_layers - begin for begin in begins) + config.num_layers
    return runs * _block_bytes(tensors) + (1 + len(begins)) * _head_bytes(config)


def _block_bytes(tensors: Sequence[Weight]) -> int:
    return sum(4 * math.prod(w.shape) * max(w.experts, 1) for w in tensors if w.per_layer and w.linear)


def _head_bytes(config: DecoderConfig) -> int:
    return 4 * config.vocab_size * config.hidden_size // _EVERY


@partial(jax.jit, static_argnames="config")
def _log_probabilities(top: dict[str, Any], x: jax.Array, *, config: DecoderConfig) -> jax.Array:
    return jax.nn.log_softmax(head(top, config, x[:, ::_EVERY]))


@partial(jax.jit, static_argnames="config")
def _divergence(
    top: dict[str, Any], expected: jax.Array, x: jax.Array, *, config: DecoderConfig
) -> jax.Array:
    """The mean over tokens of the divergence from `expected`, log-probabilities, of what the last block leaves."""
    found = _log_probabilities(top, x, config=config)
    return jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1))
