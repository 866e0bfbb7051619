"""Progress at the endpoint that Prometheus would read, of a real Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from cluster.ray_metrics import Metered
from memedit.progress import Silent, UnitReport
from tests.cluster.s3_places import child_environment


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        self.calls.append(("start", stage, total, unit))

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        self.calls.append(("advance", stage, done, measures))

    def finish(self, stage: str) -> None:
        self.calls.append(("finish", stage))

    def message(self, text: str, *, warning: bool = True) -> None:
        self.calls.append(("message", text, warning))

    def unit(self, report: UnitReport) -> None:
        self.calls.append(("unit", report))


def a_report(failure: str | None = None) -> UnitReport:
    return UnitReport(
        work="targets", unit_id=3, worker="worker 1 of 2", seconds=1.25, attempt=2, failure=failure
    )


def a_run(progress: Any) -> None:
    progress.start("targets", total=3, unit="facts")
    progress.advance("targets", 2, loss=0.5)
    progress.unit(a_report())
    progress.unit(a_report(failure="it died"))
    progress.message("a worker died")
    progress.message("for your information", warning=False)
    progress.advance("targets", 1, loss=0.25)
    progress.finish("targets")


def test_everything_is_passed_on_and_ray_is_not_imported() -> None:
    one, other = Told(), Told()
    a_run(one)
    a_run(Metered(other, "night-1"))
    assert one.calls == other.calls


PROGRAM = """
import json, signal, sys, time, urllib.request
from cluster.executors import prepare_ray
from cluster.ray_metrics import Metered
from memedit.progress import Silent
from tests.cluster.test_ray_metrics import a_run

metered = Metered(Silent(), "night-1")
metered.start("load", total=1, unit="models")
metered.advance("load")
assert "ray" not in sys.modules
prepare_ray(local=True)
import ray
port = int(sys.argv[1])
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20,
         _metrics_export_port=port, _node_ip_address="127.0.0.1", log_to_driver=False,
         _system_config={"metrics_report_interval_ms": 500})
a_run(metered)
end = time.monotonic() + 40
lines = []
while time.monotonic() < end:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if "memedit_" in line and line[0] != "#"]
    except OSError:
        pass
    if any("stage_seconds" in line for line in lines):
        break
    time.sleep(0.5)
print(json.dumps(lines))
ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_what_prometheus_reads() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = child_environment() | {"RAY_AUTH_TOKEN": os.urandom(32).hex()}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(port)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines: list[str] = json.loads(ran.stdout.splitlines()[-1])

    def value(name: str, **labels: str) -> float:
        wanted = [f'{label}="{text}"' for label, text in {"run_id": "night-1", **labels}.items()]
        found = [
            line
            for line in lines
            if line.split("{")[0].endswith(name) and all(each in line for each in wanted)
        ]
        assert len(found) == 1, (name, labels, lines)
        return float(found[0].rsplit(" ", 1)[1])

    assert value("memedit_done_total", stage="load", unit="models") == 1
    assert value("memedit_done_total", stage="targets", unit="facts") == 3
    assert value("memedit_expected", stage="targets", unit="facts") == 3
    assert value("memedit_measure", stage="targets", measure="loss") == 0.25
    assert value("memedit_messages_total") == 1
    assert value("memedit_stage_seconds_total", stage="targets") >= 0
    for ended in ("done", "failed"):
        assert value("memedit_units_total", work="targets", ended=ended) == 1
    assert value("memedit_retries_total", work="targets") == 2
    assert value("memedit_unit_seconds_total", work="targets") == 1.25
