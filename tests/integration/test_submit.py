"""Runs submitted to a real Ray with a dashboard that asks for a token.

One cluster for the file, in processes of its own; memedit is what is installed where it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.ray_cluster import connect
from memedit.errors import InputError
from tests.cluster.processes import comes_true
from tests.integration.ray_head import Head, ray_head
from tests.tiny import save_tiny
from tests.workflows.runs import PLAIN, SETTINGS, Ran, memedit, setting, write_rows
from workflows.jobfile import load_job
from workflows.settings import EvaluateJob
from workflows.submit import Submission, find, submit, submitted_defaults

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SLOW = (*SETTINGS, "targets.steps=600", "targets.tokens_per_batch=1")
"""A second or more for each fact: time enough to stop between two."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    save_tiny(folder / "base", bos=True)
    write_rows(folder / "facts.jsonl")
    return folder


@pytest.fixture(scope="module")
def head(folder: Path) -> Iterator[Head]:
    with ray_head({"MEMEDIT_CACHE": str(folder / "cache")}) as running:
        yield running


@pytest.fixture(autouse=True)
def token(head: Head, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.chdir(folder)


def edit(head: Head, out: str, *more: str, settings: tuple[str, ...] = SETTINGS) -> list[str]:
    job = ["edit", *PLAIN, "--model", "base", "--facts", "facts.jsonl", "--out", out]
    job += ["--layers", "1-2"]
    return ["--address", head.address, *job, "--workers", "1", *setting(*settings), *more]


def lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def reused(log: str) -> bool:
    told = [line for line in lines(log) if line.get("stage") == "targets"]
    return any(line["measures"].get("reused", 0) >= 1 for line in told)


@pytest.fixture(scope="module")
def first(head: Head, folder: Path) -> Ran:
    """A whole edit, waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RAY_AUTH_TOKEN", head.token)
        flags = edit(head, "out", "--run-id", "night-1", "--json")
        return memedit("submit", "--wait", *flags)


def test_an_edit_is_done_and_whole(first: Ran, folder: Path) -> None:
    told = first.result
    assert told["ok"] and told["submitted"] and told["exit_code"] == 0
    assert told["state"] == "SUCCEEDED" and told["run_id"] == "night-1"
    assert told["paths"] == {
        name: str(folder / path)
        for name, path in (("out", "out"), ("model", "base"), ("facts", "facts.jsonl"))
    }
    assert told["result"]["out"] == str(folder / "out")
    assert told["result"]["metrics"]["after"]["efficacy"] == 100
    assert '"stage": "targets"' in first.stderr  # the log was followed
    assert memedit("verify", folder / "out", "--json").result["ok"]
    assert json.loads((folder / "out" / "memedit.json").read_text())["run_id"] == "night-1"


def test_the_same_run_is_not_started_again(first: Ran, head: Head) -> None:
    again = memedit("submit", *edit(head, "out", "--run-id", "night-1", "--json"))
    assert again.result["submitted"] is False and again.result["same_job"] is True
    assert (again.result["state"], again.result["exit_code"]) == ("SUCCEEDED", 0)
    assert again.result["started"] == first.result["started"]
    other = memedit("submit", *edit(head, "elsewhere", "--run-id", "night-1", "--json"))
    assert other.result["submitted"] is False and other.result["same_job"] is False


def test_status_and_logs(first: Ran, head: Head) -> None:
    at = ("--address", head.address)
    one = memedit("status", "night-1", *at, "--json").result
    assert (one["command"], one["state"], one["exit_code"]) == ("edit", "SUCCEEDED", 0)
    assert one["started"] < one["ended"]
    assert "night-1" in [run["run_id"] for run in memedit("status", *at, "--json").result["runs"]]
    assert "SUCCEEDED" in memedit("status", *at).stdout
    log = memedit("logs", "night-1", *at)
    assert log.code == 0 and memedit("logs", "night-1", "--follow", *at).stdout == log.stdout
    assert {line["run_id"] for line in lines(log.stdout)} == {"night-1"}
    assert memedit("logs", "night-1", *at, "--json").result["log"] == log.stdout
    assert head.token not in log.stdout + first.stdout + first.stderr


def test_a_run_is_stopped_and_goes_on(head: Head, folder: Path, first: Ran) -> None:
    """The python interface, and the command."""
    flags = edit(head, "later", "--json", settings=SLOW)
    run_id = memedit("submit", *flags).result["run_id"]
    before = set((folder / "cache" / "targets").rglob("*.safetensors"))

    def one_more() -> bool:
        return bool(set((folder / "cache" / "targets").rglob("*.safetensors")) - before)

    assert comes_true(one_more, within_s=60), find(run_id, address=head.address).logs()
    stopped = memedit("stop", run_id, "--address", head.address, "--json").result
    assert stopped["stopped"] and stopped["state"] == "STOPPED"
    assert not memedit("stop", run_id, "--address", head.address, "--json").result["stopped"]
    run = find(run_id, address=head.address)
    assert run.wait().over
    ended = run.result()
    assert ended is not None and ended["error"]["kind"] == "Stopped"  # not killed
    assert not (folder / "later").exists()

    again = memedit("submit", *flags).result
    assert again["submitted"] and again["run_id"] != run_id
    run = find(again["run_id"], address=head.address)
    log = ""
    for text in run.follow():
        log += text
        if reused(log):
            break
    assert reused(log), log
    assert run.stop().state == "STOPPED"


def test_the_exit_code_is_the_runs_own(head: Head) -> None:
    """A fact table that is not there is found there, not here."""
    flags = {"facts": "none.jsonl", "model": "base"}
    job = load_job(EvaluateJob, flags=flags, defaults=submitted_defaults(EvaluateJob))
    run: Submission = submit(job, address=head.address)
    state = run.wait(timeout_s=60)
    assert (state.state, state.exit_code) == ("FAILED", 2)
    assert "none.jsonl" in state.message and "Traceback" not in state.message
    again = ["evaluate", "--facts", "none.jsonl", "--model", "base", "--run-id", run.run_id]
    waited = memedit("submit", "--wait", "--address", head.address, *again, "--json")
    assert waited.code == 2
    told = json.loads(waited.stdout)
    assert told["exit_code"] == 2 and told["result"]["error"]["exit_code"] == 2


@pytest.mark.parametrize("given", ["wrong", None])
def test_a_wrong_token_and_none(
    head: Head, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_MODE", "token" if given else "")
    if given:
        monkeypatch.setenv("RAY_AUTH_TOKEN", given)
    ran = memedit("submit", *edit(head, "out", "--json"))
    assert ran.code == 2 and "token" in ran.error["message"]
    assert "Traceback" not in ran.stderr


def test_a_port_of_ray_that_is_not_the_dashboards(head: Head) -> None:
    ran = memedit("status", "--address", f"http://127.0.0.1:{head.gcs_port}", "--json")
    assert ran.code == 2 and "not Ray's dashboard" in ran.error["message"]


@pytest.mark.parametrize(
    ("port", "scheme", "given", "hint"),
    [
        ("gcs_port", "", "wrong", "wrong token was given"),
        ("gcs_port", "", None, "no token was given"),
        ("client_port", "ray://", "wrong", "wrong token was given"),
        ("client_port", "ray://", None, "no token was given"),
        ("gcs_port", "auto", "wrong", "wrong token was given"),
        ("gcs_port", "auto", None, "no token was given"),
        ("client_port", "", "right", "6379 unless"),
        ("gcs_port", "ray://", "right", "10001 unless"),
    ],
)
def test_ray_itself_is_asked_once_before_work_begins(
    head: Head,
    port: str,
    scheme: str,
    given: str | None,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray would ask again for minutes, or for ever."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    if given != "right":
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
        monkeypatch.setenv("RAY_AUTH_MODE", "token" if given else "")
    if given == "wrong":
        monkeypatch.setenv("RAY_AUTH_TOKEN", given)
    address = f"127.0.0.1:{getattr(head, port)}"
    monkeypatch.setenv("RAY_ADDRESS", address)  # as a job finds it
    with pytest.raises(InputError, match=hint) as refused:
        connect(scheme if scheme == "auto" else f"{scheme}{address}")
    assert refused.value.field == "address"


def test_a_run_that_waits_for_room_says_so(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.submit._BEGIN_S", 3.0)
    followed: list[str] = []

    def follow(self: Submission) -> Iterator[str]:
        followed.append(self.run_id)
        self.stop()
        raise KeyboardInterrupt
        yield ""

    monkeypatch.setattr(Submission, "follow", follow)
    ran = memedit("submit", "--wait", "--driver-gpus", "8", *edit(head, "never", "--json"))
    assert ran.code == 1 and followed and "goes on" in ran.error["message"]
    assert "PENDING" in ran.stderr and "--driver-gpus" in ran.stderr
