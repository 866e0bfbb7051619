"""A cluster that is silent, away or overloaded while a run is submitted or watched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from cluster import ray_jobs
from memedit.errors import MemeditError
from tests.workflows.dashboards import Dashboard, cluster, dashboard, no_cluster_around
from tests.workflows.runs import memedit
from workflows.settings import EditJob
from workflows.submit import submit

__all__ = ["cluster", "no_cluster_around"]


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_POLL_S", 0.01)


def first(told: list[tuple[int, Any]], then: tuple[int, Any]) -> Callable[[], tuple[int, Any]]:
    """What is answered, one after the other, and from then on."""
    return lambda: told.pop(0) if told else then


def test_whoever_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_jobs._CONNECT_S + ray_jobs._ANSWER_S < 60
    monkeypatch.setattr(ray_jobs, "_ANSWER_S", 0.3)
    over = threading.Event()

    def wait() -> tuple[int, Any]:
        over.wait(10)
        return (200, "")

    with dashboard({"GET /api/version": (200, wait)}) as other:
        began = time.monotonic()
        ran = memedit("status", "--address", other.address, "--json")
        assert time.monotonic() - began < 10
        over.set()
    assert ran.code == 2 and "no answer" in ran.error["message"]


def test_a_run_that_has_not_begun_is_not_waited_for(
    cluster: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.submit._BEGIN_S", 0.1)
    cluster.answers["POST /api/jobs/night-1/stop"] = (200, {"stopped": True})
    cluster.answers["GET /api/jobs/night-1"][1]["status"] = "PENDING"
    ran = memedit("stop", "night-1", "--address", cluster.address)
    assert ran.code == 0 and "has not begun yet" in ran.stderr
    assert "told to stop" in ran.stdout


def test_a_log_is_told_once_whatever_breaks(
    cluster: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection ends too early, then the cluster is away for a while, then the run ends.

    The cluster is away once more when the rest of the log is asked for.
    """
    jobs = ray_jobs.RayJobs(cluster.address)
    written = "".join(f"line {i}\n" for i in range(9))
    tails = iter([["line 0\n", "line 1\n"], [], ["line 0\nline 1\nli"], [written[:-7]]])
    details = cluster.answers["GET /api/jobs/night-1"][1]
    cluster.answers["GET /api/jobs/night-1/logs"] = (200, {"logs": written})

    def tail(run_id: str) -> Iterator[str]:
        yield from next(tails)
        if not tails.__length_hint__():
            details["status"] = "SUCCEEDED"
        away.extend([True, True])

    away: list[bool] = []
    answered = jobs._client.get_job_info

    def sometimes(run_id: str) -> Any:
        if away:
            away.pop()
            raise requests.ConnectionError("away")
        return answered(run_id)

    whole, breaks = jobs._client.get_job_logs, [True, True]

    def at_last(run_id: str) -> str:
        if breaks:
            breaks.pop()
            raise requests.ConnectionError("away")
        return whole(run_id)

    monkeypatch.setattr(jobs._client, "get_job_info", sometimes)
    monkeypatch.setattr(jobs._client, "get_job_logs", at_last)
    monkeypatch.setattr(jobs, "_tail", tail)
    assert "".join(jobs.follow("night-1")) == written and not breaks


def test_a_cluster_that_stays_away(cluster: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = ray_jobs.RayJobs(cluster.address)
    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", 0.1)
    cluster.shutdown()
    cluster.server_close()
    with pytest.raises(MemeditError, match="may go on without being watched") as lost:
        list(jobs.follow("night-1"))
    assert lost.value.exit_code == 1


@pytest.mark.parametrize("code", [429, 500, 502, 503])
def test_a_head_that_starts_again_is_waited_for(cluster: Dashboard, code: int) -> None:
    details = cluster.answers["GET /api/jobs/night-1"][1] | {"status": "SUCCEEDED"}
    told = [(code, "<html>\nService Unavailable\n</html>")] * 2
    cluster.answers["GET /api/jobs/night-1"] = (200, first(told, (200, details)))
    jobs = ray_jobs.RayJobs(cluster.address)
    assert jobs.wait("night-1").over and not told
    told = [(code, "Service Unavailable")] * 2
    cluster.answers["GET /api/jobs/night-1/logs"] = (200, first(told, (200, {"logs": "whole"})))
    assert jobs.logs("night-1", patient=True) == "whole" and not told


def test_who_does_not_wait_hears_what_was_answered(cluster: Dashboard) -> None:
    cluster.answers["GET /api/jobs/night-1"] = (503, "Service Unavailable")
    ran = memedit("status", "night-1", "--address", cluster.address, "--json")
    assert ran.code == 1 and "(HTTP 503, Service" in ran.error["message"]


# An answer to the submission that is lost


@pytest.mark.parametrize("silent", [True, False])
def test_a_run_that_was_taken_without_an_answer(
    cluster: Dashboard, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    details = cluster.answers["GET /api/jobs/night-1"][1]

    def take() -> tuple[int, Any]:
        taken = details | {"metadata": cluster.requests[-1][1]["metadata"]}
        told = first([(503, "not yet")], (200, taken))
        cluster.answers["GET /api/jobs/night-1"] = (200, told)
        if silent:
            over.wait(10)
        return (502, "gateway")

    cluster.answers["POST /api/jobs/"] = (200, take)
    if silent:
        monkeypatch.setattr(ray_jobs, "_ANSWER_S", 1.0)
    done = submit(EditJob(facts="/f", out="/o", run_id="night-1"), address=cluster.address)
    over.set()
    assert done.submitted and done.same_job
    assert [key for key, _, _ in cluster.requests].count("POST /api/jobs/") == 1


def test_another_run_that_was_there_before(cluster: Dashboard) -> None:
    cluster.answers["POST /api/jobs/"] = (502, "gateway")
    done = submit(EditJob(facts="/f", out="/o", run_id="night-1"), address=cluster.address)
    assert not done.submitted and not done.same_job


@pytest.mark.parametrize("then", [404, 503])
def test_a_run_that_nobody_knows_of_is_named(
    cluster: Dashboard, then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", 0.1)
    cluster.answers["POST /api/jobs/"] = (504, "no answer in time")
    cluster.answers["GET /api/jobs/night-1"] = (then, "no")
    flags = ["--facts", "/f.jsonl", "--out", "/o", "--run-id", "night-1", "--json"]
    ran = memedit("submit", "--address", cluster.address, "edit", *flags)
    assert ran.code == 1 and "--run-id night-1" in ran.error["message"]
