"""The address of a Ray cluster's dashboard: what one looks like, and where it comes from.

Imports no Ray.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from memedit.errors import InputError


def dashboard_address(address: str | None) -> str:
    """The address of a cluster's dashboard, http://HOST:PORT; None takes the environment's.

    Raises:
        InputError: There is none, or it is no address of a dashboard.
    """
    if address is None:
        address = os.environ.get("RAY_API_SERVER_ADDRESS")
        if address is None and os.environ.get("RAY_ADDRESS", "").startswith("http"):
            address = os.environ["RAY_ADDRESS"]
        if not address:
            raise InputError(
                "missing; give --address http://HOST:8265, the cluster's dashboard, or set "
                "RAY_API_SERVER_ADDRESS",
                field="address",
            )
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        usable = usable and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise InputError(
            f"{address!r} is no address of a dashboard; write http://HOST:PORT (the port is 8265 "
            "unless it was set)",
            field="address",
        )
    if "@" in parts.netloc:
        raise InputError(
            "an address with keys in it; the token comes from RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH",
            field="address",
        )
    return address.rstrip("/")


@contextmanager
def no_other_address() -> Iterator[None]:
    """Ray's client takes the address of its environment before that which it is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
