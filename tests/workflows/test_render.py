"""`memedit render kubernetes`: held against KubeRay's own schemas, and what is refused."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.workflows.kube_schemas import errors_of, strict, validator_of
from tests.workflows.rendered import FULL, JOB, KINDS, NIGHTLY, made, ray_job, render
from tests.workflows.runs import memedit
from workflows.cli import cli
from workflows.jobfile import load_job
from workflows.rayjob_starter import run_of
from workflows.settings import EditJob


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "Capitals, nightly.yaml"
    path.write_text(JOB)
    return path


@pytest.fixture(scope="module")
def crds(shared_data: Path) -> Path:
    folder = shared_data / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip(f"no schemas at {folder}")
    return folder


# What KubeRay takes


@pytest.mark.parametrize("flags", [(), FULL], ids=["plain", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_kuberay_takes_it(
    kind: str, flags: tuple[object, ...], job: Path, crds: Path, tmp_path: Path
) -> None:
    manifests = made(job, *KINDS[kind], *flags)
    assert errors_of(validator_of(crds, "rayjobs"), ray_job(manifests)) == []
    if kind == "raycronjob":
        assert errors_of(validator_of(crds, "raycronjobs"), manifests["RayCronJob"]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entryPoint"), "x"),
        (("spec", "shutdownAfterJobFinishes"), "yes"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "volums"), []),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers"), [{}]),
    ],
)
def test_the_schemas_refuse_what_is_wrong(
    path: tuple[str, ...], value: object, job: Path, crds: Path
) -> None:
    """Otherwise the test above would say nothing."""
    manifest = ray_job(made(job))
    inner = manifest
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    assert errors_of(validator_of(crds, "rayjobs"), manifest)


def test_the_pod_of_the_cron_job_is_one(job: Path, crds: Path) -> None:
    """By the schema of pods that KubeRay publishes for a RayJob's submitter."""
    whole = validator_of(crds, "rayjobs").schema
    pod = whole["properties"]["spec"]["properties"]["submitterPodTemplate"]
    template = made(job, *NIGHTLY, *FULL)["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]
    assert errors_of(Draft202012Validator(pod), template) == []
    template["spec"]["container"] = []
    assert errors_of(Draft202012Validator(pod), template)


def test_unknown_fields_are_kept_only_where_the_schema_says_so() -> None:
    inner = {"type": "object", "properties": {"a": {"type": "string"}}}
    schema = {
        "type": "object",
        "properties": {
            "closed": inner,
            "open": {**inner, "x-kubernetes-preserve-unknown-fields": True},
            "texts": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    validator = Draft202012Validator(strict(schema))
    assert not errors_of(validator, {"open": {"b": 1}, "texts": {"b": "c"}, "closed": {"a": "b"}})
    for wrong in ({"closed": {"b": 1}}, {"texts": {"b": 1}}, {"other": 1}):
        assert len(errors_of(validator, wrong)) == 1


# What runs in the end


@pytest.mark.parametrize("kind", KINDS)
def test_the_job_is_the_one_of_the_file(kind: str, job: Path, tmp_path: Path) -> None:
    """Its file in the pod and the flags of the entrypoint, read by the command itself."""
    manifests = made(job, *KINDS[kind], "--gpus-per-worker", 1)
    text = manifests["ConfigMap"]["data"]["job.yaml"]
    assert "wJalr" not in text and "matrix_gflops" not in text
    mounted = tmp_path / "mounted.yaml"
    mounted.write_text(text)
    entrypoint = ray_job(manifests)["spec"]["entrypoint"]
    start = "memedit edit --config /etc/memedit/job.yaml --executor ray --address auto"
    assert entrypoint.startswith(f"{start} --log-format json")
    _, command, *arguments = shlex.split(entrypoint)
    context = cli.commands[command].make_context(command, arguments)
    assert str(context.params.pop("config")) == "/etc/memedit/job.yaml"
    assignments = context.params.pop("assignments")
    found = load_job(EditJob, config=mounted, flags=context.params, assignments=assignments)
    flags = {"executor": "ray", "address": "auto", "log_format": "json", "json": True}
    flags |= {"gpus_per_worker": 1, "run_id": found.run_id}
    assert found == load_job(EditJob, config=job, flags=flags)
    assert found.workers == 3 and found.layers == (5, 6, 7, 8, 9)


def test_set_is_in_the_job_file(job: Path) -> None:
    manifests = made(job, "--set", "targets.steps=3", "--set", "registry=s3://other/place")
    content = yaml.safe_load(manifests["ConfigMap"]["data"]["job.yaml"])
    assert content["targets"] == {"lr": 0.1, "steps": 3}
    assert content["registry"] == "s3://other/place"


def test_a_run_is_called_as_its_manifest(job: Path) -> None:
    one = made(job)["RayJob"]
    assert one["metadata"]["name"] == "memedit-capitals-nightly" == one["spec"]["jobId"]
    assert one["spec"]["entrypoint"].endswith("--run-id memedit-capitals-nightly")
    other = made(job, "--set", "run_id=Night_1", "--name", "first")["RayJob"]
    assert (other["metadata"]["name"], other["spec"]["jobId"]) == ("first", "Night_1")
    assert other["spec"]["entrypoint"].endswith("--run-id Night_1")


def test_each_run_of_a_cron_job_has_its_own_name(job: Path) -> None:
    run = ray_job(made(job, *NIGHTLY))
    job_name = "memedit-capitals-nightly-29345678"
    name = f"{job_name}-run"  # KubeRay's own Job has the name of the RayJob
    assert run["metadata"]["name"] == run["spec"]["jobId"] == name
    assert run["spec"]["entrypoint"].endswith(f" --run-id {name}")
    assert run["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": job_name, "uid": "u-1"}
    ]
    # KubeRay names them itself, so memedit takes the time.
    assert "--run-id" not in ray_job(made(job, *KINDS["raycronjob"]))["spec"]["entrypoint"]


def test_a_cron_job_may_start_rayjobs_and_nothing_else(job: Path) -> None:
    manifests = made(job, *NIGHTLY, "--namespace", "models")
    name = manifests["ServiceAccount"]["metadata"]["name"]
    assert manifests["Role"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "delete"]}
    ]
    binding = manifests["RoleBinding"]
    assert binding["roleRef"]["name"] == manifests["Role"]["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": "models"}]
    spec = manifests["CronJob"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["timeZone"] == "Etc/UTC"
    assert spec["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"] == name
    assert {each["metadata"]["namespace"] for each in manifests.values()} == {"models"}


def test_the_longest_name_of_a_schedule_is_one_of_a_rayjob(job: Path) -> None:
    template = made(job, *NIGHTLY, "--name", "n" * 34)["ConfigMap"]["data"]["rayjob.json"]
    run = run_of(json.loads(template), job=f"{'n' * 34}-29345678", uid="u-1")
    assert len(run["metadata"]["name"]) == 47


def test_schedules(job: Path) -> None:
    when = (*NIGHTLY, "--time-zone", "Europe/Berlin")
    for kind, name in (("cronjob", "CronJob"), ("raycronjob", "RayCronJob")):
        spec = made(job, *when, "--kind", kind)[name]["spec"]
        assert (spec["schedule"], spec["timeZone"]) == ("0 2 * * *", "Europe/Berlin")


@pytest.mark.parametrize("kind", KINDS)
def test_kueue(kind: str, job: Path) -> None:
    if kind == "raycronjob":
        ran = render(job, *KINDS[kind], "--queue", "night", "--json")
        assert ran.code == 2 and ran.error["field"] == "queue"
        return
    labels = ray_job(made(job, *KINDS[kind]))["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "night"


# Where it goes


def test_the_file_that_is_written(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.yaml"
    ran = render(job, "--out", out, "--json")
    assert ran.result["out"] == str(out) and ran.result["name"] == "memedit-capitals-nightly"
    assert out.read_text() == ran.result["text"] == render(job).stdout
    assert render(job, "--out", tmp_path / "none" / "made.yaml", "--json").error["field"] == "out"


def test_without_a_volume_it_is_said_what_is_lost(job: Path) -> None:
    assert "--volume-claim" in render(job).stderr
    assert "--volume-claim" not in render(job, "--volume-claim", "data").stderr


# What is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [("facts", "facts.jsonl"), ("facts", "../facts.jsonl"), ("registry", "~/registry"),
     ("model", "./model"), ("cache", "cache"), ("stats", "stats"), ("corpus", "text/*.parquet"),
     ("corpus", "text.parquet")],
)  # fmt: skip
@pytest.mark.parametrize("scheduler", ["kubernetes", "airflow", "dagster"])
def test_paths_that_are_relative(scheduler: str, field: str, value: str, job: Path) -> None:
    job.write_text(f"{JOB}{field}: {value}\n" if field not in JOB else JOB.replace(
        next(line for line in JOB.splitlines() if line.startswith(field)), f"{field}: {value}"
    ))  # fmt: skip
    ran = memedit("render", scheduler, "--config", job, *NIGHTLY, "--json")
    assert ran.code == 2 and ran.error["field"] == field
    assert f"{value} is relative" in ran.error["message"]


def test_a_folder_beside_the_job_file_is_a_relative_path(job: Path) -> None:
    (job.parent / "base").mkdir()
    ran = render(job, "--json", "--set", f"model={job.parent}/base")
    assert ran.code == 2 and "would not be in a pod" in ran.error["message"]
    job.write_text(JOB.replace("s3://models/pythia", "base"))
    assert "base is relative" in render(job, "--json").error["message"]
    job.write_text(JOB.replace("s3://models/pythia", "org/base"))  # a Hugging Face id
    assert made(job)["RayJob"]


def test_paths_must_lie_on_the_volume_or_in_the_image(job: Path) -> None:
    claim = ("--volume-claim", "data", "--json")
    for path, code in (("/data/facts", 0), ("/database/facts", 2), ("/data/../etc/passwd", 2)):
        assert render(job, *claim, "--set", f"facts={path}").code == code
    assert render(job, "--json", "--set", "facts=/data/facts").error["field"] == "facts"
    other = ("--mount-path", "/mnt/models", *claim)
    assert render(job, *other, "--set", "facts=/mnt/models/f.csv").code == 0
    image = ("--in-image", "/opt/models", "--json")
    assert render(job, *image, "--set", "model=/opt/models/base").code == 0
    # What is published into an image is gone with the pod.
    assert render(job, *image, "--set", "registry=/opt/models/r").error["field"] == "registry"
    for wrong in ("data", "/", ""):
        assert render(job, "--mount-path", wrong, "--json").code == 2


@pytest.mark.parametrize("scheduler", ["kubernetes", "airflow", "dagster"])
def test_keys_are_never_rendered(scheduler: str, job: Path) -> None:
    secret = "wJalrXUtnFEMI"
    for line in (
        f"corpus: https://me:{secret}@host/x",
        f"architecture: {{blocks: s3://a:{secret}@b}}",
    ):
        job.write_text(f"{JOB}{line}\n")
        ran = memedit("render", scheduler, "--config", job, *NIGHTLY, "--json")
        assert ran.code == 2 and "keys" in ran.error["message"]
        assert secret not in ran.stdout + ran.stderr
    job.write_text(f"{JOB}text: https://me:{secret}@host/x\n")  # of `evaluate`
    ran = memedit("render", scheduler, "--config", job, *NIGHTLY)
    assert ran.code == 0 and secret not in ran.stdout


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--schedule", "0 2 * *"), "schedule"),
        (("--schedule", "@every 1h"), "schedule"),
        (("--kind", "cronjob"), "schedule"),
        (("--kind", "raycronjob"), "schedule"),
        (("--kind", "rayjob", *NIGHTLY), "schedule"),
        (("--kind", "rayjobs"), "kind"),
        (("--time-zone", "Mars/Olympus"), "time_zone"),
        (("--time-zone", ""), "time_zone"),
        (("--time-zone", "../etc"), "time_zone"),
        (("--name", "Nightly"), "name"),
        (("--name", "9-nights"), "name"),
        (("--name", "n" * 48), "name"),
        ((*NIGHTLY, "--name", "n" * 35), "name"),
        (("--workers", "0"), "workers"),
        (("--gpus-per-worker", "1.5"), "gpus_per_worker"),
        (("--worker-memory", "much"), "worker_memory"),
        (("--head-memory", "0"), "head_memory"),
        (("--worker-cpus", "0"), "worker_cpus"),
        (("--image", "two words"), "image"),
        (("--ray-version", "latest"), "ray_version"),
        (("--ray-version", "2.51.1"), "ray_version"),
        (("--namespace", "My Models"), "namespace"),
        (("--namespace", "models.nightly"), "namespace"),
        (("--namespace", "m" * 64), "namespace"),
        (("--secret", "AWS_SECRET=abc"), "secret"),
        (("--volume-claim", ""), "volume_claim"),
        (("--user", "0"), "user"),
        (("--set", "targets.step=3"), "targets.step"),
        (("--set", "dtype=float8"), "dtype"),
        ((*NIGHTLY, "--set", "run_id=night-1"), "run_id"),
    ],
)
def test_settings_that_are_wrong(flags: tuple[str, ...], field: str, job: Path) -> None:
    ran = render(job, *flags, "--json")
    assert ran.code == 2, ran.stdout
    assert ran.error["field"] == field or field in ran.error["message"]
    assert "Traceback" not in ran.stderr


def test_a_ray_that_is_too_old_here(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.51.0")
    ran = render(job, "--json")
    assert ran.code == 2 and ran.error["field"] == "ray_version"
    assert "2.52.0" in ran.error["message"] and "the one here" in ran.error["message"]
    assert made(job, "--ray-version", "2.52.0")["RayJob"]


def test_the_job_file_is_checked_as_by_edit(job: Path, tmp_path: Path) -> None:
    job.write_text(f"{JOB}on_bad_rows: skip\n")
    ran = render(job, "--json")
    assert ran.code == 2 and "on_bad_row" in ran.error["message"]
    assert ran.error["source"] == str(job)
    assert render(tmp_path / "none.yaml", "--json").code == 2
    ran = memedit("render", "kubernetes", "--json")
    assert ran.code == 2 and "--config" in ran.error["message"]


def test_a_schedule_publishes_into_a_registry(job: Path) -> None:
    job.write_text(JOB.replace("registry: s3://models/capitals", "out: s3://models/one"))
    assert made(job)["RayJob"]
    for scheduler in ("kubernetes", "airflow", "dagster"):
        ran = memedit("render", scheduler, "--config", job, *NIGHTLY, "--json")
        assert ran.code == 2 and "registry" in ran.error["message"]


@pytest.mark.parametrize("scheduler", ["airflow", "dagster"])
def test_a_python_file_needs_a_schedule(scheduler: str, job: Path) -> None:
    ran = memedit("render", scheduler, "--config", job, "--json")
    assert ran.code == 2 and ran.error["field"] == "schedule"


def test_the_help_tells_each_of_them() -> None:
    told = memedit("render", "--help").stdout
    assert all(name in told for name in ("kubernetes", "airflow", "dagster"))
    told = memedit("render", "kubernetes", "--help").stdout
    assert "--volume-claim" in told and "--cache" not in told
