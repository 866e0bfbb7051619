"""The examples for schedulers are what `memedit render` gives, and declare what they should.

That they run memedit on a Ray cluster is tested in `tests/integration/test_schedulers_on_ray.py`.
"""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.examples.schedulers import FOLDER, FailError, SkipError, imported
from tests.workflows.dashboards import Dashboard, cluster, no_cluster_around
from tests.workflows.kube_schemas import errors_of, validator_of
from tests.workflows.runs import memedit
from workflows.cli import cli
from workflows.ingestion.settings import IngestJob
from workflows.jobfile import load_job
from workflows.settings import EditJob

__all__ = ["cluster", "no_cluster_around"]
ROOT = Path(__file__).parents[2]
README = ROOT / "examples" / "README.md"
FIRED = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)
RUN_ID = "memedit-nightly-20261125T020000Z"


def commands() -> list[list[str]]:
    """The commands in the page of the examples that made them."""
    text = re.sub(r"\\\n\s*", "", README.read_text(encoding="utf-8"))
    lines = re.findall(r"^ *(memedit render .*--out .*)$", text, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_page_has_a_command_for_each_file() -> None:
    made = {command[command.index("--out") + 1] for command in commands()}
    there = {str(p.relative_to(ROOT)) for p in FOLDER.rglob("*") if p.suffix in (".py", ".yaml")}
    assert made == there and len(there) == 8


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[-1])
def test_each_is_what_render_gives(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    place = command.index("--out") + 1
    out = tmp_path / "made"
    assert memedit(*command[1:place], out, *command[place + 1 :]).code == 0
    assert out.read_text() == (ROOT / command[place]).read_text(), f"run: {shlex.join(command)}"


@pytest.mark.parametrize(
    "path", sorted((FOLDER / "kubernetes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_kuberay_takes_the_manifests(path: Path, shared_data: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        kind = manifest["kind"].lower()
        if manifest["apiVersion"] == "ray.io/v1":
            validator = validator_of(shared_data / "kuberay-crds", f"{kind}s")
            assert errors_of(validator, manifest) == []


# The Python files


@pytest.mark.parametrize("of", ["memedit", "ingest"])
def test_both_talk_to_ray_in_the_same_words(of: str) -> None:
    texts = [(FOLDER / f"{name}_{of}.py").read_text() for name in ("airflow", "dagster")]
    airflow, dagster = (t[t.index("NAME = ") : t.index("    return log\n")] for t in texts)
    assert airflow == dagster and "submit_job" in airflow


@pytest.mark.parametrize("scheduler", ["airflow", "dagster"])
def test_the_command_is_the_job_of_the_file(scheduler: str) -> None:
    with imported(scheduler) as (module, _):
        program, command, *arguments = module.COMMAND
    assert program == "memedit"
    context = cli.commands[command].make_context(command, [*arguments, f"--run-id={RUN_ID}"])
    assert context.params.pop("config") is None
    assignments = context.params.pop("assignments")
    found = load_job(EditJob, flags=context.params, assignments=assignments)
    flags = {"executor": "ray", "address": "auto", "log_format": "json", "json": True}
    config = ROOT / "examples" / "nightly.yaml"
    assert found == load_job(EditJob, config=config, flags=flags | {"run_id": RUN_ID})


@pytest.mark.parametrize("scheduler", ["airflow", "dagster"])
def test_the_command_is_the_ingestion_of_the_file(scheduler: str) -> None:
    with imported(scheduler, of="ingest") as (module, _):
        program, command, *arguments = module.COMMAND
    assert (program, command) == ("memedit", "ingest")
    context = cli.commands[command].make_context(command, arguments)
    assert context.params.pop("config") is None
    assignments = context.params.pop("assignments")
    found = load_job(IngestJob, flags=context.params, assignments=assignments)
    assert found == load_job(
        IngestJob,
        config=ROOT / "examples" / "ingest.yaml",
        flags={"executor": "ray", "address": "auto", "log_format": "json", "json": True},
        assignments=["registry=s3://models/capitals", "source.path=s3://facts/inbox/*.jsonl"],
    )


@pytest.mark.parametrize("scheduler", ["airflow", "dagster"])
def test_a_run_is_called_after_its_moment(scheduler: str) -> None:
    with imported(scheduler) as (module, _):
        assert module.run_id_of(FIRED) == RUN_ID
        elsewhere = FIRED.astimezone(timezone(timedelta(hours=9)))
        assert module.run_id_of(elsewhere) == RUN_ID
        assert module.run_id_of(FIRED + timedelta(days=1)) != RUN_ID


@pytest.mark.parametrize("scheduler", ["airflow", "dagster"])
def test_reading_the_file_does_not_import_ray(scheduler: str) -> None:
    """Airflow reads it every half a minute."""
    code = (
        "import sys; from tests.examples.schedulers import imported\n"
        f"with imported({scheduler!r}): print('ray' in sys.modules, 'memedit' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", "False"]


def test_whoever_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, imported("airflow") as (module, _):
        assert sum(module.TIMEOUT_S) < 60
        monkeypatch.setattr(module, "TIMEOUT_S", (5.0, 0.3))
        began = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            module.run("night-1", address=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began < 5


def test_a_log_is_told_as_it_comes_though_the_link_is_cut(
    cluster: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    details = cluster.answers["GET /api/jobs/night-1"][1]
    written = iter(["", "one\ntw", None, "one\ntwo\n", "one\ntwo\nthree"])

    def log() -> tuple[int, Any]:
        if (text := next(written)) is None:
            over.wait(10)
        if written.__length_hint__() == 1:
            details["status"] = "SUCCEEDED"
        return (200, {"logs": text})

    cluster.answers["GET /api/jobs/night-1/logs"] = (200, log)
    told: list[str] = []
    with imported("airflow") as (module, _):
        monkeypatch.setattr(module, "TIMEOUT_S", (5.0, 0.3))
        found = module.run("night-1", address=cluster.address, poll_s=0.01, tell=told.append)
    over.set()
    assert found == "one\ntwo\nthree"
    assert told == ["night-1: submitted", "one", "two", "three"]


@pytest.mark.parametrize("version", [2, 3])
def test_the_dag(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with imported("airflow", version=version) as (module, kept):
        (_, _, dag), (kind, edit, task) = kept
        assert (dag["schedule"].cron, dag["schedule"].timezone) == ("0 2 * * *", "Etc/UTC")
        assert dag["dag_id"] == "memedit-nightly"
        assert dag["catchup"] is False and dag["max_active_runs"] == 1
        assert dag["start_date"].utcoffset() == timedelta(0)
        assert kind == "task" and task["retries"] == 2
        ran: list[str] = []
        monkeypatch.setattr(module, "run", ran.append)
        edit(dag_run=SimpleNamespace(logical_date=FIRED))
        edit(dag_run=SimpleNamespace(logical_date=None, run_after=FIRED))
        assert ran == [RUN_ID, RUN_ID]
        for code, error in ((1, module.RunFailedError), (2, FailError), (3, FailError)):
            monkeypatch.setattr(module, "run", failing(module, code))
            with pytest.raises(error, match="why"):
                edit(dag_run=SimpleNamespace(logical_date=FIRED))


def test_the_dagster_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with imported("dagster") as (module, kept):
        declared = {kind: (function, given) for kind, function, given in kept}
        schedule, given = declared["schedule"]
        assert given["cron_schedule"] == "0 2 * * *"
        assert given["execution_timezone"] == "Etc/UTC"
        assert given["job"] is declared["job"][0] is module.memedit_nightly
        request = schedule(SimpleNamespace(scheduled_execution_time=FIRED))
        assert request.run_key == RUN_ID
        config = request.run_config["ops"]["edit"]["config"]
        declared["job"][0]()
        assert kept[-1][0] == "called" and kept[-1][1] is declared["op"][0]
        assert module.definitions.schedules == [schedule]
        edit = declared["op"][0]
        ran: list[str] = []
        monkeypatch.setattr(module, "run", lambda run_id, tell: ran.append(run_id))
        context = SimpleNamespace(log=SimpleNamespace(info=print))
        edit(context, module.EditConfig(**config))
        assert ran == [RUN_ID]
        for code, again in ((1, True), (2, False), (3, False)):
            monkeypatch.setattr(module, "run", failing(module, code))
            with pytest.raises(FailError, match="why") as caught:
                edit(context, module.EditConfig(**config))
            assert caught.value.more == {"allow_retries": again}


# The same of an ingestion


def test_an_ingestion_is_not_told_the_name_of_its_run(cluster: Dashboard) -> None:
    details = cluster.answers["GET /api/jobs/night-1"][1]
    details["status"] = "SUCCEEDED"
    cluster.answers["GET /api/jobs/night-1/logs"] = (200, {"logs": "done\n"})
    with imported("airflow", of="ingest") as (module, _):
        module.run("night-1", address=cluster.address, poll_s=0.01)
    ((_, sent, _),) = [r for r in cluster.requests if r[0] == "POST /api/jobs/"]
    assert sent["submission_id"] == "night-1" and sent["metadata"] == {"memedit": "ingest"}
    assert sent["entrypoint"].startswith("exec memedit ingest ")
    assert "--run-id" not in sent["entrypoint"]


@pytest.mark.parametrize("version", [2, 3])
def test_the_dag_of_an_ingestion(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with imported("airflow", version=version, of="ingest") as (module, kept):
        (_, _, dag), (kind, ingest, task) = kept
        assert dag["dag_id"] == "memedit-ingest" and dag["max_active_runs"] == 1
        assert kind == "task" and task["retries"] == 2
        fired = SimpleNamespace(logical_date=FIRED)
        ran: list[str] = []
        monkeypatch.setattr(module, "run", ran.append)
        ingest(dag_run=fired)
        assert ran == ["memedit-ingest-20261125T020000Z"]
        codes = ((1, module.RunFailedError), (2, FailError), (3, FailError), (4, SkipError))
        for code, error in (*codes, (None, module.RunFailedError)):
            monkeypatch.setattr(module, "run", failing(module, code))
            with pytest.raises(error, match="why"):
                ingest(dag_run=fired)


def test_the_dagster_job_of_an_ingestion(monkeypatch: pytest.MonkeyPatch) -> None:
    with imported("dagster", of="ingest") as (module, kept):
        declared = {kind: (function, given) for kind, function, given in kept}
        request = declared["schedule"][0](SimpleNamespace(scheduled_execution_time=FIRED))
        assert request.run_key == "memedit-ingest-20261125T020000Z"
        config = module.IngestConfig(**request.run_config["ops"]["ingest"]["config"])
        ingest = declared["op"][0]
        told: list[Any] = []
        context = SimpleNamespace(
            log=SimpleNamespace(info=print, warning=told.append), add_output_metadata=told.append
        )
        for code, again in ((1, True), (2, False), (3, False)):
            monkeypatch.setattr(module, "run", failing(module, code))
            with pytest.raises(FailError, match="why") as caught:
                ingest(context, config)
            assert caught.value.more == {"allow_retries": again}
        assert told == []
        # Another run holds the lock: the op ends well, and says so.
        monkeypatch.setattr(module, "run", failing(module, 4))
        ingest(context, config)
        assert told == ["skipped: why", {"skipped": "why"}]


def failing(module: Any, code: int | None) -> Any:
    def run(run_id: str, **more: Any) -> None:
        raise module.RunFailedError("why", code)

    return run
