"""`memedit render` of an ingestion: in one pod, on Ray, for Airflow and Dagster."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

import workflows.render_entry as render_entry
from tests.workflows.kube_schemas import METADATA, errors_of, validator_of
from tests.workflows.rendered import FULL, KINDS, NIGHTLY, made, ray_job, render
from tests.workflows.runs import memedit
from workflows.cli import cli
from workflows.ingestion.settings import IngestJob
from workflows.jobfile import load_job
from workflows.render import Source
from workflows.settings import EditJob

JOB = """\
model: s3://models/pythia
registry: s3://models/capitals
source:
  kind: iceberg
  table: facts.capitals
  catalog: nightly
  columns: {target_new: answer}
  templates: {capital: ["The capital of {} is", "{}'s capital is"]}
edit: {layers: 5-9, targets: {lr: 1e-1, steps: 15}}
gates: ["score>=80", "all.efficacy>=previous-2"]
most_retracted: 20
hooks:
  failure:
    - {url: $ALARM_URL, headers: {Authorization: "Bearer ${ALARM_TOKEN}"}}
    - "logger 'the ingestion failed'"
lineage: {url: "http://marquez:5000", api_key_env: MARQUEZ_KEY}
"""
FILES = """\
registry: s3://models/capitals
source: {kind: files, path: "s3://facts/*.jsonl"}
"""
SCHEDULERS = ("kubernetes", "airflow", "dagster")
FLAGS = {"log_format": "json", "json": True}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "ingest.yaml"
    path.write_text(JOB)
    return path


@pytest.fixture(scope="module")
def crds(shared_data: Path) -> Path:
    folder = shared_data / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip(f"no schemas at {folder}")
    return folder


def test_a_section_source_tells_an_ingestion(job: Path) -> None:
    assert Source.read(job).command == "ingest"
    job.write_text("facts: s3://f\nregistry: s3://r\n")
    source = Source.read(job)
    assert source.command == "edit" and isinstance(source.job, EditJob)
    assert Source.read(job, assignments=["source.path=s3://facts/*.csv"]).command == "ingest"


# In one pod


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
JOB_SPEC = closed(
    {
        "backoffLimit": COUNT,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "podFailurePolicy": closed(
            {
                "rules": {
                    "type": "array",
                    "maxItems": 20,
                    "items": closed(
                        {
                            "action": {"enum": ["FailJob", "Ignore", "Count"]},
                            "onExitCodes": closed(
                                {
                                    "containerName": TEXT,
                                    "operator": {"enum": ["In", "NotIn"]},
                                    "values": {
                                        "type": "array",
                                        "minItems": 1,
                                        "maxItems": 255,
                                        "uniqueItems": True,
                                        "items": {"type": "integer", "minimum": 1},
                                    },
                                },
                                *("operator", "values"),
                            ),
                            "onPodConditions": {
                                "type": "array",
                                "maxItems": 20,
                                "items": closed(
                                    {"type": TEXT, "status": {"enum": ["True", "False"]}},
                                    *("type", "status"),
                                ),
                            },
                        },
                        "action",
                    ),
                }
            },
            "rules",
        ),
        # Checked against KubeRay's schema of a pod. A policy asks for this restartPolicy.
        "template": closed(
            {
                "spec": {
                    "type": "object",
                    "properties": {"restartPolicy": {"const": "Never"}},
                    "required": ["restartPolicy", "containers"],
                }
            },
            "spec",
        ),
    },
    "template",
)
"""Of batch/v1, by hand: the fields of Kubernetes' reference that are used here, no others."""
CRON_SPEC = closed(
    {
        "schedule": {"type": "string", "minLength": 9},
        "timeZone": TEXT,
        "concurrencyPolicy": {"enum": ["Allow", "Forbid", "Replace"]},
        "startingDeadlineSeconds": COUNT,
        "successfulJobsHistoryLimit": COUNT,
        "failedJobsHistoryLimit": COUNT,
        "jobTemplate": closed(
            {
                "metadata": closed(
                    {"labels": {"type": "object", "additionalProperties": TEXT}}, "labels"
                ),
                "spec": JOB_SPEC,
            },
            "spec",
        ),
    },
    *("schedule", "jobTemplate"),
)


def batch(kind: str) -> Draft202012Validator:
    """The validator of a Job or a CronJob."""
    spec = CRON_SPEC if kind == "CronJob" else JOB_SPEC
    properties = {
        "apiVersion": {"const": "batch/v1"},
        "kind": {"const": kind},
        "metadata": METADATA,
        "spec": spec,
    }
    return Draft202012Validator(closed(properties, *properties))


def job_of(manifests: dict[str, Any]) -> dict[str, Any]:
    """The spec of the Job, on a schedule or not."""
    if "Job" in manifests:
        found: dict[str, Any] = manifests["Job"]["spec"]
        return found
    template: dict[str, Any] = manifests["CronJob"]["spec"]["jobTemplate"]
    return template["spec"]


PLACED = (
    *("--secret", "keys", "--volume-claim", "data", "--head-gpus", 1, "--queue", "night"),
    *("--node-selector", "pool=edits", "--toleration", "spot", "--priority-class", "nightly"),
    *("--image-pull-secret", "registry", "--service-account", "reader", "--retries", 3),
)


@pytest.mark.parametrize("placed", [(), PLACED], ids=["plain", "full"])
@pytest.mark.parametrize("when", [(), NIGHTLY], ids=["once", "nightly"])
def test_kubernetes_takes_one_pod(
    when: tuple[str, ...], placed: tuple[object, ...], job: Path, crds: Path
) -> None:
    manifests = made(job, *when, *placed)
    kind = "CronJob" if when else "Job"
    assert manifests.keys() == {"ConfigMap", kind}
    assert errors_of(batch(kind), manifests[kind]) == []
    whole = validator_of(crds, "rayjobs").schema
    pod = whole["properties"]["spec"]["properties"]["submitterPodTemplate"]
    assert errors_of(Draft202012Validator(pod), job_of(manifests)["template"]) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("backofLimit", 1), ("podFailurePolicy", {"rules": [{"action": "Fail"}]}), ("template", {})],
)
def test_the_schema_refuses_what_is_wrong(name: str, value: object, job: Path) -> None:
    """Otherwise the test above would say little."""
    manifests = made(job, *NIGHTLY)
    job_of(manifests)[name] = value
    assert errors_of(batch("CronJob"), manifests["CronJob"])


def test_one_pod_is_what_was_asked_for(job: Path) -> None:
    flags = ("--head-cpus", 8, "--head-memory", "64Gi", "--head-gpus", 1)
    manifests = made(job, *NIGHTLY, *PLACED, *flags)
    schedule = manifests["CronJob"]["spec"]
    assert (schedule["schedule"], schedule["timeZone"]) == ("0 2 * * *", "Etc/UTC")
    assert schedule["concurrencyPolicy"] == "Forbid"
    # Kueue looks at the Job.
    labels = schedule["jobTemplate"]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "night"
    assert made(job, *PLACED)["Job"]["metadata"]["labels"] == labels
    pod = job_of(manifests)["template"]["spec"]
    (container,) = pod["containers"]
    limits = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert container["resources"] == {"requests": limits, "limits": limits}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert pod["restartPolicy"] == "Never" and pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["serviceAccountName"] == "reader" and pod["nodeSelector"] == {"pool": "edits"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in (
        pod["tolerations"]
    )


def test_what_is_tried_again(job: Path) -> None:
    """Wrong input and a gate are not; a pod that was evicted is, and does not count."""
    spec = job_of(made(job, *NIGHTLY, "--retries", 3))
    assert spec["backoffLimit"] == 3
    evicted, final = spec["podFailurePolicy"]["rules"]
    assert evicted["action"] == "Ignore"
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert final["action"] == "FailJob" and final["onExitCodes"]["values"] == [2, 3]
    (container,) = spec["template"]["spec"]["containers"]
    assert final["onExitCodes"]["containerName"] == container["name"]


def test_how_long_one_pod_may_take(job: Path) -> None:
    flags = ("--start-within-s", 600, "--deadline-s", 7200)
    assert job_of(made(job, *NIGHTLY, *flags))["activeDeadlineSeconds"] == 7800
    assert job_of(made(job, *NIGHTLY))["activeDeadlineSeconds"] == 90000
    assert "activeDeadlineSeconds" not in job_of(made(job))
    assert "activeDeadlineSeconds" not in job_of(made(job, *NIGHTLY, "--deadline-s", 0))


def test_one_pod_runs_the_job_of_the_file(job: Path, tmp_path: Path) -> None:
    manifests = made(job, *NIGHTLY)
    (container,) = job_of(manifests)["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "workflows.render_entry"]
    assert "--run-id" not in container["args"]
    assert read(manifests, container["args"], tmp_path) == load_job(
        IngestJob, config=job, flags=FLAGS
    )
    once = made(job, "--set", "run_id=Night_1")
    (container,) = job_of(once)["template"]["spec"]["containers"]
    assert container["args"][-2:] == ["--run-id", "Night_1"]


def read(manifests: dict[str, Any], arguments: list[str], folder: Path) -> IngestJob:
    """The job that the command itself reads of the mounted file and these arguments."""
    mounted = folder / "mounted.yaml"
    mounted.write_text(manifests["ConfigMap"]["data"]["job.yaml"])
    command, *rest = arguments
    context = cli.commands[command].make_context(command, rest)
    assert str(context.params.pop("config")) == "/etc/memedit/job.yaml"
    assignments = context.params.pop("assignments")
    return load_job(IngestJob, config=mounted, flags=context.params, assignments=assignments)


def test_nested_sections_are_in_the_job_file(job: Path) -> None:
    more = ("--set", "source.where=year > 2020", "--set", "targets.steps=3")
    content = yaml.safe_load(made(job, *more)["ConfigMap"]["data"]["job.yaml"])
    written = yaml.safe_load(JOB)
    assert content["source"] == {**written["source"], "where": "year > 2020"}
    assert content["hooks"] == written["hooks"] and content["lineage"] == written["lineage"]
    assert content["gate"] == written["gates"] and content["targets"] == {"lr": 0.1, "steps": 3}


def test_names_of_one_pod(job: Path) -> None:
    """Kubernetes allows a CronJob 52 characters, a Job 63."""
    for when, longest in ((NIGHTLY, 52), ((), 63)):
        assert made(job, *when, "--name", "n" * longest)
        ran = render(job, *when, "--name", "n" * (longest + 1), "--json")
        assert ran.code == 2 and ran.error["field"] == "name"


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--head-memory", "much"), "head_memory"),
        (("--image", "two words"), "image"),
        (("--namespace", "My Models"), "namespace"),
        (("--secret", "A=b"), "secret"),
        (("--toleration", "=edits"), "toleration"),
        ((*NIGHTLY, "--set", "run_id=night-1"), "run_id"),
        (("--set", "source.tabel=x"), "source.tabel"),
        (("--set", "hooks.sucess=[x]"), "hooks.sucess"),
        (("--set", "facts=x"), "facts"),
    ],
)
def test_settings_that_are_wrong(flags: tuple[str, ...], field: str, job: Path) -> None:
    ran = render(job, *flags, "--json")
    assert ran.code == 2, ran.stdout
    assert ran.error["field"] == field or field in str(ran.error)


def test_one_pod_needs_no_ray_here(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.51.0")
    assert made(job)["Job"]
    assert render(job, "--workers", 2, "--json").error["field"] == "ray_version"


@pytest.mark.parametrize(("code", "told"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 0)])
def test_another_run_at_work_is_no_failure(
    code: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_entry, "run", lambda arguments: code)
    assert render_entry.main(["ingest"]) == told


def test_the_entry_is_memedit() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "workflows.render_entry", "ingest", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2 and "registry" in ran.stdout


# On Ray


SPREAD: tuple[tuple[object, ...], ...] = (
    ("--set", "executor=ray"),
    ("--workers", 3),
    ("--gpus-per-worker", 0.5),
    ("--kind", "rayjob"),
)


@pytest.mark.parametrize("spread", SPREAD, ids=str)
def test_what_asks_for_workers_gets_a_ray_cluster(
    spread: tuple[object, ...], job: Path, tmp_path: Path
) -> None:
    manifests = made(job, *spread)
    assert manifests.keys() == {"ConfigMap", "RayJob"}
    run = manifests["RayJob"]
    assert run["spec"]["metadata"] == {"memedit": "ingest"}
    assert run["spec"]["jobId"] == run["metadata"]["name"] == "memedit-ingest"
    assert "--run-id" not in run["spec"]["entrypoint"]
    words = shlex.split(run["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "workflows.render_entry"]
    found = read(manifests, words[3:], tmp_path)
    flags = {"executor": "ray", "address": "auto", "workers": found.workers}
    flags |= {"gpus_per_worker": found.gpus_per_worker}
    assert found == load_job(IngestJob, config=job, flags=FLAGS | flags)


@pytest.mark.parametrize("flags", [(), FULL], ids=["plain", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_kuberay_takes_it(kind: str, flags: tuple[object, ...], job: Path, crds: Path) -> None:
    manifests = made(job, "--set", "executor=ray", *KINDS[kind], *flags)
    assert errors_of(validator_of(crds, "rayjobs"), ray_job(manifests)) == []
    if kind == "raycronjob":
        assert errors_of(validator_of(crds, "raycronjobs"), manifests["RayCronJob"]) == []
    assert "--run-id" not in ray_job(manifests)["spec"]["entrypoint"]


# What cannot be


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("name", "value"), [("every", "0 2 * * *"), ("every", "@daily"), ("dry_run", "true")]
)
def test_what_a_scheduler_does_itself(scheduler: str, name: str, value: str, job: Path) -> None:
    job.write_text(f"{JOB}{name}: {value if value == 'true' else repr(value)}\n")
    ran = memedit("render", scheduler, "--config", job, *NIGHTLY, "--json")
    assert ran.code == 2 and ran.error["field"] == name
    assert ran.error["source"] == str(job)


PLACES = (
    ("source.path", "source: {kind: files, path: 'inbox/*.jsonl'}", "inbox/*.jsonl"),
    ("source.path", "source: {kind: delta, path: ../facts}", "../facts"),
    ("source.templates", "source: {path: 's3://f/*', templates: t.yaml}", "t.yaml"),
    ("source.catalog", "source: {kind: iceberg, table: a.b, catalog: cat.db}", "cat.db"),
    ("lineage.file", "lineage: {file: events.jsonl}", "events.jsonl"),
    ("canary", "canary: canary.jsonl", "canary.jsonl"),
    ("stats", "edit: {stats: ../stats}", "../stats"),
)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("field", "line", "written"), PLACES)
def test_paths_that_are_relative(
    scheduler: str, field: str, line: str, written: str, job: Path
) -> None:
    content = {**yaml.safe_load(FILES), **yaml.safe_load(line)}
    job.write_text(yaml.safe_dump(content))
    ran = memedit("render", scheduler, "--config", job, *NIGHTLY, "--json")
    assert ran.code == 2 and ran.error["field"] == field
    assert f"{written} is relative" in ran.error["message"]


def test_places_of_an_ingestion_in_a_pod(job: Path) -> None:
    job.write_text(FILES)
    claim = ("--volume-claim", "data", "--in-image", "/opt/facts", "--json")
    for setting, code in (
        ("source.path=/data/inbox/*.jsonl", 0),
        ("source.path=/mnt/inbox/*.jsonl", 2),
        ("source.path=/opt/facts/*.jsonl", 0),
        ("lineage.file=/data/events.jsonl", 0),
        ("lineage.file=/opt/facts/events.jsonl", 2),  # it is written to
        ("lineage.file=events.jsonl", 2),
        ("source.path=inbox/*.jsonl", 2),
    ):
        assert render(job, *claim, "--set", setting).code == code, setting
    archived = ("--set", "source.path=/opt/facts/*.jsonl", "--set", "source.after=archive")
    assert render(job, *claim, *archived).error["field"] == "source.path"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_keys_are_never_rendered(scheduler: str, job: Path) -> None:
    secret = "wJalrXUtnFEMI"
    for catalog in (
        f"{{uri: 'postgresql://me:{secret}@host/c'}}",
        f"{{uri: 'https://host', token: {secret}}}",
        f"{{uri: 'https://host', s3.secret-access-key: {secret}}}",
        f"{{uri: 'https://host', header.Authorization: {secret}}}",
        f"{{uri: 'https://host', adls.account-key: {secret}}}",
        f"{{uri: 'https://host', rest.auth.value: {secret}}}",
        f"{{uri: 'postgresql://host/c?user=me&password={secret}'}}",
        f"{{uri: 'postgresql://:{secret}@host/c'}}",
    ):
        job.write_text(JOB.replace("catalog: nightly", f"catalog: {catalog}"))
        ran = memedit("render", scheduler, "--config", job, *NIGHTLY, "--json")
        assert ran.code == 2 and "keys" in ran.error["message"]
        assert secret not in ran.stdout + ran.stderr


# What is told


def test_the_variables_that_a_job_names(job: Path) -> None:
    told = render(job, *NIGHTLY).stderr
    assert "ALARM_TOKEN, ALARM_URL, MARQUEZ_KEY" in told and "--secret" in told
    assert "ALARM" not in render(job, *NIGHTLY, "--secret", "keys").stderr
    told = memedit("render", "airflow", "--config", job, *NIGHTLY).stderr
    assert "ALARM_TOKEN, ALARM_URL, MARQUEZ_KEY" in told and "cluster" in told


def test_finished_work_lies_in_the_registry(job: Path) -> None:
    """In s3:// it is kept without a volume."""
    assert "--volume-claim" not in render(job).stderr


def test_the_time_zone_of_the_job_file(job: Path) -> None:
    job.write_text(f"{JOB}time_zone: Europe/Berlin\n")
    manifests = made(job, *NIGHTLY)
    assert manifests["CronJob"]["spec"]["timeZone"] == "Europe/Berlin"
    assert "time_zone" not in manifests["ConfigMap"]["data"]["job.yaml"]
    other = made(job, *NIGHTLY, "--time-zone", "Asia/Tokyo")
    assert other["CronJob"]["spec"]["timeZone"] == "Asia/Tokyo"
