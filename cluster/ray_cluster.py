"""Reaching a Ray cluster or starting a local one, and what its machines hold.

One of the two modules that import Ray. Does not know what the cluster is for.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError

from cluster.placement import Machine
from memedit.errors import InputError, MemeditError

_REACH_TIMEOUT_S = 8.0
_OBJECT_STORE_BYTES = 1 << 30


def connect(address: str | None) -> bool:
    """Start or reach a cluster unless this process has one; whether there is one to let go of."""
    if ray.is_initialized():
        return False
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
            return True
        _reach(address)
        try:
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise _unreachable(address, last_line(str(error))) from error
    return True


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM in place of that which the program has set."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _reach(address: str) -> None:
    """Check in seconds that something answers as Ray does; Ray itself tries for minutes."""
    if address == "auto":
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise InputError(
            f"{address!r} is no address of Ray; write auto, HOST:PORT or ray://HOST:PORT",
            field="address",
        )
    try:
        socket.create_connection((host, port), timeout=_REACH_TIMEOUT_S).close()
    except OSError as error:
        raise _unreachable(address, str(error)) from error
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    import grpc  # type: ignore[import-untyped]

    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"{host}:{port}", options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_REACH_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            raise _unreachable(address, "what answers there is not Ray") from error


def _unreachable(address: str, why: str) -> InputError:
    return InputError(
        f"no Ray cluster was reached at {address} ({why}); check that it runs, that this port is "
        "open, and that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH holds its token; without an address "
        "a local Ray is started",
        field="address",
    )


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
