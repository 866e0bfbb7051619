from __future__ import annotations

import http.server
import importlib.metadata
import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest

from memedit.progress import Silent
from workflows import doctor
from workflows.cli import run
from workflows.doctor import Check, Diagnosis, run_doctor
from workflows.models import EMBEDDED_PACKAGE, MARKER_NAME
from workflows.settings import DoctorJob


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and a hub that nobody serves, so that no test goes to the network."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MEMEDIT_CACHE", str(tmp_path))
    return tmp_path


def converted(cache: Path) -> None:
    folder = cache / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / MARKER_NAME).write_text("{}")


def test_all_that_is_needed_is_here(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(nowhere)
    assert run(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    states = {check["name"]: check["state"] for check in told["checks"]}
    assert told["ok"]
    assert states["packages"] == "ok"
    assert states["Hugging Face"] == "warning"


def test_the_table_for_people_has_a_line_a_check(
    nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(nowhere)
    assert run(["doctor"]) == 0
    told = capsys.readouterr().out
    for check in run_doctor(DoctorJob(cache=nowhere), Silent()).checks:
        assert check.name in told


def test_only_what_is_needed_makes_it_fail() -> None:
    missing = Check(name="x", state="missing", detail="", remedy="get it")
    optional = Check(name="y", state="failed", detail="", needed=False)
    poor = Check(name="z", state="warning", detail="")
    assert Diagnosis(checks=(optional, poor)).ok
    assert not Diagnosis(checks=(optional, missing)).ok


def test_a_missing_package_makes_the_exit_code_1(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(nowhere)
    required = ["click>=8", "no-such-package>=1", "only-extra; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    assert run(["doctor", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    (found,) = [check for check in checks if check["name"] == "packages"]
    assert found["detail"] == "no-such-package is not installed"
    assert "pip install" in found["remedy"]


def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["click>=999"])
    found = doctor.packages()
    assert found.state == "missing"
    assert ">=999" in found.detail


def test_memedit_itself_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", nothing)
    assert doctor.packages().state == "missing"


def test_a_cache_that_is_a_file_is_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = doctor.cache(tmp_path / "file" / "cache")
    assert (found.state, "MEMEDIT_CACHE" in found.remedy) == ("failed", True)
    assert doctor.cache(tmp_path / "new" / "cache").state == "ok"


def test_little_memory_and_disk_are_warnings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_available_bytes", lambda: 1 << 20)
    assert doctor.memory().state == "warning"
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1 << 20))
    assert doctor.cache(tmp_path).state == "warning"


@pytest.mark.parametrize(("code", "state"), [(0, "ok"), (1, "missing")])
def test_the_embedded_model_is_asked_of_pip_where_it_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, state: str
) -> None:
    commands: list[list[str]] = []

    def answer(command: Any, **_: Any) -> CompletedProcess[str]:
        commands.append(list(command))
        return CompletedProcess(command, code, "", "")

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == EMBEDDED_PACKAGE else find(name)
    )
    monkeypatch.setattr(doctor, "_run", answer)
    assert doctor.embedded_model(tmp_path).state == state
    assert commands[0][:3] == [sys.executable, "-m", "pip"]
    converted(tmp_path)
    assert doctor.embedded_model(tmp_path).state == "ok"
    assert len(commands) == 1


@pytest.fixture
def served() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_answers(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", served)
    assert doctor.hub().state == "ok"


def test_no_value_of_a_secret_is_shown(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(nowhere)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    run(["doctor", "--json"])
    told = capsys.readouterr()
    assert "AWS_SECRET_ACCESS_KEY" in told.out
    assert "hush-hush" not in told.out + told.err


def test_ray_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = CompletedProcess([], 1, "", "Traceback\nRuntimeError: no port")
    monkeypatch.setattr(doctor, "_run", lambda *_, **__: failed)
    found = doctor.ray(start=True)
    assert (found.state, found.needed) == ("failed", False)
    assert "RuntimeError: no port" in found.detail


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_runs_a_task() -> None:
    assert doctor.ray(start=True).detail.endswith("ran a task")
