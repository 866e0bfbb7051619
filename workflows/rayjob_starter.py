"""Start a RayJob from within Kubernetes and wait for its end: what a CronJob's pod runs.

`python -m workflows.rayjob_starter FILE`, with `JOB_NAME` and `JOB_UID` of the Kubernetes Job. The
RayJob is called after the Job, so that a pod that takes the place of a lost one finds it; it
belongs to the Job and goes with it. A run that does not start holds up all later ones; KubeRay ends
it (`preRunningDeadlineSeconds`), and if that does not happen, it is removed here. Exit codes: 0 the
run succeeded; 1 it did not; 2 nothing is known, try again. Needs nothing but the standard library.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts the token of a pod's ServiceAccount."""
POLL_S = 15.0
PATIENCE_S = 600.0
"""For how long the API server may be away, and KubeRay be late."""
REMIND_S = 600.0
"""How often it is said that a run has not started."""
_ENDED = ("Complete", "Failed", "ValidationFailed")
_REFUSALS = (400, 403, 404, 405, 413, 415, 422)
"""Answers that will not be others later."""


class ApiServer:
    """The RayJobs of one namespace, in the name of a pod's ServiceAccount.

    Args:
        address: Of the API server.
        account: The folder with `token`, `namespace` and `ca.crt`.
    """

    def __init__(self, address: str, account: Path) -> None:
        namespace = (account / "namespace").read_text(encoding="utf-8").strip()
        self._path = f"{address}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._token = account / "token"
        self._tls = None
        if address.startswith("https://"):
            self._tls = ssl.create_default_context(cafile=str(account / "ca.crt"))

    def create(self, manifest: Mapping[str, Any]) -> bool:
        """Start it; False if there is one of this name already."""
        try:
            self._ask("POST", self._path, manifest)
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def status(self, name: str) -> dict[str, Any] | None:
        """What KubeRay says of it; None if it is gone."""
        try:
            found = self._ask("GET", f"{self._path}/{name}", None)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return dict(found.get("status") or {})

    def delete(self, name: str) -> None:
        """Remove it, with its cluster."""
        self._ask("DELETE", f"{self._path}/{name}", None)

    def _ask(self, method: str, url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        # Kubernetes replaces the token from time to time.
        token = self._token.read_text(encoding="utf-8").strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def run_of(template: Mapping[str, Any], *, job: str, uid: str) -> dict[str, Any]:
    """The RayJob of a Job: its name is the run's, in Ray and in memedit, too.

    It is not the Job's: KubeRay calls the Job that submits a RayJob as the RayJob. An ingestion is
    not told a name: it calls what it makes after the facts, and each attempt has a name of its own.
    """
    name = f"{job}-run"
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid}
    spec, entrypoint = template["spec"], template["spec"]["entrypoint"]
    if (spec.get("metadata") or {}).get("memedit") != "ingest":
        entrypoint = f"{entrypoint} --run-id {name}"
    return {
        **template,
        "metadata": {**template["metadata"], "name": name, "ownerReferences": [owner]},
        "spec": {**spec, "jobId": name, "entrypoint": entrypoint},
    }


def start_and_wait(
    server: ApiServer,
    run: Mapping[str, Any],
    *,
    poll_s: float = POLL_S,
    patience_s: float = PATIENCE_S,
    remind_s: float = REMIND_S,
) -> int:
    """The exit code, once the run has ended or may wait no longer for its start."""
    name, told, created = run["metadata"]["name"], "", False
    limit_s = _starts_within_s(run) + patience_s
    heard = ran = reminded = time.monotonic()
    while True:
        try:
            if not created:
                new = server.create(run)
                created = True
                print(f"{name}: {'started' if new else 'was started before'}", flush=True)
            status = server.status(name)
            heard = time.monotonic()
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in _REFUSALS:
                print(f"{name}: refused ({error.code}): {_reason(error)}", flush=True)
                return 1
            if time.monotonic() - heard > patience_s:
                print(f"{name}: the API server does not answer: {error}", flush=True)
                return 2
            time.sleep(poll_s)
            continue
        if status is None:
            print(f"{name}: it was deleted", flush=True)
            return 1
        state = status.get("jobDeploymentStatus") or "Pending"
        line = f"{name}: {state} {status.get('jobStatus') or ''} {status.get('message') or ''}"
        if line != told:
            print(line.strip(), flush=True)
            told = line
        if state in _ENDED:
            return 0 if status.get("jobStatus") == "SUCCEEDED" else 1
        if state == "Running":
            ran = reminded = heard
        elif heard - ran > limit_s:
            print(f"{name}: not started in time, so it is removed: {_advice(run, status)}")
            return _remove(server, run, poll_s=poll_s, patience_s=patience_s)
        elif heard - reminded >= remind_s:
            waited = f"still {state} after {(heard - ran) / 60:.0f} min"
            print(f"{name}: {waited}: {_advice(run, status)}", flush=True)
            reminded = heard
        time.sleep(poll_s)


def _starts_within_s(run: Mapping[str, Any]) -> float:
    """How long all attempts of a run may take to start; a wait in a queue counts, too."""
    spec = run["spec"]
    if "preRunningDeadlineSeconds" not in spec:
        return math.inf
    return float(spec["preRunningDeadlineSeconds"] * (spec.get("backoffLimit", 0) + 1))


def _advice(run: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    """Where to look for the reason."""
    kubectl = f"kubectl -n {run['metadata']['namespace']}"
    if str(status.get("jobDeploymentStatus")).startswith("Suspend"):
        return f"it waits in a queue; {kubectl} get workloads"
    cluster = status.get("rayClusterName")
    if not cluster:
        return (
            "KubeRay has not taken it up, is its operator running?"
            f" {kubectl} describe rayjob {run['metadata']['name']}"
        )
    pods = f"pods -l ray.io/cluster={cluster}"
    return f"{kubectl} get {pods}; {kubectl} describe {pods}"


def _remove(server: ApiServer, run: Mapping[str, Any], *, poll_s: float, patience_s: float) -> int:
    """The exit code, once it is removed; otherwise it might start beside a later run."""
    name, namespace = run["metadata"]["name"], run["metadata"]["namespace"]
    until = time.monotonic() + patience_s
    while True:
        try:
            server.delete(name)
            return 1
        except (OSError, http.client.HTTPException, ValueError) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else None
            if code == http.client.NOT_FOUND:
                return 1
            away = time.monotonic() > until
            if away or code in _REFUSALS:
                print(f"{name}: {error}; remove it: kubectl -n {namespace} delete rayjob {name}")
                return 2 if away else 1
        time.sleep(poll_s)


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def main() -> int:
    """Read the environment of the pod and do it."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    # The first process of a container is not ended by a signal that it has no handler for.
    signal.signal(signal.SIGTERM, stop)
    template = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    run = run_of(template, job=os.environ["JOB_NAME"], uid=os.environ["JOB_UID"])
    return start_and_wait(ApiServer(f"https://{host}:{port}", ACCOUNT), run)


if __name__ == "__main__":
    sys.exit(main())
