"""One weight matrix in every form that some contender multiplies by."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

import upg_jax
from upg_jax import MdCSR
from upg_jax._index import INDEXES

T = TypeVar("T")

# Copies of a matrix that are used in turn add up to at least this, several times the cache: a model reads each of its
# matrices once a token, too.
COLD_BYTES = 128 << 20
MOST_COPIES = 64  # of a tiny matrix, which then comes from a cache
# Programs multiply by this many matrices of a small shape, one after the other, as a model does.
CHAIN = 64


class Matrix:
    """A pruned random matrix; forms are made when first asked for and kept until `forget`.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
        density: fraction of weights that are not zero.
        chain: how many copies one program multiplies by; 1 for a large matrix.
        layers: by manifold and index: of the unit manifold all, of the prime manifold delta8 and what `pack` chooses.
        chosen: by manifold, the index that `pack` chooses.
    """

    def __init__(self, rows: int, columns: int, density: float) -> None:
        self.rows, self.columns, self.density = rows, columns, density
        self.chain = CHAIN if columns <= rows and rows * columns < 1 << 21 else 1
        # Products keep the length of vectors, so that chains of them stay finite and normal numbers.
        w = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32) / np.float32(
            columns**0.5
        )
        self.layers: dict[str, MdCSR] = {}
        self.chosen = {}
        for manifold, indexes in (("unit", INDEXES), ("prime", ("delta8",))):
            layer = MdCSR.from_dense(w, density=density, manifold=manifold)
            self.chosen[manifold] = upg_jax.pack(layer).index
            for index in dict.fromkeys((*indexes, self.chosen[manifold])):
                self.layers[f"{manifold} {index}"] = upg_jax.pack(layer, index)
        del w
        self._forms: dict[tuple, Any] = {}
        self._used: set[tuple] = set()

    @property
    def nnz(self) -> int:
        """Weights that are not zero."""
        return self.layers["unit delta8"].true_nnz

    def case(self, batch: int) -> dict[str, Any]:
        """What a row says of the matrix, and of how many vectors it was multiplied by."""
        return {
            "rows": self.rows,
            "columns": self.columns,
            "density": self.density,
            "batch": batch,
            "nnz": self.nnz,
            "pack": self.chosen,
        }

    @functools.cached_property
    def decoded(self) -> jax.Array:
        """The dense unit layer, float32: what all contenders multiply by, the prime layers' rounding apart."""
        return self.layers["unit delta8"].to_dense(np.float32)

    @functools.cached_property
    def csr(self) -> scipy.sparse.csr_array:
        """The same with absolute int32 columns."""
        return scipy.sparse.csr_array(np.asarray(self.decoded))

    def turns(self, make: Callable[[], T], nbytes: int, *key: Any, first: T | None = None) -> Iterator[T]:
        """Endless copies of something, as many different ones as overflow the caches.

        Args:
            make: makes a copy, at new addresses.
            nbytes: of one.
            key: names the form, so that it is made once.
            first: one that exists, so that nothing large is copied needlessly.
        """
        self._used.add(key)
        if key not in self._forms:
            count = min(max(1, -(-COLD_BYTES // max(nbytes, 1))), MOST_COPIES)
            made = [] if first is None else [first]
            self._forms[key] = made + [make() for _ in range(count - len(made))]
        return itertools.cycle(self._forms[key])

    def forget(self) -> None:
        """Drops the forms that nobody asked for since the last call."""
        self._forms = {key: form for key, form in self._forms.items() if key in self._used}
        self._used.clear()

    def layer_stacks(self, name: str) -> Iterator[MdCSR]:
        """Stacks of `chain` copies of a layer; the layer itself where that is 1."""
        layer = self.layers[name]
        if self.chain == 1:
            return self.turns(lambda: jax.tree.map(jnp.array, layer), layer.nbytes, name, first=layer)
        return self.turns(lambda: upg_jax.stack([layer] * self.chain), layer.nbytes * self.chain, name)

    def dense_tuples(self, dtype: str, transposed: bool) -> Iterator[tuple[jax.Array, ...]]:
        """Tuples of `chain` dense arrays."""
        dense = jnp.asarray(self.decoded.T if transposed else self.decoded, dtype)
        first = (dense,) if self.chain == 1 else None
        return self.turns(
            lambda: tuple(jnp.array(dense) for _ in range(self.chain)),
            dense.nbytes * self.chain,
            dtype,
            transposed,
            first=first,
        )

    def csr_copies(self) -> Iterator[scipy.sparse.csr_array]:
        """Copies of the CSR arrays, which other libraries take views of."""
        return self.turns(self.csr.copy, self.csr_bytes, "csr")

    @property
    def csr_bytes(self) -> int:
        """What float32 values, int32 columns and int32 row pointers take."""
        return 8 * self.nnz + 4 * (self.rows + 1)
