"""What to compress and how: a density for every tensor, by rules on its name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from upg_jax._encode import checked_group_size
from upg_jax._errors import EncodingError
from upg_jax._index import Index
from upg_jax._mdcsr import MANIFOLDS, Manifold
from upg_jax.compress._prune import Method, check_method, default_pattern
from upg_jax.compress._selection import Pattern

Embedding: TypeAlias = Literal["int8", "float"]
"""What becomes of the token embedding and of the head."""
EMBEDDINGS: tuple[Embedding, ...] = get_args(Embedding)
"""Every choice of `Embedding`."""

# Rows of an embedding are looked up, not multiplied with, so no rule can prune it.
_EMBEDDING = re.compile(r"embed|(^|\.)w[tp]e\.")
_TOKENS = re.compile(r"embed_tokens|(^|\.)wte\.|lm_head")
_DENSE_BY_DEFAULT = re.compile(r"norm|bias|lm_head|block_sparse_moe\.gate\.")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What a matrix is stored as.

    Attributes:
        density: fraction of the weights to keep.
        manifold: of the kept weights.
        index: how entries find their columns.
        tokens: it is the token embedding or the head, as int8 rows.
        value_bits: of the kept weights.
        group_size: columns that share a multiplier; None with values of 8 bits.
    """

    density: float
    manifold: Manifold
    index: Index = "delta8"
    tokens: bool = False
    value_bits: int = 8
    group_size: int | None = None


_INT8_ROWS = Encoding(1.0, "unit", "dense", tokens=True)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the matrices whose name a pattern is found in.

    Attributes:
        pattern: regular expression, searched for anywhere in the tensor's name.
        density: fraction of the weights to keep, in `[0, 1]`; None leaves the tensor as it is.
    """

    pattern: str
    density: float | None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise EncodingError(
                f"rule: the pattern must be a regular expression; got {self.pattern!r} ({e})"
            ) from e
        if self.density is not None:
            _check_density(self.density)

    def finds(self, name: str) -> bool:
        """Whether the pattern is found in a tensor's name."""
        return self._compiled.search(name) is not None

    @functools.cached_property
    def _compiled(self) -> re.Pattern[str]:
        # The module's own cache is smaller than the rules that `allocate` makes for a large model.
        return re.compile(self.pattern)

    @classmethod
    def parse(cls, text: str) -> Rule:
        r"""Reads `PATTERN=DENSITY`, such as `mlp\.down_proj=0.7`.

        Raises:
            EncodingError: if the text has another form.
        """
        pattern, _, number = text.rpartition("=")
        try:
            density = float(number)
        except ValueError:
            pattern = ""
        if not pattern:
            raise EncodingError(rf"rule: must be PATTERN=DENSITY, such as 'mlp\.down_proj=0.7'; got {text!r}")
        return cls(pattern, density)

    @classmethod
    def keep_dense(cls, pattern: str) -> Rule:
        """A rule that leaves the tensors it finds dense."""
        return cls(pattern, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to compress a checkpoint; equal settings and sources give equal bytes.

    Attributes:
        density: fraction of each matrix's weights to keep where no rule says otherwise; 1.0 prunes nothing.
        manifold: `"unit"` (int8, 2 bytes an entry) or `"prime"` (nearly exact, 4 bytes an entry).
        method: how the weights to keep are chosen: `"magnitude"`, or by calibration `"wanda"` or `"sparsegpt"`, which
            also changes the weights that are kept; see `prune_mask` and `sparsegpt`.
        pattern: `"layer"`, `"row"` or `"N:M"`: where densities are met, see `prune_mask`. None stands for `"layer"`
            with magnitude pruning and for `"row"` with the other methods.
        rules: the first one that matches a matrix's name counts. Where none does, norms and biases stay dense;
            other embeddings than that of tokens, and all that is no matrix, always do.
        embedding: what becomes of the token embedding and of the head where no rule says otherwise: `"int8"` rows,
            unpruned, or `"float"`, as they are. None stands for `"int8"` on the unit manifold and for `"float"` on
            the prime manifold, whose promise is exactness.
        pack: store each matrix with the `index` that takes the least space at its density, which is about what
            multiplies fastest on a CPU, and needs no packing when it is loaded; not always with `"delta8"`. Values of
            fewer than 8 bits are stored so in any case.
        value_bits: 8, or 4 or 3 with multipliers for groups of columns, on the unit manifold.
        group_size: columns of a group with values of fewer than 8 bits, 32, 64 or 128; None stands for 64.
    """

    density: float
    manifold: Manifold = "unit"
    method: Method = "magnitude"
    pattern: str | None = None
    rules: tuple[Rule, ...] = ()
    embedding: Embedding | None = None
    pack: bool = False
    value_bits: int = 8
    group_size: int | None = None

    def __post_init__(self) -> None:
        _check_density(self.density)
        if self.embedding not in (None, *EMBEDDINGS):
            raise EncodingError(f"settings: embedding must be one of {EMBEDDINGS}; got {self.embedding!r}")
        check_method(self.method)
        constraint = Pattern.parse(self.counted)
        for density in (self.density, *(rule.density for rule in self.rules)):
            if density is not None:
                constraint.check_density(density)
        if self.manifold not in MANIFOLDS:
            raise EncodingError(f"settings: manifold must be one of {MANIFOLDS}; got {self.manifold!r}")
        checked_group_size(self.value_bits, self.group_size, self.manifold, "settings")

    def encodings(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Encoding | None]:
        """Applies the rules.

        Args:
            shapes: shape of every tensor by name.

        Returns:
            Encoding by name, None where the tensor stays dense.

        Raises:
            EncodingError: if a rule matches no matrix that it could apply to.
        """
        matrices = {n: None for n, shape in shapes.items() if len(shape) == 2 and not _EMBEDDING.search(n)}
        for rule in self.rules:
            names: Iterable[str] = shapes if rule.density is None else matrices
            if not any(rule.finds(name) for name in names):
                raise EncodingError(_matches_nothing(rule, shapes, matrices))
        return {
            name: self._encoding(name, name in matrices) if len(s) == 2 else None
            for name, s in shapes.items()
        }

    def _encoding(self, name: str, prunable: bool) -> Encoding | None:
        for rule in self.rules:
            if rule.finds(name) and (prunable or rule.density is None):
                return None if rule.density is None else self._pruned(rule.density)
        if _TOKENS.search(name):
            return _INT8_ROWS if self.token_embedding == "int8" else None
        return self._pruned(self.density) if prunable and not _DENSE_BY_DEFAULT.search(name) else None

    def _pruned(self, density: float) -> Encoding:
        narrow = self.value_bits != 8
        return Encoding(
            density,
            self.manifold,
            _smallest(density, self.manifold, self.value_bits) if self.pack or narrow else "delta8",
            value_bits=self.value_bits,
            group_size=self.groups,
        )

    @property
    def groups(self) -> int | None:
        """Columns of a group, the default if none was given; None with values of 8 bits."""
        return checked_group_size(self.value_bits, self.group_size, self.manifold, "settings")

    @property
    def counted(self) -> str:
        """The pattern, the method's own if none was given."""
        return default_pattern(self.method) if self.pattern is None else self.pattern

    @property
    def token_embedding(self) -> Embedding:
        """What becomes of the token embedding and the head where no rule says otherwise."""
        return self.embedding or ("int8" if self.manifold == "unit" else "float")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file's provenance."""
        return {
            "density": float(self.density),
            "manifold": self.manifold,
            "method": self.method,
            "pattern": self.counted,
            "rules": [
                [rule.pattern, None if rule.density is None else float(rule.density)] for rule in self.rules
            ],
            "embedding": self.token_embedding,
            "pack": self.pack,
            **({} if self.value_bits == 8 else {"value_bits": self.value_bits, "group_size": self.groups}),
        }


def _smallest(density: float, manifold: Manifold, value_bits: int) -> Index:
    """The index that takes the fewest bits per weight: those of an entry times density, and a mask's one."""
    entry = value_bits if manifold == "unit" else 24
    bits: dict[Index, float] = {"delta8": (entry + 8) * density, "mask": entry * density + 1, "dense": entry}
    return min(bits, key=bits.__getitem__)


def _check_density(density: float) -> None:
    if not 0.0 <= density <= 1.0:
        raise EncodingError(f"settings: density must be in [0, 1]; got {density}")


def _matches_nothing(rule: Rule, shapes: Iterable[str], matrices: Iterable[str]) -> str:
    if any(rule.finds(name) for name in shapes):
        return (
            f"rule: {rule.pattern!r} matches only embeddings and tensors that are no matrices, which are never "
            "pruned; remove it"
        )
    # Names without layer numbers, and every run of their components, since that is what people write.
    parts = [[p for p in name.split(".") if not p.isdecimal()] for name in matrices]
    runs = {".".join(p[i:j]) for p in parts for i, j in itertools.combinations(range(len(p) + 1), 2)}
    close = difflib.get_close_matches(rule.pattern.replace("\\", ""), sorted(runs), n=3, cutoff=0.5)
    known = close or sorted({name.split(".")[-2] for name in matrices if "." in name})
    return f"rule: {rule.pattern!r} matches no matrix; the closest names are {', '.join(known)}"
