"""Tensor parallelism: which features of each projection a device has, and the decoder's layers run on all devices.

Shoeybi et al., "Megatron-LM" (2019): devices have whole heads and a part of the MLP's inner features, so that rows of
q, k, v, gate and up are cut, and columns of o and down. All layers run inside one `jax.shard_map`, where a device's
code is that of a single one with fewer heads; the only communication is the sum of what o and down give.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from upg_jax._compat import other_mesh_is_set, require_shard_map
from upg_jax._cut import PADDING, Cut, even_cut, sources
from upg_jax._errors import CheckpointError
from upg_jax._mdcsr import MdCSR
from upg_jax._sharded import Dim, ShardedMdCSR, check_mesh, shard, shard_as
from upg_jax.models._cache import KVCache, init_cache
from upg_jax.models._config import DecoderConfig
from upg_jax.models._linear import joined
from upg_jax.models._names import ATTENTION_INPUTS, EXPERT_INPUTS, EXPERT_OUTPUT, MLP_INPUTS

Placement: TypeAlias = tuple[Mesh, str]
"""The mesh, and its axis that the projections are cut over; sequences may be shared out over the others."""


def placement(layers: Any) -> Placement | None:
    """Where a decoder's `layers` parameters are; None if they are not sharded."""
    return next(((leaf.mesh, leaf.axis) for leaf in _leaves(layers) if _is_sharded(leaf)), None)


def shard_params(params: Mapping[str, Any], config: DecoderConfig, mesh: Mesh, axis: str) -> dict[str, Any]:
    """Places a decoder's parameters on the devices of a mesh, the projections of its layers cut over one axis.

    A device has whole KV heads with their queries; where there are fewer KV heads than devices, several have the same
    one and share its queries. What does not divide is padded. A head of its own is cut by vocabulary. The embedding,
    whose rows are looked up, a head tied to it, norms and routers are on every device.

    Args:
        params: the decoder's, best on the host; all projections compressed.
        config: the decoder's.
        mesh: the devices.
        axis: name of the mesh axis.

    Raises:
        TypeError: for a mesh that is no `jax.sharding.Mesh`, or an axis that is no name.
        ValueError: if the mesh has no such axis.
        CheckpointError: for a projection that is dense, naming it.
        NotImplementedError: with a JAX too old for `jax.shard_map`.
    """
    require_shard_map("UPGModel: a mesh")
    check_mesh("UPGModel", mesh, axis)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(jax.sharding.AxisType.Auto,) * mesh.devices.ndim)
    cut_of = cuts(config, mesh.shape[axis])

    def put(array: Any, *spec: Any) -> jax.Array:
        return jax.device_put(np.asarray(array), NamedSharding(mesh, P(*spec)))

    def projection(slot: str, weights: Any) -> Any:
        dim, cut = cut_of[slot]
        if isinstance(weights, tuple):
            return tuple(projection(slot, weight) for weight in weights)
        if not isinstance(weights, MdCSR):
            raise CheckpointError(
                f"UPGModel: only compressed projections can be sharded over a mesh; {slot!r} is dense; compress it, or "
                "load the model without mesh"
            )
        return shard_as(weights, mesh, axis, dim, cut)

    def of_layers(slot: str, value: Any) -> Any:
        if slot in cut_of:
            return projection(slot, value)
        dim, cut = cut_of.get(slot.removesuffix(".bias"), ("in", ()))
        if dim == "in":
            return put(value)
        # A zero behind the biases, where `PADDING` points.
        return put(np.pad(value, ((0, 0), (0, 1)))[:, sources(cut)], None, axis)

    def outer(slot: str, value: Any) -> Any:
        if slot == "lm_head" and isinstance(value, MdCSR):
            return shard(value, mesh, axis)
        if slot == "lm_head" and value.shape[0] % mesh.shape[axis] == 0:
            return put(value, axis)
        return jax.tree.map(put, value)

    layers = {slot: of_layers(slot, value) for slot, value in params["layers"].items()}
    return {slot: layers if slot == "layers" else outer(slot, value) for slot, value in params.items()}


def cuts(config: DecoderConfig, devices: int) -> dict[str, tuple[Dim, Cut]]:
    """How each projection of a decoder's layers is cut."""
    parts, units = _units(config, devices)
    queries = config.num_heads // config.num_kv_heads // parts * config.head_dim
    count = config.num_kv_heads * parts
    of_device = [range(i * units, (i + 1) * units) for i in range(devices)]

    def heads(features: int, first: Callable[[int], int]) -> Cut:
        return tuple(
            tuple((first(u) if u < count else PADDING, features) for u in mine) for mine in of_device
        )

    q = heads(queries, lambda unit: unit * queries)
    kv = heads(config.head_dim, lambda unit: unit // parts * config.head_dim)
    inner = even_cut(config.intermediate_size, devices)
    rows = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads)]
    found: dict[str, tuple[Dim, Cut]] = {
        "o_proj": ("in", q),
        "down_proj": ("in", inner),
        EXPERT_OUTPUT: ("in", inner),
        joined(ATTENTION_INPUTS): ("out", _part_by_part([q, kv, kv], [rows[0], rows[1], rows[1]])),
    }
    found |= {name: ("out", cut) for name, cut in zip(ATTENTION_INPUTS, (q, kv, kv), strict=True)}
    for names in (MLP_INPUTS, EXPERT_INPUTS):
        found |= dict.fromkeys(names, ("out", inner))
        found[joined(names)] = ("out", _part_by_part([inner] * 2, [config.intermediate_size] * 2))
    return found


def _units(config: DecoderConfig, devices: int) -> tuple[int, int]:
    """Into how many parts the queries of a KV head are cut, and how many parts, with a KV head each, a device has."""
    group = config.num_heads // config.num_kv_heads
    parts = next(
        n
        for n in range(1, group + 1)
        if group % n == 0 and (n == group or n * config.num_kv_heads >= devices)
    )
    return parts, -(-config.num_kv_heads * parts // devices)


def _part_by_part(parts: Sequence[Cut], rows: Sequence[int]) -> Cut:
    """The cut of a matrix with the rows of several, such that each block has its rows of all."""
    starts = np.cumsum([0, *rows[:-1]]).tolist()
    shifted = [
        [tuple((first if first == PADDING else first + start, n) for first, n in runs) for runs in cut]
        for cut, start in zip(parts, starts, strict=True)
    ]
    return tuple(tuple(run for runs in block for run in runs) for block in zip(*shifted, strict=True))


def local_config(config: DecoderConfig, devices: int) -> DecoderConfig:
    """The configuration of what one device computes."""
    parts, units = _units(config, devices)
    return dataclasses.replace(
        config,
        num_heads=units * (config.num_heads // config.num_kv_heads // parts),
        num_kv_heads=units,
        intermediate_size=-(-config.intermediate_size // devices),
    )


def sharded_cache(
    where: Placement, config: DecoderConfig, batch: int, capacity: int, *, dtype: Any, stacked: bool
) -> KVCache:
    """An empty cache for a decoder that is sharded; each device has that of its heads."""
    mesh, axis = where
    local = local_config(config, mesh.shape[axis])
    heads = dataclasses.replace(
        config,
        num_kv_heads=local.num_kv_heads * mesh.shape[axis],
        num_heads=local.num_heads * mesh.shape[axis],
    )
    rows, buffers = (NamedSharding(mesh, spec) for spec in _cache_specs(where, batch))
    return init_cache(heads, batch, capacity, dtype=dtype, stacked=stacked, rows=rows, buffers=buffers)


def _cache_specs(where: Placement, batch: int) -> tuple[P, P]:
    """Of what has a row for each sequence, and of a cache's buffers; sequences are shared out where they divide."""
    mesh, axis = where
    others = tuple(name for name in mesh.axis_names if name != axis)
    size = mesh.devices.size // mesh.shape[axis]
    rows = others if size > 1 and batch % size == 0 else None
    return P(rows), P(None, rows, axis)


def run_on_devices(
    run: Callable[..., tuple[jax.Array, KVCache | None]],
    where: Placement,
    layers: Mapping[str, Any],
    config: DecoderConfig,
    x: jax.Array,
    cache: KVCache | None,
    counts: jax.Array,
) -> tuple[jax.Array, KVCache | None]:
    """`run(layers, config, x, cache, counts)` on every device, with its blocks and the cache of its heads."""
    mesh, axis = where
    rows, buffers = _cache_specs(where, x.shape[0])
    of_cache: Any = None
    if cache is not None:
        specs: dict[str, Any] = {"keys": (buffers,) * len(cache.keys), "lengths": rows}
        of_cache = dataclasses.replace(cache, values=specs["keys"], **specs)
    return jax.shard_map(
        lambda layers, x, cache, counts: run(
            layers, local_config(config, mesh.shape[axis]), x, cache, counts
        ),
        mesh=mesh,
        in_specs=({slot: _specs(slot, layers, axis) for slot in layers}, rows, of_cache, rows),
        out_specs=(rows, of_cache),
    )(layers, x, cache, counts)


def _specs(slot: str, layers: Mapping[str, Any], axis: str) -> Any:
    if slot.endswith(".bias"):
        first, *_ = _leaves(layers[slot.removesuffix(".bias")])
        return P(None, axis) if first.dim == "out" else P()
    return jax.tree.map(
        lambda leaf: leaf.specs if _is_sharded(leaf) else P(), layers[slot], is_leaf=_is_sharded
    )


def _leaves(layers: Any) -> list[Any]:
    return jax.tree.leaves(layers, is_leaf=_is_sharded)


def _is_sharded(leaf: Any) -> bool:
    return isinstance(leaf, ShardedMdCSR)


def on_own_mesh(layers: Any) -> contextlib.AbstractContextManager[Any]:
    """Takes sharded layers out of another mesh that the caller has set, where nothing is being traced."""
    where = placement(layers)
    if where is None or not other_mesh_is_set(where[0]):
        return contextlib.nullcontext()
    try:
        return jax.set_mesh(where[0])
    except ValueError:  # under a trace
        return contextlib.nullcontext()


def replicated(array: jax.Array, layers: Any) -> jax.Array:
    """Brings what is chosen from, or known of sequences, to all devices of sharded layers: each process can read it."""
    where = placement(layers)
    return array if where is None else jax.lax.with_sharding_constraint(array, NamedSharding(where[0], P()))
