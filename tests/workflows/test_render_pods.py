"""The pods of `memedit render kubernetes`: what they hold, where they run, how long they wait."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.placement import Machine, place
from memedit.errors import InputError
from tests.workflows.kube_schemas import errors_of, validator_of
from tests.workflows.rendered import FULL, JOB, KINDS, NIGHTLY, made, ray_job, render


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "nightly.yaml"
    path.write_text(JOB)
    return path


def pods_of(manifests: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The spec of every pod: head, workers, submitter, starter."""
    spec = ray_job(manifests)["spec"]
    cluster = spec["rayClusterSpec"]
    found = {
        "head": cluster["headGroupSpec"]["template"]["spec"],
        "workers": cluster["workerGroupSpecs"][0]["template"]["spec"],
        "submitter": spec["submitterPodTemplate"]["spec"],
    }
    if "CronJob" in manifests:
        started = manifests["CronJob"]["spec"]["jobTemplate"]["spec"]
        found["starter"] = started["template"]["spec"]
    return found


def test_the_cluster_of_a_run(job: Path) -> None:
    run = ray_job(made(job, *FULL, "--worker-cpus", 16, "--worker-memory", "96Gi"))
    spec = run["spec"]
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] == 1
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    }
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert re.fullmatch(r"2\.\d+\.\d+", cluster["rayVersion"])
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    # No actor is put on the head, whose CPUs and GPUs are the run's own.
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 8
    for group, gpus in ((head, "1"), (workers, "2")):
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
        assert container["env"] == [{"name": "MEMEDIT_CACHE", "value": "/data/cache"}]
        assert container["image"] == "registry.example.com:5000/memedit:1.2"
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == "reader"
        assert pod["securityContext"]["runAsNonRoot"] is True
        claims = [v.get("persistentVolumeClaim") for v in pod["volumes"]]
        assert {"claimName": "data"} in claims
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "16", "memory": "96Gi", "nvidia.com/gpu": "2"}


def machines_of(manifests: dict[str, Any]) -> list[Machine]:
    """What Ray finds: the head lends nothing, each pod of workers what it asks for."""
    (group,) = ray_job(manifests)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    pod = Machine(cpus=float(limits["cpu"]), gpus=float(limits.get("nvidia.com/gpu", 0)))
    return [Machine(cpus=0), *[pod] * group["replicas"]]


@pytest.mark.parametrize(
    ("workers", "share", "cpus", "pods", "gpus"),
    [(3, 0, 1, 3, 0), (3, 0.5, 2, 2, 1), (7, 0.33, 3, 3, 1), (4, 0.33, 2, 2, 1),
     (10, 0.1, 10, 1, 1), (2, 4, 1, 2, 4)],
)  # fmt: skip
def test_the_pods_hold_the_workers(
    workers: int, share: float, cpus: int, pods: int, gpus: int, job: Path
) -> None:
    """As few CPUs as will do; with one less it is refused here, as it would be at run time."""
    flags = ("--workers", workers, "--gpus-per-worker", share, "--worker-cpus")
    machines = machines_of(made(job, *flags, cpus))
    assert machines[1:] == [Machine(cpus=cpus, gpus=gpus)] * pods
    assert place(machines, workers=workers, gpus_per_worker=share).workers == workers
    if cpus > 1:
        with pytest.raises(InputError):
            fewer = [Machine(cpus=0), *[Machine(cpus=cpus - 1, gpus=gpus)] * pods]
            place(fewer, workers=workers, gpus_per_worker=share)
        ran = render(job, *flags, cpus - 1, "--json")
        assert ran.code == 2 and ran.error["field"] == "worker_cpus"


# What every pod has


@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_is_secured(kind: str, job: Path) -> None:
    for name, pod in pods_of(made(job, *KINDS[kind], "--user", 1234)).items():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == 1234, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["image"] == "memedit:latest"
        # Only the starter talks to Kubernetes.
        assert pod.get("automountServiceAccountToken", True) is (name == "starter")


def test_the_submitter_is_what_kuberay_expects(job: Path) -> None:
    """It adds the command and the token to the container; a Job's pod must say how it restarts."""
    submitter = pods_of(made(job))["submitter"]
    (container,) = submitter["containers"]
    assert container["name"] == "ray-job-submitter" and "command" not in container
    assert submitter["restartPolicy"] == "Never"


PLACED = (
    *("--node-selector", "pool=edits", "--node-selector", "kubernetes.io/arch=amd64"),
    *("--toleration", "dedicated=edits:NoSchedule", "--toleration", "spot"),
    *("--image-pull-secret", "registry", "--priority-class", "nightly"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_pods_run(kind: str, job: Path, shared_data: Path) -> None:
    manifests = made(job, *KINDS[kind], *FULL, *PLACED)
    rayjobs = validator_of(shared_data / "kuberay-crds", "rayjobs")
    assert errors_of(rayjobs, ray_job(manifests)) == []
    # KubeRay publishes the schema of a pod with a RayJob's submitter.
    pod_schema = rayjobs.schema["properties"]["spec"]["properties"]["submitterPodTemplate"]
    for pod in pods_of(manifests).values():
        assert errors_of(Draft202012Validator(pod_schema), {"spec": pod}) == []
    told = [
        {"key": "dedicated", "operator": "Equal", "value": "edits", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists"},
    ]
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    for name, pod in pods_of(manifests).items():
        of_ray = name in ("head", "workers")
        assert pod["tolerations"] == ([gpu, *told] if of_ray else told)
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["priorityClassName"] == "nightly"
        # The small pods must not wait for, or hold, a large node.
        wanted = {"pool": "edits", "kubernetes.io/arch": "amd64"} if of_ray else None
        assert pod.get("nodeSelector") == wanted


def test_a_pod_asks_for_nothing_that_was_not_asked_for(job: Path) -> None:
    for pod in pods_of(made(job, *NIGHTLY)).values():
        assert not {"nodeSelector", "tolerations", "imagePullSecrets"} & set(pod)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--node-selector", "pool"), "node_selector"),
        (("--node-selector", "=edits"), "node_selector"),
        (("--node-selector", "pool=two words"), "node_selector"),
        (("--toleration", "=edits"), "toleration"),
        (("--toleration", "dedicated:NoShedule"), "toleration"),
        (("--toleration", "dedicated=a=b"), "toleration"),
        (("--image-pull-secret", "My Secret"), "image_pull_secret"),
        (("--priority-class", "High!"), "priority_class"),
        (("--start-within-s", "0"), "start_within_s"),
        (("--deadline-s", "-1"), "deadline_s"),
        (("--deadline-s", str(10**10)), "deadline_s"),
    ],
)
def test_what_is_no_place_or_time(flags: tuple[str, ...], field: str, job: Path) -> None:
    ran = render(job, *flags, "--json")
    assert ran.code == 2 and ran.error["field"] == field


# How long a run may wait and take


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_does_not_start_ends(kind: str, job: Path) -> None:
    """Of a schedule every run: the next one must not wait for ever."""
    spec = ray_job(made(job, *KINDS[kind]))["spec"]
    assert spec["preRunningDeadlineSeconds"] == 3600
    assert spec.get("activeDeadlineSeconds") == (None if kind == "rayjob" else 86400)
    flags = ("--start-within-s", 600, "--deadline-s", 7200, "--retries", 2)
    spec = ray_job(made(job, *KINDS[kind], *flags))["spec"]
    assert (spec["preRunningDeadlineSeconds"], spec["activeDeadlineSeconds"]) == (600, 7200)
    assert spec["backoffLimit"] == spec["submitterConfig"]["backoffLimit"] == 2
    spec = ray_job(made(job, *KINDS[kind], "--deadline-s", 0))["spec"]
    assert "activeDeadlineSeconds" not in spec


def test_a_starter_that_does_not_start_ends(job: Path) -> None:
    """Not before all attempts of its run: KubeRay ends those."""

    def deadline(*flags: object) -> Any:
        spec = made(job, *NIGHTLY, *flags)["CronJob"]["spec"]
        return spec["jobTemplate"]["spec"].get("activeDeadlineSeconds")

    times = ("--start-within-s", 600, "--deadline-s", 7200)
    assert deadline(*times, "--retries", 0) == 600 + 7200 + 900
    assert deadline(*times, "--retries", 2) == 3 * (600 + 7200) + 900
    assert deadline("--deadline-s", 0) is None
