"""Every semi-public or version-dependent JAX name the library uses; supported: jax 0.5.0 and newer.

Nothing else in the package may reach into JAX beyond its documented modules.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

__all__ = [
    "Primitive",
    "TraceContext",
    "ad",
    "batching",
    "explicit_sharding",
    "in_auto_mode",
    "manual_axes",
    "mlir",
    "other_mesh_is_set",
    "require_shard_map",
    "reshard",
    "unify_varying",
    "varying_axes",
]


def varying_axes(x: Any) -> frozenset[str]:
    """Manual mesh axes that `x` varies over under `jax.shard_map`; empty elsewhere and on older JAX."""
    if not hasattr(jax, "typeof"):
        return frozenset()
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))


def unify_varying(*arrays: Any) -> list[Any]:
    """Brings arrays to the union of their varying axes.

    A primitive does not do so by itself, and `jax.shard_map` derives from it where a gradient must be summed:
    without this, column-parallel gradients come out wrong without an error.
    """
    union = frozenset().union(*map(varying_axes, arrays))
    return [_to_varying(a, tuple(union - varying_axes(a))) for a in arrays]


def _to_varying(x: Any, axes: Sequence[str]) -> Any:
    if not axes:
        return x
    lax: Any = jax.lax
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)


def explicit_sharding(x: Any) -> Any | None:
    """The sharding of `x` where its type carries one (a mesh with explicit axes), else None."""
    sharding = getattr(jax.typeof(x), "sharding", None) if hasattr(jax, "typeof") else None
    if sharding is None or not getattr(sharding.mesh, "explicit_axes", ()):
        return None
    return sharding


def require_shard_map(operation: str) -> None:
    """Raises where `jax.shard_map` and what else sharded layers need is missing."""
    if not hasattr(jax, "shard_map"):
        raise NotImplementedError(
            f"{operation}: needs jax.shard_map; jax {jax.__version__} is too old for it; install a newer jax"
        )


def manual_axes() -> frozenset[str]:
    """Mesh axes that the code being traced runs once along each device of, under `jax.shard_map`."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def other_mesh_is_set(mesh: Any) -> bool:
    """Whether the caller is inside `jax.set_mesh` of another mesh, or of this one with axes of other types."""
    context = jax.sharding.get_abstract_mesh()
    return not context.empty and context != mesh.abstract_mesh


def reshard(x: Any, sharding: Any) -> Any:
    """`x` as an array of this type, as far as the sharding's mesh has explicit axes: others are not in types."""
    explicit = frozenset(sharding.mesh.explicit_axes)
    if not explicit:
        return x

    def typed(names: Any) -> Any:
        if isinstance(names, tuple):
            return tuple(name for name in names if name in explicit) or None
        return names if names in explicit else None

    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*map(typed, sharding.spec))))


def in_auto_mode(f: Callable[..., jax.Array], sharding: Any, spec: Sequence[Any]) -> Callable[..., jax.Array]:
    """`f` with operands whose types say nothing of a mesh's explicit axes.

    Args:
        f: of arrays alone.
        sharding: what `explicit_sharding` gave.
        spec: how the result is sharded, for each dimension.
    """
    # With its mesh, so that it also holds outside `jax.set_mesh`; others of its axes may be manual.
    out = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jax.sharding.auto_axes(f, axes=sharding.mesh.explicit_axes, out_sharding=out)


class TraceContext:
    """A value that a context manager sets for a thread and that takes part in the key of jit's caches."""

    def __init__(self, default: str) -> None:
        self._native: Any = jax.make_user_context(default) if hasattr(jax, "make_user_context") else None
        self._default = default
        self._local = threading.local()

    @property
    def value(self) -> str:
        """The innermost value set."""
        if self._native is not None:
            return self._native.value
        return getattr(self._local, "value", self._default)

    @contextlib.contextmanager
    def __call__(self, value: str) -> Iterator[None]:
        """Sets the value inside a `with` block."""
        if self._native is not None:
            with self._native(value):
                yield
            return
        # Older JAX has no public way into the cache key, so what was traced must be forgotten instead.
        previous, self._local.value = self.value, value
        jax.clear_caches()
        try:
            yield
        finally:
            self._local.value = previous
            jax.clear_caches()
