"""What `memedit render` makes, against a real Ray dashboard that asks for a token.

The function of the scheduler examples mostly runs a small command in place of memedit: who starts
it, and how often. At the end it runs the entrypoint of a manifest, as it would be in a pod.
"""

from __future__ import annotations

import json
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._raylet import AuthenticationTokenLoader

from tests.examples.schedulers import imported
from tests.integration.ray_head import Head, ray_head
from tests.tiny import save_tiny
from tests.workflows.runs import SETTINGS, memedit, setting, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head({}) as running:
        yield running


@pytest.fixture(autouse=True)
def token(head: Head, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As an operator sets it for the scheduler's processes."""
    # Ray keeps the first token that a process used, which may be another test's.
    AuthenticationTokenLoader.instance().reset_cache()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    yield
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture
def example() -> Iterator[types.ModuleType]:
    """The function is the same in both files (`tests/examples/test_schedulers.py`)."""
    with imported("airflow") as (module, _):
        yield module


def counting(file: Path, then: str = "true") -> str:
    """A command that leaves a line for each time that it is run."""
    return f"echo once >> {file}; echo done; {then}"


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def run(module: Any, run_id: str, entrypoint: str, tell: Callable[[str], object] = print) -> str:
    log = module.run(run_id, entrypoint=entrypoint, poll_s=0.3, tell=tell)
    assert isinstance(log, str)
    return log


@pytest.mark.parametrize("scheduler", ["airflow", "dagster"])
def test_a_second_fire_finds_the_first(scheduler: str, tmp_path: Path) -> None:
    run_id, file = f"{scheduler}-1", tmp_path / "ran"
    told: list[str] = []
    with imported(scheduler) as (module, _):
        assert "done" in run(module, run_id, counting(file), told.append)
        assert "done" in run(module, run_id, counting(file), told.append)
    assert lines(file) == 1
    assert [line for line in told if line.startswith(run_id)] == [
        f"{run_id}: submitted",
        f"{run_id}: was submitted before",
    ]


def test_two_fires_at_once_are_one_run(example: types.ModuleType, tmp_path: Path) -> None:
    run_id, file = "night-2", tmp_path / "ran"
    logs: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: logs.append(run(example, run_id, counting(file, "sleep 2")))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(logs) == 2 and all("done" in log for log in logs)
    assert lines(file) == 1


def test_what_failed_is_run_again(example: types.ModuleType, tmp_path: Path) -> None:
    """As a scheduler's second attempt does; Ray would not take the same name at once."""
    run_id, file = "night-3", tmp_path / "ran"
    fails_once = counting(file, f"test $(wc -l < {file}) -gt 1")
    with pytest.raises(example.RunFailedError, match="FAILED") as caught:
        run(example, run_id, fails_once)
    assert not caught.value.final
    told: list[str] = []
    for state in ("submitted", "was submitted before"):  # and a duplicate of the second attempt
        assert "done" in run(example, run_id, fails_once, told.append)
        assert f"{run_id}-2: {state}" in told
    assert lines(file) == 2


@pytest.mark.parametrize("code", [2, 3])
def test_what_would_fail_again_is_told_so(
    example: types.ModuleType, code: int, tmp_path: Path
) -> None:
    """Bad input, and a gate that is not met."""
    with pytest.raises(example.RunFailedError) as caught:
        run(example, f"code-{code}", f"exit {code}")
    assert caught.value.final


def test_a_cluster_that_refuses(
    example: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("another")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    AuthenticationTokenLoader.instance().reset_cache()
    with pytest.raises(Exception, match=r"(?i)auth|token"):
        run(example, "never", "true")


def test_the_entrypoint_of_a_manifest_publishes(head: Head, tmp_path: Path) -> None:
    """A volume is a folder here, and the file of the ConfigMap lies elsewhere."""
    save_tiny(tmp_path / "base", bos=True)
    write_rows(tmp_path / "facts.jsonl")
    places = {"model": "base", "facts": "facts.jsonl", "registry": "registry", "cache": "cache"}
    job = {name: str(tmp_path / place) for name, place in places.items()} | {"layers": "1-2"}
    (tmp_path / "night.yaml").write_text(yaml.safe_dump(job))
    volume = ("--volume-claim", "data", "--mount-path", tmp_path)
    out = tmp_path / "made.yaml"
    sets = setting(*SETTINGS)
    config = ("--config", tmp_path / "night.yaml", *sets, "--name", "night")
    assert memedit("render", "kubernetes", *config, *volume, "--out", out).code == 0
    settings, run_manifest = yaml.safe_load_all(out.read_text())
    mounted = tmp_path / "mounted.yaml"
    mounted.write_text(settings["data"]["job.yaml"])
    spec = run_manifest["spec"]
    entrypoint = spec["entrypoint"].replace("/etc/memedit/job.yaml", str(mounted))
    with imported("airflow") as (module, _):
        run(module, spec["jobId"], entrypoint)
    current = json.loads((tmp_path / "registry" / "CURRENT").read_text())
    assert current["version"] == "night"
    told = memedit("status", "night", "--address", head.address, "--json").result
    assert told["state"] == "SUCCEEDED" and told["command"] == "edit"
