"""The two networks of a distillation, in the form that one compiled step runs fastest."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upg_jax._errors import CheckpointError
from upg_jax._mdcsr import MdCSR
from upg_jax._trainable import TrainableMdCSR
from upg_jax.inference import UPGModel
from upg_jax.models import DecoderConfig, Params, embed, head, run_layers, weights
from upg_jax.train._frozen import Frozen


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A network without trained leaves.

    Attributes:
        params: the decoder's parameters, layers stacked, matrices as `Frozen`.
        config: the decoder's.
    """

    params: Params
    config: DecoderConfig

    @classmethod
    def from_model(cls, model: UPGModel, *, precision: str = "float32") -> Teacher:
        """Takes a model of any kind; products of its dense layers are of the given precision.

        Args:
            model: the model; its compressed layers, if any, are decoded.
            precision: `"float32"` or `"bfloat16"`.
        """
        return cls(_stacked(model, precision, trainable=False), model.config)

    def logits(self, ids: jax.Array) -> jax.Array:
        """Logits, float32 `(batch, tokens, vocab)`, of integers `(batch, tokens)`."""
        return self.head(self.hidden(ids))

    def hidden(self, ids: jax.Array) -> jax.Array:
        """What the last layer leaves, `(batch, tokens, hidden)`, of integers `(batch, tokens)`."""
        return _run(self.params["layers"], self.config, embed(self.params, self.config, ids))

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32 `(..., vocab)`, of what the last layer leaves."""
        return head(self.params, self.config, hidden)


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A compressed network whose stored weights, norms and biases are trained; embedding and head stay as they are.

    A pytree whose leaves that are trained are exactly those that `trained` returns.

    Attributes:
        params: the decoder's parameters, layers stacked, compressed ones as `TrainableMdCSR`.
        config: the decoder's.
    """

    params: Params
    config: DecoderConfig

    @classmethod
    def from_model(cls, model: UPGModel, *, precision: str = "float32") -> Student:
        """Makes a compressed model trainable.

        Args:
            model: opened with `pack=False`, so that projections are as they were compressed.
            precision: of products, `"float32"` or `"bfloat16"`; weights are float32.

        Raises:
            CheckpointError: if no projection is compressed, or some were joined by packing.
        """
        student = cls(_stacked(model, precision, trainable=True), model.config)
        layers = jax.tree.leaves(student.params["layers"], is_leaf=_is_matrix)
        if not any(map(_is_trainable, layers)):
            raise CheckpointError(
                f"{model.name}: no projection is compressed, so there is nothing to recover"
            )
        return student

    def logits(self, ids: jax.Array) -> jax.Array:
        """Logits, float32 `(batch, tokens, vocab)`, of integers `(batch, tokens)`; differentiable."""
        return self.head(self.hidden(ids), self.params["norm"])

    def hidden(self, ids: jax.Array) -> jax.Array:
        """What the last layer leaves, `(batch, tokens, hidden)`, of integers `(batch, tokens)`; differentiable."""
        return _run(self.params["layers"], self.config, embed(self.params, self.config, ids))

    def head(self, hidden: jax.Array, norm: jax.Array) -> jax.Array:
        """Logits, float32 `(..., vocab)`, of what the last layer leaves; `norm` is the last norm's weight."""
        return head({**self.params, "norm": norm}, self.config, hidden)

    def trained(self) -> dict[str, Any]:
        """The leaves to train: a tree for `jax.grad` and optax."""
        found: dict[str, Any] = {}
        for slot, value in self.params["layers"].items():
            if _is_trainable(value):
                found[slot] = value.weights
            elif isinstance(value, tuple) and any(map(_is_trainable, value)):
                found[slot] = tuple(layer.weights if _is_trainable(layer) else None for layer in value)
            elif _is_vectors(value):
                found[slot] = value
        return {"layers": found, "norm": self.params["norm"]}

    def with_trained(self, trained: dict[str, Any]) -> Student:
        """The student with other values for the leaves that `trained` returned."""

        def put(old: Any, new: Any) -> Any:
            if isinstance(old, TrainableMdCSR):
                return dataclasses.replace(old, weights=new)
            if isinstance(old, tuple):
                return tuple(a if b is None else put(a, b) for a, b in zip(old, new, strict=True))
            return new

        layers = self.params["layers"]
        changed = {slot: put(layers[slot], new) for slot, new in trained["layers"].items()}
        params = {**self.params, "layers": layers | changed, "norm": trained["norm"]}
        return dataclasses.replace(self, params=params)

    def without_trained(self) -> Student:
        """The student without the leaves that are trained, for functions that take them as another argument."""

        def erase(leaf: Any) -> Any:
            return dataclasses.replace(leaf, weights=None) if _is_trainable(leaf) else leaf

        layers = {
            slot: None if _is_vectors(value) else jax.tree.map(erase, value, is_leaf=_is_matrix)
            for slot, value in self.params["layers"].items()
        }
        return dataclasses.replace(self, params={**self.params, "layers": layers, "norm": None})

    def tensors(self) -> dict[str, MdCSR | jax.Array]:
        """Everything that is trained under the checkpoint's names, weights encoded again as they were."""
        found: dict[str, MdCSR | jax.Array] = {}
        for weight in weights(self.config):
            if weight.slot == "norm":
                found[weight.name] = self.params["norm"]
            value = self.params["layers"].get(weight.slot) if weight.per_layer else None
            if value is None:
                continue
            vectors = _is_vectors(value)
            value = value if isinstance(value, tuple) else _on_the_host(value)
            for i, name in enumerate(weight.names(self.config.num_layers)):
                one = value[i] if isinstance(value, tuple) else jax.tree.map(lambda a, i=i: a[i], value)
                if isinstance(one, TrainableMdCSR):
                    found[name] = _encodable(one).to_mdcsr()
                elif vectors:
                    found[name] = jnp.asarray(one)
        return found


for _network in (Teacher, Student):
    jax.tree_util.register_dataclass(_network, data_fields=["params"], meta_fields=["config"])


_rounded = jax.jit(TrainableMdCSR.rounded)


def _encodable(leaf: Any) -> Any:
    """Rounds weights of fewer than 8 bits, which would lose much if they were rounded after training alone."""
    return _rounded(leaf) if _is_trainable(leaf) and leaf.value_bits < 8 else leaf


def _is_trainable(leaf: Any) -> bool:
    return isinstance(leaf, TrainableMdCSR)


def _is_matrix(leaf: Any) -> bool:
    return isinstance(leaf, TrainableMdCSR | Frozen)


def _is_vectors(value: Any) -> bool:
    """Norms or biases of all layers; a router has one more axis, and is not trained."""
    return isinstance(value, jax.Array) and value.ndim == 2


def _run(layers: dict[str, Any], config: DecoderConfig, x: jax.Array) -> jax.Array:
    """The layers in one loop, whose gradient is stacked as they are; unrolled where they differ."""
    if any(isinstance(value, tuple) for value in layers.values()) or not _alike(config):
        return run_layers(jax.tree.map(_encodable, layers, is_leaf=_is_matrix), config, x)[0]

    def body(x: jax.Array, layer: dict[str, Any]) -> tuple[jax.Array, None]:
        one = {
            slot: (_encodable(value),) if _is_matrix(value) else value[None] for slot, value in layer.items()
        }
        return run_layers(one, config.only(0), x)[0], None

    return jax.lax.scan(jax.checkpoint(body, policy=_kept, prevent_cse=False), x, layers)[0]


def _kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """Products are kept for the way back. Everything else would be five times their size, and is quickly made again."""
    return primitive.name in ("pattern_product", "custom_vjp_call")


def _alike(config: DecoderConfig) -> bool:
    return len(set(config.layers)) == 1 and not config.experts


def _stacked(model: UPGModel, precision: str, *, trainable: bool) -> Params:
    params = model.params
    slots = {weight.slot for weight in weights(model.config)}
    joined = [slot for slot in params["layers"] if slot not in slots]
    if joined:
        raise CheckpointError(
            f"{model.name}: projections were joined ({joined[0]}); open the model with pack=False"
        )

    def frozen(weight: Any) -> Frozen:
        dense = weight.to_dense(jnp.float32) if isinstance(weight, MdCSR) else weight
        return Frozen(jnp.asarray(dense, precision))

    def matrices(value: Any) -> tuple[Any, ...]:
        if isinstance(value, MdCSR):
            value = _on_the_host(value)
            value = [jax.tree.map(lambda a, i=i: a[i], value) for i in range(value.values.shape[0])]
        return tuple(
            TrainableMdCSR.from_layer(weight, precision=precision)
            if trainable and isinstance(weight, MdCSR)
            else frozen(weight)
            for weight in value
        )

    found = {slot: matrices(v) for slot, v in params["layers"].items() if isinstance(v, tuple | MdCSR)}
    if _alike(model.config) and all(len(set(map(jax.tree.structure, each))) == 1 for each in found.values()):
        found = _stack_each(found)
    others = {slot: jnp.asarray(v, jnp.float32) for slot, v in params["layers"].items() if slot not in found}
    return {
        "embed_tokens": params["embed_tokens"],
        "norm": jnp.asarray(params["norm"], jnp.float32),
        "lm_head": frozen(params.get("lm_head", params["embed_tokens"])),
        "layers": found | others,
    }


@jax.jit
def _stack_each(found: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {slot: _stack(layers) for slot, layers in found.items()}


def _stack(layers: tuple[Any, ...]) -> Any:
    if _is_trainable(layers[0]):
        return TrainableMdCSR.stack(layers)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _on_the_host(tree: Any) -> Any:
    """With NumPy arrays, whose slices are no programs."""
    return jax.tree.map(np.asarray, tree)
