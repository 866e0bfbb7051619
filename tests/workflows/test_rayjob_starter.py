"""What starts a RayJob from within Kubernetes, against a server that answers as its API does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from workflows.rayjob_starter import ApiServer, run_of, start_and_wait

PATH = "/apis/ray.io/v1/namespaces/models/rayjobs"
TEMPLATE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"namespace": "models", "labels": {"a": "b"}},
    "spec": {"entrypoint": "memedit edit", "backoffLimit": 1},
}
RUN = run_of(TEMPLATE, job="night-29345678", uid="u-1")


def test_an_ingestion_is_not_told_a_name() -> None:
    spec = {"entrypoint": "memedit ingest", "metadata": {"memedit": "ingest"}}
    run = run_of({**TEMPLATE, "spec": spec}, job="night-29345678", uid="u-1")
    assert run["spec"]["entrypoint"] == "memedit ingest"
    assert run["spec"]["jobId"] == run["metadata"]["name"] == "night-29345678-run"
    assert RUN["spec"]["entrypoint"] == "memedit edit --run-id night-29345678-run"


class Kubernetes(ThreadingHTTPServer):
    """Keeps RayJobs; `statuses` are what KubeRay makes of one, look by look."""

    daemon_threads = True

    def __init__(self) -> None:
        self.statuses: list[Any] = []
        self.refusals: list[int] = []
        self.kept: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.posts = 0
        self.keeps = False
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Kubernetes

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.posts += 1
        name = body["metadata"]["name"]
        if self.server.refusals:
            self._answer(self.server.refusals.pop(0), {"message": "because"})
        elif self.path != PATH:
            self._answer(404, {"message": self.path})
        elif name in self.server.kept:
            self._answer(409, {"message": "already exists"})
        else:
            self.server.kept[name] = body
            self._answer(201, body)

    def do_GET(self) -> None:
        name = self.path.removeprefix(f"{PATH}/")
        statuses = self.server.statuses
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        if isinstance(status, int):
            self._answer(status, {"message": "no"})
        elif name not in self.server.kept:
            self._answer(404, {"message": "not found"})
        else:
            self._answer(200, {"metadata": {"name": name}, "status": status})

    def do_DELETE(self) -> None:
        name = self.path.removeprefix(f"{PATH}/")
        if self.server.keeps:
            self._answer(403, {"message": "no"})
        else:
            self._answer(200, self.server.kept.pop(name))

    def _answer(self, code: int, told: Any) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        data = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def kubernetes() -> Iterator[Kubernetes]:
    server = Kubernetes()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("t-1\n")
    (tmp_path / "namespace").write_text("models")
    return tmp_path


def state(deployment: str, job: str = "") -> dict[str, str]:
    return {"jobDeploymentStatus": deployment, "jobStatus": job}


def start(kubernetes: Kubernetes, account: Path, *, patience_s: float = 0.2) -> int:
    server = ApiServer(kubernetes.address, account)
    return start_and_wait(server, RUN, poll_s=0.01, patience_s=patience_s)


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (state("Complete", "SUCCEEDED"), 0),
        (state("Complete", "FAILED"), 1),
        (state("Complete", "STOPPED"), 1),
        (state("Failed", "FAILED"), 1),
        (state("ValidationFailed"), 1),
    ],
)
def test_a_run_is_started_and_waited_for(
    ended: dict[str, str], code: int, kubernetes: Kubernetes, account: Path
) -> None:
    kubernetes.statuses = [{}, state("Initializing"), state("Running", "RUNNING"), ended]
    assert start(kubernetes, account) == code
    assert kubernetes.kept == {"night-29345678-run": RUN}
    assert kubernetes.tokens == {"Bearer t-1"}


def test_a_pod_that_takes_over_finds_the_run(kubernetes: Kubernetes, account: Path) -> None:
    kubernetes.kept["night-29345678-run"] = {"of": "the first pod"}
    kubernetes.statuses = [state("Running"), state("Complete", "SUCCEEDED")]
    assert start(kubernetes, account) == 0
    assert kubernetes.kept == {"night-29345678-run": {"of": "the first pod"}}


def test_an_api_server_that_is_away_for_a_while(kubernetes: Kubernetes, account: Path) -> None:
    kubernetes.refusals = [503, 429, 401]
    kubernetes.statuses = [500, state("Running"), 503, 502, state("Complete", "SUCCEEDED")]
    assert start(kubernetes, account, patience_s=20) == 0
    assert kubernetes.posts == 4


def test_an_api_server_that_stays_away(kubernetes: Kubernetes, account: Path) -> None:
    kubernetes.statuses = [503]
    assert start(kubernetes, account) == 2  # another pod tries again


@pytest.mark.parametrize("code", [403, 404, 422])
def test_what_is_refused_is_not_tried_again(
    code: int, kubernetes: Kubernetes, account: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.refusals = [code]
    assert start(kubernetes, account) == 1
    assert kubernetes.posts == 1 and "because" in capsys.readouterr().out


def test_a_run_that_is_deleted(kubernetes: Kubernetes, account: Path) -> None:
    kubernetes.statuses = [state("Running"), 404]
    assert start(kubernetes, account) == 1


STUCK = {
    "Initializing": ({"rayClusterName": "c-1"}, "describe pods -l ray.io/cluster=c-1"),
    "Suspended": ({}, "get workloads"),
    "": ({}, "operator running? kubectl -n models describe rayjob night-29345678-run"),
}


@pytest.mark.parametrize("stays", STUCK)
def test_a_run_that_never_starts_is_removed(
    stays: str, kubernetes: Kubernetes, account: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise no later night would have a run."""
    more, advice = STUCK[stays]
    kubernetes.statuses = [state(stays) | more]
    run = {**RUN, "spec": {**RUN["spec"], "preRunningDeadlineSeconds": 1, "backoffLimit": 0}}
    server = ApiServer(kubernetes.address, account)
    began = time.monotonic()
    assert start_and_wait(server, run, poll_s=0.01, patience_s=0.2, remind_s=0.3) == 1
    assert 1.2 <= time.monotonic() - began < 10
    lines = capsys.readouterr().out.splitlines()
    assert kubernetes.kept == {} and len(lines) >= 4
    assert all(advice in line for line in lines[2:])
    assert f"still {stays or 'Pending'} after 0 min" in lines[2] and "removed" in lines[-1]


def test_a_run_that_cannot_be_removed(
    kubernetes: Kubernetes, account: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.statuses, kubernetes.keeps = [state("Initializing")], True
    run = {**RUN, "spec": {**RUN["spec"], "preRunningDeadlineSeconds": 0}}
    server = ApiServer(kubernetes.address, account)
    assert start_and_wait(server, run, poll_s=0.01, patience_s=0.1) == 1
    said = capsys.readouterr().out
    assert "kubectl -n models delete rayjob night-29345678-run" in said.splitlines()[-1]


def test_a_run_that_has_started_may_take_its_time(kubernetes: Kubernetes, account: Path) -> None:
    """And what is lost on the way waits anew."""
    waits, runs = [state("Initializing")] * 20, [state("Running")] * 60
    ended = state("Complete", "SUCCEEDED")
    kubernetes.statuses = [*waits, *runs, state("Retrying"), *waits, state("Running"), ended]
    run = {**RUN, "spec": {**RUN["spec"], "preRunningDeadlineSeconds": 0}}
    server = ApiServer(kubernetes.address, account)
    began = time.monotonic()
    assert start_and_wait(server, run, poll_s=0.02, patience_s=1.5) == 0
    assert time.monotonic() - began > 1.5


def test_the_token_is_read_each_time(kubernetes: Kubernetes, account: Path) -> None:
    """Kubernetes replaces it within the hour."""
    server = ApiServer(kubernetes.address, account)
    kubernetes.kept["night-29345678-run"] = RUN
    kubernetes.statuses = [state("Running")]
    server.status("night-29345678-run")
    (account / "token").write_text("t-2")
    server.status("night-29345678-run")
    assert kubernetes.tokens == {"Bearer t-1", "Bearer t-2"}


SMALL = """
import signal, sys, workflows.rayjob_starter as starter
from pathlib import Path
starter.ACCOUNT = Path(sys.argv.pop())
address = sys.argv.pop()
server = starter.ApiServer
starter.ApiServer = lambda _, account: server(address, account)
sys.exit(starter.main())
"""


def test_it_is_a_process_that_ends_when_it_is_told_to(
    kubernetes: Kubernetes, account: Path
) -> None:
    """And needs nothing heavy: it runs all night beside the cluster."""
    kubernetes.statuses = [state("Running")]
    file = account / "rayjob.json"
    file.write_text(json.dumps(TEMPLATE))
    inside = {"JOB_NAME": "night-1", "JOB_UID": "u-2"}
    inside |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL, str(file), kubernetes.address, str(account)],
        env={**os.environ, **inside},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "night-1-run: started\n"
        assert "Running" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert kubernetes.kept["night-1-run"]["metadata"]["ownerReferences"][0]["uid"] == "u-2"


def test_it_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import workflows.rayjob_starter;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(*(new - set(sys.stdlib_module_names)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["workflows"]
