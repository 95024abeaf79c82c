"""What to compress and how: a density for every tensor, by rules on its name."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from upg_jax._errors import EncodingError
from upg_jax._mdcsr import MANIFOLDS, Manifold
from upg_jax.compress._prune import Method, check_method

# Rows of an embedding are looked up, not multiplied with, so no rule can compress it.
_EMBEDDING = re.compile(r"embed|(^|\.)w[tp]e\.")
_DENSE_BY_DEFAULT = re.compile(r"norm|bias|lm_head")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the matrices whose name a pattern is found in.

    Attributes:
        pattern: regular expression, searched for anywhere in the tensor's name.
        density: fraction of the weights to keep, in `[0, 1]`; None leaves the tensor dense.
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
        method: how the weights to keep are chosen; see `prune_mask`.
        rules: the first one that matches a matrix's name counts. Where none does, norms, biases and `lm_head`
            stay dense; embeddings, and all that is no matrix, always do.
    """

    density: float
    manifold: Manifold = "unit"
    method: Method = "magnitude"
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        _check_density(self.density)
        check_method(self.method)
        if self.manifold not in MANIFOLDS:
            raise EncodingError(f"settings: manifold must be one of {MANIFOLDS}; got {self.manifold!r}")

    def densities(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float | None]:
        """Applies the rules.

        Args:
            shapes: shape of every tensor by name.

        Returns:
            Density by name, None where the tensor stays dense.

        Raises:
            EncodingError: if a rule matches no matrix that it could apply to.
        """
        matrices = {n: None for n, shape in shapes.items() if len(shape) == 2 and not _EMBEDDING.search(n)}
        for rule in self.rules:
            # Keeping an embedding dense is no mistake, only needless.
            names: Iterable[str] = shapes if rule.density is None else matrices
            if not any(re.search(rule.pattern, name) for name in names):
                raise EncodingError(_matches_nothing(rule, shapes, matrices))
        return {name: self._density(name) if name in matrices else None for name in shapes}

    def _density(self, name: str) -> float | None:
        for rule in self.rules:
            if re.search(rule.pattern, name):
                return rule.density
        return None if _DENSE_BY_DEFAULT.search(name) else self.density

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file's provenance."""
        return {
            "density": float(self.density),
            "manifold": self.manifold,
            "method": self.method,
            "rules": [
                [rule.pattern, None if rule.density is None else float(rule.density)] for rule in self.rules
            ],
        }


def _check_density(density: float) -> None:
    if not 0.0 <= density <= 1.0:
        raise EncodingError(f"settings: density must be in [0, 1]; got {density}")


def _matches_nothing(rule: Rule, shapes: Iterable[str], matrices: Iterable[str]) -> str:
    if any(re.search(rule.pattern, name) for name in shapes):
        return (
            f"rule: {rule.pattern!r} matches only embeddings and tensors that are no matrices, which always "
            "stay dense; remove it"
        )
    # Names without layer numbers, and every run of their components, since that is what people write.
    parts = [[p for p in name.split(".") if not p.isdecimal()] for name in matrices]
    runs = {".".join(p[i:j]) for p in parts for i, j in itertools.combinations(range(len(p) + 1), 2)}
    close = difflib.get_close_matches(rule.pattern.replace("\\", ""), sorted(runs), n=3, cutoff=0.5)
    known = close or sorted({name.split(".")[-2] for name in matrices if "." in name})
    return f"rule: {rule.pattern!r} matches no matrix; the closest names are {', '.join(known)}"
