"""A small HTTP server that stands for the dashboard of a Ray cluster, for tests of submission."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "a-token-of-this-cluster"


@pytest.fixture(autouse=True)
def no_cluster_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path))


class Dashboard(ThreadingHTTPServer):
    """Answers as Ray's dashboard does, as far as a submission goes, and keeps what it is sent."""

    daemon_threads = True

    def __init__(self, answers: dict[str, tuple[int, Any]]) -> None:
        self.answers = answers
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = json.loads(body) if body else None
        key = f"{self.command} {self.path}"
        self.server.requests.append((key, found, dict(self.headers)))
        code, told = self.server.answers.get(key, (404, "nothing here"))
        if callable(told):
            code, told = told()
        data = (told if isinstance(told, str) else json.dumps(told)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def answers(**changes: str) -> dict[str, tuple[int, Any]]:
    python = changes.get("python", platform.python_version())
    version = changes.get("ray", importlib.metadata.version("ray"))
    return {
        "GET /api/version": (200, {"version": "4", "ray_version": version, "ray_commit": "x"}),
        "GET /api/v0/cluster_metadata": (200, {"data": {"pythonVersion": python}}),
        "POST /api/jobs/": (200, {"job_id": "night-1", "submission_id": "night-1"}),
        "GET /api/jobs/night-1": (
            200,
            {
                "type": "SUBMISSION",
                "submission_id": "night-1",
                "status": "RUNNING",
                "entrypoint": "exec memedit",
                "start_time": 1_764_000_000_000,
                "metadata": {"memedit": "edit", "digest": "of another job"},
            },
        ),
    }


@contextmanager
def dashboard(given: dict[str, tuple[int, Any]]) -> Iterator[Dashboard]:
    server = Dashboard(given)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cluster() -> Iterator[Dashboard]:
    with dashboard(answers()) as server:
        yield server
