"""What is sent to a cluster, and what is refused before anything is.

That a job runs there is in `tests/integration/test_submit.py`. Where a cluster must be one that
cannot be had here (another Ray, another Python, no Ray at all), a small HTTP server stands for it.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

import workflows.submit as submit_module
from cluster.ray_jobs import JobState
from memedit.errors import InputError
from tests.workflows.dashboards import (
    TOKEN,
    Dashboard,
    answers,
    cluster,
    dashboard,
    no_cluster_around,
)
from tests.workflows.runs import memedit
from workflows.arguments import arguments_of
from workflows.cli import cli
from workflows.ingestion.settings import IngestJob
from workflows.jobfile import JOBS, load_job
from workflows.settings import (
    EditJob,
    EvaluateJob,
    GenerateJob,
    Job,
    PlanJob,
    StatsJob,
)
from workflows.study_settings import TraceJob
from workflows.submit import (
    STOP_WAIT_S,
    Submission,
    Submitted,
    entrypoint_of,
    on_cluster,
    submit,
    submitted_defaults,
)
from workflows.tuning_settings import TuneJob
from workflows.version_settings import ApplyJob, VerifyJob

__all__ = ["cluster", "no_cluster_around"]
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


def edit(**more: Any) -> EditJob:
    return EditJob(facts="/f.jsonl", out="/o", run_id="night-1", **more)


# The job as arguments


JOBS_TO_SEND: list[Job] = [
    EditJob(facts="f.jsonl", out="s3://b/o", run_id="r"),
    EditJob(
        facts="/a folder/it's; $(rm).jsonl",
        registry="-r",
        model="./-m",
        layers=(5, 6, 9),
        gate=("score>=80", "drift_kl<1"),
        seed=3,
        dtype="bfloat16",
        on_bad_row="skip",
        format="lora",
        lora_rank=16,
        executor="ray",
        address="auto",
        workers=4,
        gpus_per_worker=0.5,
        debug=True,
        cache=Path("/c"),
        run_id="night-1",
        targets={"lr": 1e-5, "steps": 3, "tokens_per_batch": None},
        contexts={"sampled_tokens": 7},
        moments={"tokens": 10**6, "tolerance": 0.5},
        storage={"kms_key_id": "alias/é \"quoted\" 'so'", "storage_class": "INTELLIGENT_TIERING"},
        architecture={"blocks": "model.layers.{}", "yes": "no"},
    ),
    StatsJob(out="/s", corpus="text/*.parquet", layers=(1,)),
    TuneJob(
        facts="f",
        out="/o",
        run_id="r",
        trials=7,
        budget_s=90.5,
        search="lam,weight",
        gate=("perplexity<=base*1.1",),
        tuned={"when": "2026-11-29 12:00 UTC", "trials": 12, "corpus": "it's: self"},
    ),
    TraceJob(
        facts="f", out="/o", limit=3, trace={"noise": 2.5, "facts": "all"}, workers=2, run_id="r"
    ),
    EvaluateJob(facts="f", base="smollm2", text="self", out="/o", workers=3, run_id="r"),
    GenerateJob(prompts=("--model", "two\nlines", "Ünï 😀", "-"), tokens=3),
    PlanJob(facts="f", matrix_gflops=12.5, stats="/s"),
    ApplyJob(delta="-d", out="/o", run_id="r"),
    IngestJob(
        registry="s3://b/r",
        source={
            "kind": "iceberg",
            "table": "facts.all",
            "catalog": {"type": "rest", "uri": "https://host"},
            "where": "said = 'it''s' and \"so\"",
            "columns": {"target_new": "answer"},
            "templates": {"capital": ["The capital of {} is", "{}'s capital: $HOME"]},
        },
        hooks={
            "success": ["echo 'published' >> $HOME/log"],
            "failure": [
                {"url": "$ALARM", "headers": {"Authorization": "Bearer ${TOKEN}"}, "timeout_s": 5}
            ],
        },
        lineage={"url": "http://marquez:5000", "api_key_env": "MARQUEZ_KEY"},
        gate=("score>=80", "all.efficacy>=previous-2", "perplexity<=base*1.1"),
        priority=("erp", "wiki"),
        conflicts="priority",
        most_retracted=12.5,
        executor="ray",
        address="auto",
        targets={"steps": 3},
        run_id="r",
    ),
]


@pytest.mark.parametrize("job", JOBS_TO_SEND, ids=lambda job: type(job).__name__)
def test_the_arguments_give_the_same_job(job: Job) -> None:
    """Through a shell, the command line and all checks."""
    command, *arguments = shlex.split(shlex.join(arguments_of(job)))
    context = cli.commands[command].make_context(command, arguments)
    assert not context.params["config"]
    flags = {k: v for k, v in context.params.items() if k not in ("config", "assignments")}
    again = load_job(type(job), flags=flags, assignments=context.params["assignments"])
    assert again == job


def test_what_runs_a_model_can_be_submitted() -> None:
    group = cli.commands["submit"]
    assert isinstance(group, click.Group)
    assert group.commands.keys() == {
        *("edit", "stats", "evaluate", "compare", "tune", "trace"),
        *("generate", "plan", "apply", "ingest"),
    }
    with pytest.raises(InputError, match="verify is not run on a cluster"):
        submit(VerifyJob(version="v"), address="http://127.0.0.1:1")


def test_a_submitted_job_is_spread_unless_it_says_otherwise() -> None:
    least = {"facts": "/f", "out": "/o"}
    spread = load_job(EditJob, flags=least, defaults=submitted_defaults(EditJob))
    assert (spread.executor, spread.address) == ("ray", "auto")
    assert "--executor=ray --address=auto" in entrypoint_of(spread)
    flags = {**least, "executor": "inline"}
    alone = load_job(EditJob, flags=flags, defaults=submitted_defaults(EditJob))
    assert alone.executor == "inline" and "--executor" not in entrypoint_of(alone)
    assert submitted_defaults(EvaluateJob) == submitted_defaults(EditJob)
    assert submitted_defaults(GenerateJob) == {}


def test_the_run_speaks_json_unless_it_says_otherwise() -> None:
    assert "--json --log-format=json" in entrypoint_of(edit())
    assert "--json --log-format=plain" in entrypoint_of(edit(log_format="plain"))


def test_paths_are_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    here = str(tmp_path)
    job, paths = on_cluster(
        EditJob(
            facts="f.jsonl",
            out="s3://b/o",
            model="some/model",
            corpus="texts/*.txt",
            stats="../s",
            cache=Path("c"),
        )
    )
    assert isinstance(job, EditJob)
    assert paths == {
        "facts": f"{here}/f.jsonl",
        "corpus": f"{here}/texts/*.txt",
        "stats": str(tmp_path.parent / "s"),
        "cache": f"{here}/c",
    }
    assert job.facts == paths["facts"] and job.cache == Path(paths["cache"])
    assert (job.model, job.out) == ("some/model", "s3://b/o")
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert on_cluster(EditJob(facts="f", model="some/model"))[1]["model"] == f"{here}/some/model"


def test_paths_in_the_sections_of_an_ingestion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = {"path": "inbox/*.jsonl", "templates": "t.yaml", "name": "./inbox"}
    job, paths = on_cluster(
        IngestJob(registry="r", source=source, lineage={"file": "events.jsonl"}, canary="c.jsonl")
    )
    assert isinstance(job, IngestJob)
    here = str(tmp_path)
    assert paths == {
        "registry": f"{here}/r",
        "canary": f"{here}/c.jsonl",
        "source.path": f"{here}/inbox/*.jsonl",
        "source.templates": f"{here}/t.yaml",
        "lineage.file": f"{here}/events.jsonl",
    }
    assert job.source == {
        "path": paths["source.path"],
        "templates": paths["source.templates"],
        "name": "./inbox",
    }
    assert job.lineage == {"file": paths["lineage.file"]} and source["templates"] == "t.yaml"
    for catalog, path in (("nightly", None), ("c.db", f"{here}/c.db"), ({"uri": "x"}, None)):
        source = {"kind": "iceberg", "table": "a.b", "catalog": catalog}
        job, paths = on_cluster(IngestJob(registry="s3://b/r", source=source))
        assert paths == ({} if path is None else {"source.catalog": path})


# What is sent


def test_what_is_sent(cluster: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    done = submit(edit(executor="ray", address="auto"), address=f"{cluster.address}/")
    assert done.submitted and done.same_job and done.run_id == "night-1"
    assert done.paths == {"facts": "/f.jsonl", "out": "/o"}
    ((_, sent, headers),) = [r for r in cluster.requests if r[0] == "POST /api/jobs/"]
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert sent["submission_id"] == "night-1"
    assert sent["entrypoint"] == done.entrypoint
    assert shlex.split(done.entrypoint)[:3] == ["exec", "memedit", "edit"]
    assert sent["metadata"].keys() == {"memedit", "digest"}
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    told = json.dumps([body for _, body, _ in cluster.requests])
    assert SECRET not in told and TOKEN not in told


def test_the_runtime_environment_is_passed_on(cluster: Dashboard, tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("pip: [memedit]\nenv_vars: {RAY_JOB_STOP_WAIT_TIME_S: '7', X: y}\n")
    flags = ["--address", cluster.address, "--runtime-env", file, "--driver-gpus", 1]
    ran = memedit("submit", *flags, "edit", "--facts", "/f", "--out", "/o", "--json",
                  "--run-id", "night-1")  # fmt: skip
    assert ran.result["run_id"] == "night-1" and ran.result["submitted"]
    ((_, sent, _),) = [r for r in cluster.requests if r[0] == "POST /api/jobs/"]
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "7", "X": "y"}
    assert "memedit" in json.dumps(sent["runtime_env"]["pip"])
    assert sent["entrypoint_num_gpus"] == 1


def test_a_job_file_is_not_needed_there(cluster: Dashboard, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("facts: f.jsonl\nout: o\nrun_id: night-1\ntargets: {steps: 5}\n")
    more = ("--config", config, "--set", "targets.lr=0.1", "--json")
    ran = memedit("submit", "--address", cluster.address, "edit", *more)
    words = shlex.split(ran.result["entrypoint"])
    assert f"--facts={tmp_path}/f.jsonl" in words and f"--out={tmp_path}/o" in words
    assert "--set=targets.steps=5" in words and "--set=targets.lr=0.1" in words
    assert not any(word.startswith("--config") for word in words)
    assert str(tmp_path / "f.jsonl") in ran.stderr  # where the paths are is said


def test_an_ingestion_is_sent(cluster: Dashboard, tmp_path: Path) -> None:
    config = tmp_path / "ingest.yaml"
    config.write_text(
        "registry: s3://models/m\nsource: {kind: files, path: 'inbox/*.jsonl'}\n"
        "edit: {targets: {steps: 5}}\ngates: ['score>=80']\nrun_id: night-1\n"
        "hooks: {success: ['echo $HOME']}\n"
    )
    more = ("--config", config, "--set", "source.complete=true", "--json")
    ran = memedit("submit", "--address", cluster.address, "ingest", *more)
    assert ran.result["paths"] == {"source.path": f"{tmp_path}/inbox/*.jsonl"}
    ((_, sent, _),) = [r for r in cluster.requests if r[0] == "POST /api/jobs/"]
    assert sent["metadata"]["memedit"] == "ingest"
    start, program, command, *arguments = shlex.split(sent["entrypoint"])
    assert (start, program, command) == ("exec", "memedit", "ingest")
    context = cli.commands[command].make_context(command, arguments)
    flags = {k: v for k, v in context.params.items() if k not in ("config", "assignments")}
    found = load_job(IngestJob, flags=flags, assignments=context.params["assignments"])
    assert found == load_job(
        IngestJob,
        config=config,
        flags={"executor": "ray", "address": "auto", "json": True, "log_format": "json"},
        assignments=["source.complete=true"],
    )
    ran = memedit("submit", "--upload", "--address", cluster.address, "ingest", *more)
    assert ran.code == 2 and ran.error["field"] == "upload"


def test_the_fact_table_can_be_sent_along(cluster: Dashboard, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text("{}\n")
    there = {"GET", "PUT"}
    for_packages = _Anything(cluster.answers, there)
    cluster.answers = for_packages
    done = submit(
        EditJob(facts=str(facts), out="/o", run_id="night-1"), address=cluster.address, upload=True
    )
    assert "--facts=facts.jsonl" in done.entrypoint and "facts" not in done.paths
    ((_, sent, _),) = [r for r in cluster.requests if r[0] == "POST /api/jobs/"]
    assert sent["runtime_env"]["working_dir"].startswith("gcs://")


class _Anything(dict[str, tuple[int, Any]]):
    """Has every package already."""

    def __init__(self, known: dict[str, tuple[int, Any]], methods: set[str]) -> None:
        super().__init__(known)
        self.methods = methods

    def get(self, key: str, default: Any = None) -> Any:
        method, path = key.split()
        if method in self.methods and path.startswith("/api/packages/"):
            return (200, "")
        return super().get(key, default)


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (EditJob(facts="/none/f.jsonl", out="/o"), "facts"),
        (EditJob(facts="/", out="/o"), "facts"),
        (EditJob(facts="s3://b/f", out="/o"), "upload"),
        (StatsJob(out="/o"), "upload"),
    ],
)
def test_nothing_to_send_along(cluster: Dashboard, job: Job, field: str) -> None:
    with pytest.raises(InputError) as wrong:
        submit(job, address=cluster.address, upload=True)
    assert wrong.value.field == field
    assert not cluster.requests


def test_a_run_id_that_is_taken(cluster: Dashboard) -> None:
    """Not an error; but another job under this name is told."""
    cluster.answers["POST /api/jobs/"] = (
        500,
        "Traceback ...\nValueError: Job with submission_id night-1 already exists. Please use a"
        " different submission_id.\n",
    )
    flags = ["--facts", "/f", "--out", "/o", "--run-id", "night-1", "--json"]
    ran = memedit("submit", "--address", cluster.address, "edit", *flags)
    assert ran.result["submitted"] is False and ran.result["same_job"] is False
    assert ran.result["state"] == "RUNNING"
    assert "other settings" in ran.stderr
    shown = memedit("submit", "--address", cluster.address, "edit", *flags[:-1])
    assert "was submitted before" in shown.stdout and "RUNNING" in shown.stdout


# What is refused


@pytest.mark.parametrize(
    "flags",
    [
        ["edit", "--facts", "/f"],
        ["edit", "--facts", "/f", "--out", "/o", "--dtype", "float8"],
        ["edit", "--facts", "/f", "--out", "/o", "--set", "targets.stepz=3"],
        ["edit", "--facts", "/f", "--out", "/o", "--config", "none.yaml"],
        ["edit", "--facts", "/f", "--out", "/o", "--nothing"],
        ["edit", "--facts", "/f", "--out", "/o", "--run-id", "a b; rm"],
        ["edit", "--facts", "s3://key:secret@b/f", "--out", "/o"],
        ["--runtime-env", "none.yaml", "edit", "--facts", "/f", "--out", "/o"],
        ["--driver-gpus", "-1", "edit", "--facts", "/f", "--out", "/o"],
        ["verify", "/v"],
        ["stats"],
    ],
)
def test_what_is_wrong_is_refused_here(cluster: Dashboard, flags: list[str]) -> None:
    ran = memedit("submit", "--address", cluster.address, *flags, "--json")
    assert ran.code == 2 and ran.error["exit_code"] == 2
    assert "secret" not in ran.stdout + ran.stderr
    assert not cluster.requests


@pytest.mark.parametrize("text", ["[a list]", "no mapping", "{", "env_vars: [X]", "1: 2"])
def test_a_runtime_environment_that_is_none(cluster: Dashboard, tmp_path: Path, text: str) -> None:
    (tmp_path / "env.yaml").write_text(text)
    flags = ["--address", cluster.address, "--runtime-env", tmp_path / "env.yaml"]
    ran = memedit("submit", *flags, "edit", "--facts", "/f", "--out", "/o", "--json")
    assert ran.code == 2 and ran.error["field"] == "runtime_env"
    assert not cluster.requests


@pytest.mark.parametrize("text", ["no_such_thing: 1\npip: 3", "working_dir: /none/at/all"])
def test_a_runtime_environment_that_ray_refuses(
    cluster: Dashboard, tmp_path: Path, text: str
) -> None:
    (tmp_path / "env.yaml").write_text(text)
    flags = ["--address", cluster.address, "--runtime-env", tmp_path / "env.yaml"]
    ran = memedit("submit", *flags, "edit", "--facts", "/f", "--out", "/o", "--json")
    assert ran.code == 2 and ran.error["field"] == "runtime_env"
    assert not [r for r in cluster.requests if r[0] == "POST /api/jobs/"]


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        (None, "RAY_API_SERVER_ADDRESS"),
        ("auto", "http://HOST:PORT"),
        ("127.0.0.1:8265", "http://HOST:PORT"),
        ("ray://head:10001", "http://HOST:PORT"),
        ("http://head:port", "http://HOST:PORT"),
        ("http://", "http://HOST:PORT"),
        ("http://user:secret@head:8265", "RAY_AUTH_TOKEN"),
        ("http://127.0.0.1:1", "Connection refused"),
        ("http://no.such.host.invalid:8265", "no.such.host.invalid"),
    ],
)
def test_addresses_that_are_none(address: str | None, hint: str) -> None:
    flags = ["--address", address] if address else []
    for command in (
        ["submit", *flags, "edit", "--facts", "/f", "--out", "/o"],
        ["status", *flags],
        ["logs", "r", *flags],
        ["stop", "r", *flags],
    ):
        ran = memedit(*command, "--json")
        assert ran.code == 2 and ran.error["field"] == "address"
        assert hint in ran.error["message"] and "secret" not in ran.error["message"]
        assert "Traceback" not in ran.stderr


def test_the_address_of_the_environment(
    cluster: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is taken where none is given, and loses against one that is."""
    cluster.answers["GET /api/jobs/"] = (200, [])
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, cluster.address)
            assert memedit("status", "--json").result["runs"] == []
            patch.setenv(name, "http://127.0.0.1:1")
            given = memedit("status", "--json", "--address", cluster.address)
            assert given.result["address"] == cluster.address
            assert os.environ[name] == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("changed", "hint"),
    [
        ({"ray": "2.41.0"}, "has Ray 2.41.0"),
        ({"python": "3.9.1"}, "has Python 3.9.1"),
    ],
)
def test_other_versions(changed: dict[str, str], hint: str) -> None:
    with dashboard(answers(**changed)) as other, pytest.raises(InputError, match=hint):
        submit(edit(), address=other.address)
    assert not [r for r in other.requests if r[0] == "POST /api/jobs/"]


def test_a_dashboard_that_does_not_tell_its_python(cluster: Dashboard) -> None:
    del cluster.answers["GET /api/v0/cluster_metadata"]
    assert submit(edit(), address=cluster.address).submitted


@pytest.mark.parametrize(
    "told", [(200, "<html>hello</html>"), (200, {"version": "1"}), (404, "no"), (502, "gateway")]
)
def test_what_is_not_ray(told: tuple[int, Any]) -> None:
    with dashboard({"GET /api/version": told}) as other:
        ran = memedit("status", "--address", other.address, "--json")
    assert ran.code == 2 and "not Ray's dashboard" in ran.error["message"]


@pytest.mark.parametrize(("code", "hint"), [(401, "no token"), (403, "wrong token")])
def test_a_token_that_is_asked_for(code: int, hint: str) -> None:
    with dashboard({"GET /api/version": (code, "Unauthorized")}) as other:
        ran = memedit("status", "--address", other.address, "--json")
    assert ran.code == 2 and hint in ran.error["message"]
    assert "RAY_AUTH_TOKEN_PATH" in ran.error["message"]


@pytest.mark.parametrize("where", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home", "argument"])
def test_where_a_token_comes_from(
    cluster: Dashboard, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    if where == "RAY_AUTH_TOKEN":
        monkeypatch.setenv(where, TOKEN)
    elif where != "argument":
        file.write_text(f"{TOKEN}\n")
        if where == "RAY_AUTH_TOKEN_PATH":
            monkeypatch.setenv(where, str(file))
    submit(edit(), address=cluster.address, token=TOKEN if where == "argument" else None)
    assert {h.get("Authorization") for _, _, h in cluster.requests} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe", "two\nlines"])
def test_a_token_file_that_holds_none(
    cluster: Dashboard, content: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    ran = memedit("status", "--address", cluster.address, "--json")
    assert ran.code == 2 and "token" in ran.error["message"]
    assert not cluster.requests


# What became of it


@pytest.mark.parametrize(
    ("state", "told", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 1),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
    ],
)
def test_the_exit_code_is_the_jobs_own(state: str, told: int | None, code: int) -> None:
    ended = Submitted(
        submission=Submission(run_id="r", jobs=None),  # type: ignore[arg-type]
        state=JobState(
            run_id="r",
            command="edit",
            state=state,
            started=None,
            ended=None,
            message="",
            exit_code=told,
            digest=None,
        ),
    )
    assert ended.exit_code == code


def test_why_a_run_failed_is_said_in_its_own_words(cluster: Dashboard) -> None:
    error = json.dumps({"error": {"message": "[layers]: no such layer", "exit_code": 2}})
    details = cluster.answers["GET /api/jobs/night-1"][1]
    details |= {"status": "FAILED", "driver_exit_code": 2, "end_time": 1_764_000_060_000}
    details["message"] = f"Job entrypoint command failed with exit code 2\n{error}\n{{}}"
    ran = memedit("status", "night-1", "--address", cluster.address, "--json")
    assert ran.result["message"] == "failed with exit code 2: [layers]: no such layer"
    shown = memedit("status", "night-1", "--address", cluster.address)
    assert "1 min 00 s" in shown.stdout and "no such layer" in shown.stdout
    details |= {"driver_exit_code": 127}
    ran = memedit("status", "night-1", "--address", cluster.address, "--json")
    assert "no command memedit on the cluster" in ran.result["message"]


def test_why_a_run_did_not_begin_is_no_traceback(cluster: Dashboard) -> None:
    details = cluster.answers["GET /api/jobs/night-1"][1]
    details |= {"status": "FAILED", "driver_exit_code": None}
    details["message"] = "runtime_env setup failed:\nTraceback (most recent call last):\n  x\nE: y"
    ran = memedit("status", "night-1", "--address", cluster.address, "--json")
    assert ran.result["message"] == "runtime_env setup failed: E: y"


def test_a_run_that_is_not_known(cluster: Dashboard) -> None:
    for command in ("status", "logs", "stop"):
        ran = memedit(command, "no-such", "--address", cluster.address, "--json")
        assert ran.code == 2 and "knows no run 'no-such'" in ran.error["message"]


def test_only_runs_of_memedit_are_listed(cluster: Dashboard) -> None:
    ours = cluster.answers["GET /api/jobs/night-1"][1]
    other = {**ours, "submission_id": "other", "metadata": {}}
    older = {**ours, "submission_id": "20261125T125953Z-5235", "driver_exit_code": 0}
    older |= {"start_time": 1_763_900_000_000, "status": "SUCCEEDED", "end_time": 1_763_900_123_000}
    cluster.answers["GET /api/jobs/"] = (200, [older, other, ours])
    ran = memedit("status", "--address", cluster.address, "--json")
    assert [run["run_id"] for run in ran.result["runs"]] == ["night-1", older["submission_id"]]
    shown = memedit("status", "--address", cluster.address).stdout
    assert "SUCCEEDED (0)" in shown and "2 min 03 s" in shown and "other" not in shown


def test_the_commands_are_there() -> None:
    assert {"status", "logs", "stop"} <= JOBS.keys()


def test_what_is_sent_along_makes_another_job(tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text("1")
    same = submit_module._digest("memedit edit", {"a": 1, "b": 2}, facts)
    assert submit_module._digest("memedit edit", {"b": 2, "a": 1}, facts) == same
    facts.write_text("2")
    others = {
        submit_module._digest("memedit edit", {"a": 1, "b": 2}, facts),
        submit_module._digest("memedit edit", {"a": 1}, facts),
        submit_module._digest("memedit stats", {"a": 1}, facts),
        submit_module._digest("memedit stats", {"a": 1}, None),
    }
    assert len(others | {same}) == 5
