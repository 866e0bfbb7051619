"""Reaching a Ray cluster or starting a local one, and what its machines hold.

One of the two modules that import Ray. Does not know what the cluster is for.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

from cluster.placement import Machine
from cluster.ray_tokens import authorization, refused
from memedit.errors import InputError, MemeditError

_REACH_TIMEOUT_S = 8.0
_OBJECT_STORE_BYTES = 1 << 30
_CLUSTER_ID = ("/ray.rpc.NodeInfoGcsService/GetClusterId", b"")
_PING = ("/ray.rpc.RayletDriver/ClusterInfo", b"\x08\x06")
"""Calls of Ray's, and questions as they travel."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
FULL = (ObjectStoreFullError, OutOfDiskError)
NO_ROOM = (
    "Ray's object store there and the disk that it spills to are full; free that disk, or start "
    "Ray with more --object-store-memory"
)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How this process came to its Ray."""

    ours: bool
    """Whether it has to let go of it."""
    dashboard: str | None = None
    """The address of the cluster's dashboard, where it has one."""


def connect(address: str | None) -> Connection:
    """Start or reach a cluster, unless this process has one."""
    if ray.is_initialized():
        return Connection(ours=False)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _sigterm_kept():
        if address is None:
            try:
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
            except Exception as error:  # Ray raises a bare Exception when it takes too long
                raise MemeditError(
                    f"no local Ray could be started ({last_line(str(error))}); run the command "
                    "again when the machine is less busy, or use the inline executor"
                ) from error
            return Connection(ours=True)
        address = _found(address)
        _reach(address)
        try:
            context = ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            if "Version mismatch" in str(error):
                raise _other_version(address, str(error)) from error
            raise _unreachable(address, last_line(str(error))) from error
    url = context.dashboard_url
    return Connection(ours=True, dashboard=f"http://{url}" if url else None)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM in place of that which the program has set."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _found(address: str) -> str:
    """The address itself; for `auto` what Ray makes of it: RAY_ADDRESS, or the cluster here."""
    if address != "auto":
        return address
    from ray._private import services

    services.find_gcs_addresses.cache_clear()  # type: ignore[attr-defined]  # as ray.init does
    try:
        found = services.get_ray_address_from_environment(address, None)
    except ConnectionError as error:
        raise _unreachable(address, last_line(str(error))) from error
    return str(found)


def _reach(address: str) -> None:
    """Check in seconds that something answers as Ray does; Ray itself tries for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme not in ("", "ray"):
        raise InputError(
            f"{address!r} is no address of Ray; write auto, HOST:PORT or ray://HOST:PORT",
            field="address",
        )
    if parts.scheme != "ray" and host in _LOOPBACK:
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # as Ray does
    try:
        socket.create_connection((host, port), timeout=_REACH_TIMEOUT_S).close()
    except OSError as error:
        other = "" if str(host) in address else f"; this is {host} to Ray"
        raise _unreachable(address, f"{error}{other}") from error
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    _greet(address, f"{host}:{port}", client=parts.scheme == "ray")


def _greet(address: str, place: str, *, client: bool) -> None:
    """Ask for what any Ray answers to whoever has its token; Ray itself asks again for ever."""
    import grpc  # type: ignore[import-untyped]

    method, question = _PING if client else _CLUSTER_ID
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_REACH_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            raise _unreachable(address, "what answers there is not Ray") from error
        token = authorization()
        metadata = [(name.lower(), value) for name, value in token.items()]
        try:
            channel.unary_unary(method)(question, timeout=_REACH_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            code, codes = error.code(), grpc.StatusCode
            if code is codes.UNAUTHENTICATED:
                raise refused(address, given=bool(token)) from error
            if code is codes.DEADLINE_EXCEEDED:
                raise _unreachable(address, "no answer") from error
            if code is codes.UNIMPLEMENTED:
                usual = "of Ray Client (10001" if client else "of the head itself (6379"
                raise _unreachable(
                    address, f"what answers there is not Ray's port {usual} unless it was set)"
                ) from error


def _unreachable(address: str, why: str) -> InputError:
    return InputError(
        f"no Ray cluster was reached at {address} ({why}); check that it runs, that this port is "
        "open, and, where it asks for a token, that RAY_AUTH_MODE is token and RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH holds it; without an address a local Ray is started",
        field="address",
    )


def _other_version(address: str, told: str) -> InputError:
    """Ray tells both, a line for each: first the cluster's, then those here."""
    rays, pythons = (re.findall(rf"{name}: (\S+)", told) for name in ("Ray", "Python"))
    if len(rays) < 2 or len(pythons) < 2:
        return InputError(
            f"the cluster at {address} has another version of Ray or Python than there is here: "
            + " ".join(told.split()),
            field="address",
        )
    return InputError(
        f"the cluster at {address} has Ray {rays[0]} and Python {pythons[0]}, and here are Ray "
        f"{rays[1]} and Python {pythons[1]}; run this in an environment with "
        f"'ray[default]=={rays[0]}' and Python {pythons[0]}, or on the cluster, by "
        "`memedit submit`",
        field="address",
    )


@contextmanager
def storing() -> Iterator[None]:
    """Say what to do where the driver's object store cannot take what is put into it."""
    try:
        yield
    except FULL as error:
        raise MemeditError(
            f"the driver's machine has no room for what it sends: {NO_ROOM}"
        ) from error


def machines(*, ours: bool) -> list[Machine]:
    """What the living machines of the cluster hold in all."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    held = [node["Resources"] for node in nodes if node["Alive"]]
    # A Ray of ours counts the machine's CPUs; a batch scheduler may have given us fewer.
    most = len(os.sched_getaffinity(0)) if ours else float("inf")
    return [
        Machine(
            cpus=min(resources.get("CPU", 0.0), most),
            gpus=resources.get("GPU", 0.0),
            memory_bytes=resources.get("memory", float("inf")),
        )
        for resources in held
    ]


def last_line(text: str) -> str:
    """The last line of an error, which says what is wrong."""
    return text.strip().splitlines()[-1].strip() if text.strip() else "no reason given"
