"""The manifests of a job on KubeRay, as plain data.

`docs/operations.md` says what an operator does with them; the tests hold them against KubeRay's
published schemas. No value is a key: the pods take them from a Secret that is only named here.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shlex
from typing import Any

from memedit.errors import InputError
from workflows.render_settings import RenderKubernetesJob
from workflows.settings import EditJob
from workflows.submit import STOP_WAIT_S

Manifest = dict[str, Any]

LONGEST_NAME = {"rayjob": 47, "raycronjob": 36, "cronjob": 34}
"""KubeRay allows a RayJob 47 characters; those of a CronJob are called NAME-29345678-run."""
JOB_FOLDER = "/etc/memedit"
_CACHE = "/var/cache/memedit"
_QUANTITY = re.compile(r"[1-9]\d*(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?")
_LARGEST_JOB_BYTES = 900_000
"""A ConfigMap holds a mebibyte."""
_IDLE_S = 60
"""A cluster whose run has ended stays as long, for whoever is reading its log."""


def made_for(options: RenderKubernetesJob) -> str:
    """The comment at the top."""
    return (
        f"# Made by `memedit render kubernetes` ({options.kind_to_make}); see docs/operations.md.\n"
    )


def manifests(
    options: RenderKubernetesJob, *, name: str, job: EditJob, job_file: str
) -> list[Manifest]:
    """All that is to be applied, in that order.

    Args:
        options: What was asked for, checked.
        name: Of everything.
        job: The job, for its workers and GPUs.
        job_file: What is mounted in the head's pod.

    Raises:
        InputError: A size is none, or the job file is too large.
    """
    if len(job_file.encode()) > _LARGEST_JOB_BYTES:
        raise InputError("the job file is too large for a ConfigMap", field="config")
    _check_sizes(options, job)
    kind, run_id = options.kind_to_make, job.run_id or name
    entrypoint = _entrypoint(job, run_id=run_id if kind == "rayjob" else None)
    spec = _ray_job_spec(options, name=name, job=job, entrypoint=entrypoint)
    settings = _object("v1", "ConfigMap", name, options)
    settings["data"] = {"job.yaml": job_file}
    if kind == "rayjob":
        run = _object("ray.io/v1", "RayJob", name, options, queue=options.queue)
        # The run id is the submission's, so that `memedit status` finds it by its name.
        return [settings, run | {"spec": {"jobId": run_id, **spec}}]
    if kind == "raycronjob":
        schedule = _object("ray.io/v1", "RayCronJob", name, options)
        schedule["spec"] = {**_when(options), "jobTemplate": spec}
        return [settings, schedule]
    run = _object("ray.io/v1", "RayJob", name, options, queue=options.queue)
    del run["metadata"]["name"]  # each run has its own
    template = json.dumps(run | {"spec": spec}, indent=2, ensure_ascii=False)
    settings["data"]["rayjob.json"] = f"{template}\n"
    return [settings, *_permissions(options, name), _cron_job(options, name)]


def _object(
    version: str, kind: str, name: str, options: RenderKubernetesJob, *, queue: str | None = None
) -> Manifest:
    labels = {"app.kubernetes.io/name": "memedit", "app.kubernetes.io/instance": name}
    if queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = queue
    metadata = {"name": name, "namespace": options.namespace, "labels": labels}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _when(options: RenderKubernetesJob) -> Manifest:
    return {"schedule": options.schedule, "timeZone": options.time_zone}


def _entrypoint(job: EditJob, *, run_id: str | None) -> str:
    parts = ["memedit", "edit", "--config", f"{JOB_FOLDER}/job.yaml", "--executor", "ray"]
    parts += ["--address", "auto", "--log-format", "json", "--json"]
    parts += ["--workers", str(job.workers or 1)]
    if job.gpus_per_worker:
        parts += ["--gpus-per-worker", f"{job.gpus_per_worker:g}"]
    if run_id is not None:
        parts += ["--run-id", run_id]
    return shlex.join(parts)


# The Ray cluster of a run


def _ray_job_spec(
    options: RenderKubernetesJob, *, name: str, job: EditJob, entrypoint: str
) -> Manifest:
    return {
        "entrypoint": entrypoint,
        # Ray's own 3 s are too short for a clean end.
        "runtimeEnvYAML": f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{STOP_WAIT_S}"\n',
        "metadata": {"memedit": "edit"},
        "backoffLimit": options.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _IDLE_S,
        "rayClusterSpec": {
            "rayVersion": options.ray_version or importlib.metadata.version("ray"),
            "authOptions": {"mode": "token"},
            "headGroupSpec": _head(options, name),
            "workerGroupSpecs": [_workers(options, job)],
        },
    }


def _head(options: RenderKubernetesJob, name: str) -> Manifest:
    mounts = [{"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}]
    volumes: list[Manifest] = [
        {"name": "job", "configMap": {"name": name, "items": [_item("job.yaml")]}}
    ]
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    container = _ray_container(
        options,
        name="ray-head",
        mounts=mounts,
        cpus=options.head_cpus,
        memory=options.head_memory,
        gpus=options.head_gpus,
    )
    container["ports"] = [{"name": n, "containerPort": port} for n, port in ports.items()]
    return {
        # CPUs and GPUs of the head are the run's own: no worker is put there.
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
        "template": _pod(options, container, volumes=volumes, gpus=options.head_gpus),
    }


def _workers(options: RenderKubernetesJob, job: EditJob) -> Manifest:
    workers, share = job.workers or 1, job.gpus_per_worker
    # Where workers share a GPU, a pod holds all workers of one GPU.
    in_pod = int(1 / share + 1e-9) if 0 < share < 1 else 1
    pods, gpus = math.ceil(workers / in_pod), math.ceil(share)
    container = _ray_container(
        options,
        name="ray-worker",
        mounts=[],
        cpus=options.worker_cpus,
        memory=options.worker_memory,
        gpus=gpus,
    )
    return {
        "groupName": "workers",
        "replicas": pods,
        "minReplicas": pods,
        "maxReplicas": pods,
        "rayStartParams": {},
        "template": _pod(options, container, volumes=[], gpus=gpus),
    }


def _ray_container(
    options: RenderKubernetesJob,
    *,
    name: str,
    mounts: list[Manifest],
    cpus: int,
    memory: str,
    gpus: int,
) -> Manifest:
    volume = options.volume_claim is not None
    cache = f"{options.mount_path.rstrip('/')}/cache" if volume else _CACHE
    place = {"name": "data", "mountPath": options.mount_path if volume else _CACHE}
    container = _container(options, name=name, cpus=str(cpus), memory=memory, gpus=gpus)
    container["env"] = [{"name": "MEMEDIT_CACHE", "value": cache}]
    container["volumeMounts"] = [*mounts, place]
    if options.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    return container


def _container(
    options: RenderKubernetesJob, *, name: str, cpus: str, memory: str, gpus: int = 0
) -> Manifest:
    resources = {"cpu": cpus, "memory": memory}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    return {
        "name": name,
        "image": options.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _pod(
    options: RenderKubernetesJob, container: Manifest, *, volumes: list[Manifest], gpus: int
) -> Manifest:
    data: Manifest = {"name": "data"}
    if options.volume_claim is not None:
        data["persistentVolumeClaim"] = {"claimName": options.volume_claim}
    else:
        data["emptyDir"] = {}
    spec: Manifest = {
        **_security(options),
        "automountServiceAccountToken": False,
        # A little more than a run has to end cleanly.
        "terminationGracePeriodSeconds": STOP_WAIT_S + 30,
        "containers": [container],
        "volumes": [*volumes, data],
    }
    if options.service_account is not None:
        spec["serviceAccountName"] = options.service_account
    if gpus:
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    return {"spec": spec}


def _security(options: RenderKubernetesJob) -> Manifest:
    return {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": options.user,
            "fsGroup": options.user,
            # Otherwise every file of a volume is looked at before a pod starts.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    }


def _item(key: str) -> Manifest:
    return {"key": key, "path": key}


# A schedule that Kubernetes keeps


def _starter(name: str) -> str:
    return f"{name}-starter"


def _permissions(options: RenderKubernetesJob, name: str) -> list[Manifest]:
    """Whoever starts the runs may start and look at RayJobs here, and nothing else."""
    version = "rbac.authorization.k8s.io/v1"
    account = _object("v1", "ServiceAccount", name, options)
    role = _object(version, "Role", name, options)
    role["rules"] = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    binding = _object(version, "RoleBinding", name, options)
    for each in (account, role, binding):
        each["metadata"]["name"] = _starter(name)
    binding["roleRef"] = {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": _starter(name),
    }
    binding["subjects"] = [
        {"kind": "ServiceAccount", "name": _starter(name), "namespace": options.namespace}
    ]
    return [account, role, binding]


def _cron_job(options: RenderKubernetesJob, name: str) -> Manifest:
    """Starts a RayJob and waits for its end, so that Kubernetes knows whether a run is going on."""
    container = _container(options, name="starter", cpus="100m", memory="128Mi")
    container["command"] = ["python", "-m", "workflows.rayjob_starter"]
    container["args"] = [f"{JOB_FOLDER}/rayjob.json"]
    label = "metadata.labels['batch.kubernetes.io/{}']"
    container["env"] = [
        {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": label.format(key)}}}
        for variable, key in (("JOB_NAME", "job-name"), ("JOB_UID", "controller-uid"))
    ]
    container["volumeMounts"] = [{"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}]
    pod: Manifest = {
        **_security(options),
        "serviceAccountName": _starter(name),
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": "job", "configMap": {"name": name, "items": [_item("rayjob.json")]}}],
    }
    schedule = _object("batch/v1", "CronJob", name, options)
    schedule["spec"] = {
        **_when(options),
        "concurrencyPolicy": "Forbid",
        # An outage of the scheduler at night is made up for within an hour.
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {
            "spec": {
                # Of the starter's pod: a lost one finds the run that the first one started.
                "backoffLimit": 6,
                "podFailurePolicy": {
                    "rules": [
                        {
                            "action": "FailJob",
                            "onExitCodes": {
                                "containerName": "starter",
                                "operator": "In",
                                "values": [1],
                            },
                        }
                    ]
                },
                "template": {"spec": pod},
            }
        },
    }
    return schedule


def _check_sizes(options: RenderKubernetesJob, job: EditJob) -> None:
    for name in ("worker_memory", "head_memory"):
        if not _QUANTITY.fullmatch(getattr(options, name)):
            raise InputError(
                f"{getattr(options, name)!r} is no size; write 64Gi or 512Mi", field=name
            )
    share = job.gpus_per_worker
    if share > 1 and share != int(share):
        raise InputError(
            f"{share:g}; give 0, a part of one, or a whole number", field="gpus_per_worker"
        )
    for name in ("namespace", "queue", "secret", "service_account", "volume_claim"):
        value = getattr(options, name)
        if value is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", value):
            raise InputError(f"{value!r} is no name of Kubernetes", field=name)
    if not re.fullmatch(r"\S+", options.image) or "://" in options.image:
        raise InputError(f"{options.image!r} is no image; write registry/name:tag", field="image")
    version = options.ray_version
    if version is not None and not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise InputError(f"{version!r} is no version; write 2.60.0", field="ray_version")
