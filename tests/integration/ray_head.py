"""A Ray cluster of one machine with its dashboard, in processes of its own; it asks for a token."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.processes import comes_true, processes_with

BIN = Path(sys.executable).parent
PORTS = (
    "port",
    "node-manager-port",
    "object-manager-port",
    "ray-client-server-port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A cluster that runs."""

    address: str
    token: str
    token_path: Path
    gcs_port: int
    client_port: int


@contextmanager
def ray_head(environment: Mapping[str, str], *, cpus: int = 2) -> Iterator[Head]:
    """Start it and end all of it, whatever has become of it."""
    # Not pytest's folder: the path of a socket has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="memedit-ray-"))
    head = None
    try:
        token = secrets.token_hex(32)
        token_path = folder / "token"
        token_path.write_text(token)
        ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
        inside = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_path),
            # In spite of its name this is what makes Ray listen on 127.0.0.1.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        with (folder / "head.log").open("w") as log:
            head = subprocess.Popen(
                [
                    *(str(BIN / "ray"), "start", "--head", "--block"),
                    *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
                    *(f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=100000000"),
                    *(f"--temp-dir={folder / 'ray'}", "--include-dashboard=true"),
                    *(f"--{name}={port}" for name, port in ports.items()),
                ],
                env={**outside, **inside, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        agent = ports["dashboard-agent-listen-port"]
        ready = comes_true(lambda: _takes_jobs(address, token) and _open(agent), within_s=60)
        assert ready, (folder / "head.log").read_text()
        yield Head(
            address=address,
            token=token,
            token_path=token_path,
            gcs_port=ports["port"],
            client_port=ports["ray-client-server-port"],
        )
    finally:
        if head is not None:
            _end(head, str(folder / "token"))
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives to whoever asks for any, while Ray starts."""
    candidates = random.SystemRandom().sample(range(20_000, 32_000), 10 * count)
    found = []
    for port in candidates:
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            found.append(port)
    return found[:count]


def _open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _takes_jobs(address: str, token: str) -> bool:
    request = urllib.request.Request(
        f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _end(head: subprocess.Popen[bytes], token_path: str) -> None:
    """All processes of a cluster have the path of its token in their environment."""
    with contextlib.suppress(ProcessLookupError):
        head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(5)
    comes_true(lambda: not processes_with(token_path), within_s=2)
    for process in processes_with(token_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    head.wait(10)
    assert comes_true(lambda: not processes_with(token_path), within_s=10)
