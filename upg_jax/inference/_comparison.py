"""How far a compressed model is from the dense one: in its predictions, and in its weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._mdcsr import MdCSR
from upg_jax.inference._load import open_model
from upg_jax.inference._model import UPGModel
from upg_jax.models import DecoderConfig, Params, forward


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model's next-token predictions against another's, on the same contexts.

    Attributes:
        kl: mean `KL(other || model)`, in nats.
        agreement: share of the predictions whose most likely tokens are the same.
        tokens: how many predictions were compared.
        window: tokens of a window, at most; windows do not overlap.
    """

    kl: float
    agreement: float
    tokens: int
    window: int


def compare(
    model: UPGModel,
    other: UPGModel,
    text: str | Sequence[int] | np.ndarray,
    *,
    window: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compares the predictions of two models after every token of a text, the last token of a window apart.

    Args:
        model: the model that is judged.
        other: what it is judged by, such as the dense original.
        text: a text, or token ids.
        window: tokens of a window, at least 2.
        progress: called after each window with how many are done and how many there are.

    Raises:
        ValueError: for models of different vocabularies, a text of fewer than two tokens, or a window out of range.
    """
    if window < 2:
        raise ValueError(f"compare: window must be at least 2; got {window}")
    if model.config.vocab_size != other.config.vocab_size:
        raise ValueError(
            f"compare: both models must have one vocabulary; got {model.config.vocab_size} and "
            f"{other.config.vocab_size} tokens"
        )
    ids = model.encode(text)
    starts = range(0, len(ids) - 1, window)
    if not starts:
        raise ValueError(f"compare: the text must have at least two tokens; got {len(ids)}")
    kl, same, count = 0.0, 0, 0
    for done, start in enumerate(starts, 1):
        part = np.asarray(ids[start : start + window], np.int32)
        padded = np.zeros((1, window), np.int32)
        padded[0, : part.size] = part
        found = _compare_window(
            (model.params, other.params), (model.config, other.config), padded, np.int32(part.size)
        )
        kl, same, count = kl + float(found[0]), same + int(found[1]), count + part.size - 1
        if progress is not None:
            progress(done, len(starts))
    return Comparison(kl=kl / count, agreement=same / count, tokens=count, window=window)


@partial(jax.jit, static_argnames="configs")
def _compare_window(
    params: tuple[Params, Params],
    configs: tuple[DecoderConfig, DecoderConfig],
    ids: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    logits, others = (forward(p, config, ids)[0][0, :-1] for p, config in zip(params, configs, strict=True))
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    counted = jnp.arange(1, ids.shape[1]) < length
    kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(others, axis=-1)
    return jnp.sum(jnp.where(counted, kl, 0.0)), jnp.sum(counted & same)


@dataclasses.dataclass(frozen=True)
class WeightError:
    """How far one matrix is from its original.

    Attributes:
        name: of the tensor.
        relative: Frobenius norm of the difference over that of the original.
        largest: the largest absolute difference of a weight.
        density: nonzero weights over all weights.
    """

    name: str
    relative: float
    largest: float
    density: float


def weight_errors(model: str | os.PathLike[str], dense: str | os.PathLike[str]) -> Iterator[WeightError]:
    """Compares every compressed matrix of a model's files with the dense one of that name, one at a time.

    Raises:
        CheckpointError: for files that are no models.
        ValueError: for a matrix that the dense model does not have in that shape.
    """
    compressed, original = open_model(model).source, open_model(dense).source
    known = set(original.names())
    for name in compressed.names():
        layer = compressed.read(name)
        if not isinstance(layer, MdCSR):
            continue
        if name not in known or tuple(original.shape(name)) != layer.shape:
            raise ValueError(f"weight_errors: {dense} has no matrix {name!r} of shape {layer.shape}")
        source = original.read(name)
        wanted = source.to_dense(jnp.float32) if isinstance(source, MdCSR) else source
        w, wanted = np.asarray(layer.to_dense(jnp.float32)), np.asarray(wanted).astype(np.float32)
        difference = w - wanted
        norm = float(np.linalg.norm(wanted))
        yield WeightError(
            name=name,
            relative=float(np.linalg.norm(difference)) / norm if norm else float(np.any(difference)),
            largest=float(np.abs(difference).max(initial=0.0)),
            density=np.count_nonzero(w) / max(w.size, 1),
        )
