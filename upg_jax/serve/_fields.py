"""A strict reader of JSON bodies: every complaint names the field, and nothing is converted silently."""

from __future__ import annotations

import json
import math
from typing import Any

from upg_jax.serve._errors import ApiError, bad


def parse_object(body: bytes) -> dict[str, Any]:
    """Reads a JSON object; NaN and infinities, which are not JSON, are refused."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the request's body must be a JSON object in UTF-8: {str(e)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the request's body must be a JSON object; got {_kind(value)}")
    return value


class Fields:
    """Reads fields; null counts as absent. What was never read is refused by `finish`."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        """Begins to read an object; complaints put `where` before the names of its fields."""
        self._values, self._where = values, where
        self._read: set[str] = set()

    def bad(self, name: str, rule: str, code: str | None = None) -> ApiError:
        """A field that does not follow a rule."""
        name = self._where + name
        return bad(name, f"{name!r} {rule}", code)

    def get(self, name: str) -> Any:
        """A field of any type, None if absent."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str:
        """A text that must be there."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self.bad(name, f"must be a string; got {_kind(value)}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false if absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.bad(name, f"must be true or false; got {_kind(value)}")
        return bool(value)

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        """A number within bounds."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.bad(name, f"must be a number; got {_kind(value)}")
        if not low <= value <= high or math.isnan(value):
            raise self.bad(name, f"must be in [{low:g}, {high:g}]; got {_short(value)}")
        return float(value)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer within bounds."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            got = _short(value) if isinstance(value, float) else _kind(value)
            raise self.bad(name, f"must be an integer; got {got}")
        if not low <= value <= high:
            raise self.bad(name, f"must be in [{low}, {high}]; got {_short(value)}")
        return value

    def strings(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """A text, or a list of some; none may be empty."""
        value = self.get(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(s, str) and s for s in found):
            raise self.bad(name, "must be a non-empty string or a list of them")
        if len(found) > most:
            raise self.bad(name, f"may have {most} strings; got {len(found)}")
        if any(len(text) > longest for text in found):
            raise self.bad(name, f"may have strings of {longest} characters; got {max(map(len, found))}")
        return tuple(found)

    def neutral(self, name: str, *values: Any) -> None:
        """A feature that this server does not have, with the values that do not ask for it."""
        value = self.get(name)
        # For Python, True is 1.
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            raise self.bad(name, "is not supported by this server", "unsupported_parameter")

    def ignore(self, *names: str) -> None:
        """Fields that change no answer."""
        self._read.update(names)

    def finish(self) -> None:
        """Refuses fields that nobody read."""
        for name in self._values.keys() - self._read:
            shown = name[:100].encode("utf-8", "replace").decode()  # JSON has names that are no text
            raise self.bad(shown, "is not a field that this server knows", "unknown_parameter")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: float) -> str:
    # Python refuses to write integers of thousands of digits.
    return str(value) if abs(value) < 1e30 else "a number beyond it"
