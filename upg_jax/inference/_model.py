"""`UPGModel`: a language model as a pytree that loads, runs and answers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from upg_jax._sharded import check_mesh
from upg_jax.inference._answer import Generation, StreamedToken
from upg_jax.inference._generate import generate, stream
from upg_jax.inference._load import eos_token_ids, open_model
from upg_jax.inference._settings import GenerationSettings
from upg_jax.inference._sizes import index_bytes, is_compressed, num_weights, weights_of
from upg_jax.inference._steps import cache_capacity, run_forward
from upg_jax.inference._tokenizer import Tokenizer
from upg_jax.models import (
    DecoderConfig,
    KVCache,
    Params,
    decoded_rows,
    init_cache,
    is_stacked,
    load,
    on_own_mesh,
    pack_params,
    parse_config,
    placement,
    shard_params,
    sharded_cache,
)

Prompt: TypeAlias = str | Sequence[int] | np.ndarray
"""A text, or its token ids."""

_DTYPES = ("float32", "bfloat16")
_PACK_BYTES = 10**9


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class UPGModel:
    """A decoder-only language model on compressed or dense layers.

    A pytree: its parameters are leaves, so that a model can be passed to jitted functions, differentiated (see
    `upg_jax.partition`) and moved between devices as one value; configuration and tokenizer are static.

    Attributes:
        params: the decoder's parameters, see `upg_jax.models.Params`.
        config: the decoder's configuration.
        tokenizer: None for a model without one; prompts are token ids then.
        eos_token_ids: tokens that end an answer.
        name: what to call it, e.g. the path it was read from.
    """

    params: Params
    config: DecoderConfig
    tokenizer: Tokenizer | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = "model"

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        dtype: Any | None = None,
        *,
        pack: bool | None = None,
        mesh: Mesh | None = None,
        axis: str = "model",
    ) -> UPGModel:
        """Opens a model.

        A UPG model's compressed planes are packed while loading (copied, in the form that decodes fastest here) if
        they are small, and else used in place as they lie in the file, where the device allows it; `index_bytes`
        says what they are now. On an NVIDIA GPU an embedding and a head of int8 rows become arrays of `dtype`. A
        Hugging Face directory or a GGUF file gives a model of dense layers: the baseline.

        Args:
            path: a UPG file or directory (what `upg-jax compress` makes), a Hugging Face directory or a GGUF file.
            dtype: of the activations and of dense weights, `"float32"` (the default) or `"bfloat16"`.
            pack: pack, or use as it lies, whatever the size. By default up to a gigabyte of planes is packed.
            mesh: devices to share the model among (docs/sharding.md). Each block of a matrix goes from the file to its
                device; all projections must be compressed.
            axis: name of the mesh axis that heads and inner features are cut over. Along the others the model is
                replicated, and a batch is shared out where it divides.

        Raises:
            CheckpointError: for an architecture or a setting that is not supported, or a tensor that is missing,
                not part of the model, or of a wrong shape; the message names it.
            FormatError: for a UPG file that is broken.
            TypeError: for a mesh that is no `jax.sharding.Mesh`, or an axis that is no name.
            ValueError: for another dtype, an axis that the mesh does not have, or an axis without a mesh.
        """
        dtype = jnp.dtype("float32" if dtype is None else dtype)
        if dtype.name not in _DTYPES:
            raise ValueError(
                f"UPGModel.from_file: dtype must be one of {', '.join(_DTYPES)}; got {dtype.name}"
            )
        if mesh is not None:
            check_mesh("UPGModel.from_file", mesh, axis)
        elif axis != "model":
            raise ValueError(
                f"UPGModel.from_file: axis is for a mesh; got axis {axis!r} and no mesh; pass mesh=, too"
            )
        opened = open_model(path, device=mesh is None)
        config = parse_config(opened.config)
        with contextlib.nullcontext() if mesh is None else _on_the_host():
            params = load(config, opened.source, dtype)
            if jax.default_backend() in ("gpu", "cuda"):
                for name in params.keys() & {"embed_tokens", "lm_head"}:
                    params[name] = decoded_rows(params[name], dtype)
            if sum(index_bytes(params).values()) <= _PACK_BYTES if pack is None else pack:
                params = pack_params(params)
        return cls(
            params=params if mesh is None else shard_params(params, config, mesh, axis),
            config=config,
            tokenizer=opened.tokenizer,
            eos_token_ids=eos_token_ids(opened),
            name=os.fspath(path),
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the activations."""
        return self.params["norm"].dtype

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """Returns an empty cache for `batch` sequences of up to `capacity` tokens each."""
        layers = self.params["layers"]
        where, stacked = placement(layers), is_stacked(layers)
        if where is None:
            return init_cache(self.config, batch, capacity, dtype=self.dtype, stacked=stacked)
        with on_own_mesh(layers):
            return sharded_cache(where, self.config, batch, capacity, dtype=self.dtype, stacked=stacked)

    def forward(self, ids: Any, cache: KVCache | None = None) -> tuple[jax.Array, KVCache]:
        """Computes logits for new tokens. Compiled; nothing is donated, so every argument stays usable.

        Args:
            ids: integers `(batch, tokens)`.
            cache: what the sequences have seen so far; by default nothing, with room for at least 64 more tokens.

        Returns:
            Logits, float32 `(batch, tokens, vocab)`, and the cache with the new tokens.

        Raises:
            ValueError: for ids of a wrong rank or outside the vocabulary, or a cache without room for them. Under
                a trace, where values are not known, ids are clamped and tokens without room are not stored.
        """
        ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"UPGModel.forward: ids must be integers (batch, tokens); got {ids.dtype} {ids.shape}"
            )
        batch, tokens = ids.shape
        if cache is None:
            cache = self.init_cache(batch, cache_capacity(tokens + 64))
        if cache.batch != batch:
            raise ValueError(f"UPGModel.forward: the cache is for {cache.batch} sequences; got {batch}")
        if not isinstance(ids, jax.core.Tracer):
            ids = np.asarray(ids)
            self._check_ids(ids, "UPGModel.forward")
        if not isinstance(cache.lengths, jax.core.Tracer):
            filled = int(np.max(np.asarray(cache.lengths), initial=0))
            if filled + tokens > cache.capacity:
                raise ValueError(
                    f"UPGModel.forward: the cache has room for {cache.capacity} tokens; got {tokens} after "
                    f"{filled}; make a larger one with init_cache"
                )
        with on_own_mesh(self.params["layers"]):
            return run_forward(self.params, self.config, jnp.asarray(ids, jnp.int32), cache)

    @overload
    def generate(self, prompt: Prompt, **settings: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], **settings: Any) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | Sequence[int] | None = None,
        **settings: Any,
    ) -> Generation | list[Generation] | list[list[Generation]]:
        """Continues a prompt, or a batch of prompts of any lengths.

        Each prompt of a batch gets the answer that it gets alone, up to floating-point rounding.

        Args:
            prompt: a text or token ids, or a list of texts or of lists of ids.
            n: answers to each prompt.
            seed: makes random choices reproducible. The answers of a batch count up from it, or have a seed each.
            settings: fields of `GenerationSettings`: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `frequency_penalty`, `presence_penalty`, `logit_bias`, `logprobs`, `stop`,
                `stop_at_eos`.

        Returns:
            An answer, or a list of them for a list of prompts. With `n` above 1, a list of `n` in each answer's place.

        Raises:
            ValueError: for an empty prompt, ids outside the vocabulary, or a setting out of range, naming it.
        """
        single = _is_single(prompt)
        prompts = [self.encode(p) for p in ([prompt] if single else prompt)]  # type: ignore[arg-type]
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
            raise ValueError(f"generate: n must be an integer of at least 1; got {n!r}")
        if not prompts:
            return []
        with on_own_mesh(self.params["layers"]):
            answers = generate(self, prompts, GenerationSettings(**settings), seed, n)
        grouped = [answers[i : i + n] for i in range(0, len(answers), n)] if n > 1 else answers
        return grouped[0] if single else grouped

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[StreamedToken]:
        """Continues one prompt token by token.

        The pieces of text add up to the text that `generate` gives. The last item has the reason for ending.

        Args:
            prompt: a text or token ids.
            settings: fields of `GenerationSettings`, as for `generate`.

        Raises:
            ValueError: as `generate`.
        """
        tokens = stream(self, self.encode(prompt), GenerationSettings(**settings))
        return tokens if placement(self.params["layers"]) is None else _on_own_mesh(tokens, self)

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a text, or the ids that were given, checked against the vocabulary.

        Raises:
            ValueError: for an empty prompt, ids outside the vocabulary, or text without a tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("UPGModel.encode: this model has no tokenizer; give token ids")
            ids = np.asarray(self.tokenizer.encode(prompt), np.int64)
        else:
            ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                "UPGModel.encode: a prompt must be text or a list of token ids, at least one token long; "
                f"got {str(prompt)[:80]!r}"
            )
        self._check_ids(ids, "UPGModel.encode")
        return ids.tolist()

    def _check_ids(self, ids: np.ndarray, operation: str) -> None:
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"{operation}: token ids must be in [0, {self.config.vocab_size}); got {wrong.flat[0]}"
            )

    @property
    def num_weights(self) -> int:
        """Weights of the dense model."""
        return sum(map(num_weights, weights_of(self.params)))

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.nbytes for leaf in weights_of(self.params))

    @property
    def index_bytes(self) -> dict[str, int]:
        """Bytes of compressed matrices by their `index` (docs/format.md), the largest share first."""
        return index_bytes(self.params)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all parameters, dense ones included, per weight of the dense model."""
        return 8 * self.nbytes / max(self.num_weights, 1)

    def __repr__(self) -> str:
        what = f"{self.name}: {self.config.architecture}, {self.config.num_layers} layers"
        try:
            compressed = list(filter(is_compressed, weights_of(self.params)))
            size = f"{self.num_weights:,} weights, {self.bits_per_weight:.2f} bits per weight"
            if compressed:
                share = sum(map(num_weights, compressed))
                bits = 8 * sum(leaf.nbytes for leaf in compressed) / share
                indexes = " and ".join(self.index_bytes)
                size += f" ({bits:.2f} in the {share / self.num_weights:.0%} that are compressed, index {indexes})"
            return f"UPGModel({what}, {size}, {self.nbytes / 2**20:.1f} MiB, {self.dtype} activations)"
        except (AttributeError, TypeError):
            # JAX builds pytrees with leaves of any kind.
            return f"UPGModel({what})"


jax.tree_util.register_dataclass(
    UPGModel, data_fields=["params"], meta_fields=["config", "tokenizer", "eos_token_ids", "name"]
)


def _is_single(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, (np.ndarray, jax.Array)):
        return prompt.ndim == 1
    return len(prompt) > 0 and all(isinstance(token, (int, np.integer)) for token in prompt)


def _on_own_mesh(tokens: Iterator[StreamedToken], model: UPGModel) -> Iterator[StreamedToken]:
    """The caller has its own mesh between tokens."""
    while True:
        with on_own_mesh(model.params["layers"]):
            token = next(tokens, None)
        if token is None:
            return
        yield token


def _on_the_host() -> contextlib.AbstractContextManager[Any]:
    """Keeps what is made in a `with` block off the accelerators, if JAX may use the processor beside them."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()
