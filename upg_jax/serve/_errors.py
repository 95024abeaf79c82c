"""Errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


def bad(param: str, message: str, code: str | None = None) -> ApiError:
    """A field's value that cannot be followed."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str) -> ApiError:
    """More is asked for than can wait."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def late() -> ApiError:
    """An answer takes too long."""
    # OpenAI's clients would ask for it twice more, to be computed as far again.
    headers = {"x-should-retry": "false"}
    return ApiError(504, "the answer took longer than this server allows", code="timeout", headers=headers)


def ending(headers: dict[str, str] | None = None) -> ApiError:
    """The server answers no more."""
    return ApiError(503, "the server is shutting down", headers={"Retry-After": "10", **(headers or {})})
