"""Who may send requests, and under which name of this server."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence

from starlette.requests import Request

from upg_jax.serve._errors import ApiError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Access:
    """Refuses requests by their headers.

    A web page anywhere can make a browser send requests to a server on its machine: as a form or plain text without
    asking, or as anything at all once its own name resolves to this machine (DNS rebinding). So a body must be declared
    as JSON, for which a browser asks first, and a server for this machine is told which names it has.
    """

    def __init__(self, api_key: str | None, hosts: Sequence[str]) -> None:
        """Checks and keeps the rules.

        Args:
            api_key: what clients must send as a bearer token; None lets everybody in.
            hosts: names and addresses that a request's Host may have; none lets it have any.

        Raises:
            ValueError: for a key that no client can send (HTTP's headers, and OpenAI's client, know ASCII only), or a
                host that is no name or address.
        """
        if api_key is not None and not re.fullmatch("[!-~]+", api_key):
            raise ValueError("serve: an API key must be one or more visible ASCII characters; choose another")
        self._key = None if api_key is None else api_key.encode()
        self._hosts = frozenset(map(_name_in, hosts))
        for host in hosts:
            if not re.fullmatch(r"[\w.:-]+", _name_in(host)):
                raise ValueError(
                    f"serve: a host is a name or an address, without http:// or a path; got {host!r}"
                )

    def check_host(self, request: Request) -> None:
        """Refuses a request for another server.

        Raises:
            ApiError: 421.
        """
        name = _name_in(request.headers.get("host", ""))
        if self._hosts and name not in self._hosts:
            raise ApiError(
                421, f"this server is not {name[:200]!r}; 'upg-jax serve --allow-host NAME' lets it be"
            )

    def check_key(self, request: Request) -> None:
        """Refuses a request without the key.

        Raises:
            ApiError: 401.
        """
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        sent = given.strip().encode("latin-1")  # the bytes that were sent
        if self._key is not None and not (
            scheme.lower() == "bearer" and hmac.compare_digest(sent, self._key)
        ):
            raise ApiError(
                401, "a wrong or no API key was sent as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )


def check_json(request: Request) -> None:
    """Refuses a body that is not declared as JSON.

    Raises:
        ApiError: 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/([^/]+\+)?json", kind):
        raise ApiError(
            415, "the request's body must be JSON, and be sent with 'Content-Type: application/json'"
        )


def _name_in(host: str) -> str:
    """The name or address in a Host header, which may have a port, and brackets around an IPv6 address."""
    name = host.lower()
    bare = name.count(":") > 1 and not name.startswith("[")  # IPv6 as one writes it elsewhere
    return name if bare else re.sub(r":\d*$", "", name).strip("[]")


def is_loopback(address: str) -> bool:
    """Whether an address that is listened on is for programs of this machine only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def url_of(host: str, port: int) -> str:
    """Where a server is found."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def own_hosts(address: str, host: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """The names that a server on an address has.

    Args:
        address: where it listens, from the socket: `127.1` and many another name are the loopback address, too.
        host: how that was named.
        allowed: further names, such as a proxy's in front of it.

    Returns:
        Those for `Access`: none, so any, if it listens beyond this machine and nothing was said about its names.
    """
    return (*_LOOPBACK, address, host, *allowed) if allowed or is_loopback(address) else ()
