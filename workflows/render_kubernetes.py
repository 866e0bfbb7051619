"""The manifests of a job on KubeRay, as plain data.

`docs/operations.md` says what an operator does with them; the tests hold them against KubeRay's
published schemas. No value is a key: the pods take them from a Secret that is only named here.
"""

from __future__ import annotations

import json
import shlex

from memedit.errors import InputError
from workflows.render_checks import check_machines, ray_version, worker_pods
from workflows.render_pods import (
    Manifest,
    container_of,
    job_volume,
    placed,
    ray_container,
    ray_pod,
    secured,
)
from workflows.render_settings import RenderKubernetesJob
from workflows.settings import EditJob
from workflows.submit import STOP_WAIT_S

LONGEST_NAME = {"rayjob": 47, "raycronjob": 36, "cronjob": 34}
"""KubeRay allows a RayJob 47 characters; those of a CronJob are called NAME-29345678-run."""
JOB_FOLDER = "/etc/memedit"
_LARGEST_JOB_BYTES = 900_000
"""A ConfigMap holds a mebibyte."""
_IDLE_S = 60
"""A cluster whose run has ended stays as long, for whoever is reading its log."""
_SLACK_S = 900
"""What the attempts of a run take beside their deadlines."""


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
        InputError: A name or a size is none, or the job file is too large.
    """
    if len(job_file.encode()) > _LARGEST_JOB_BYTES:
        raise InputError("the job file is too large for a ConfigMap", field="config")
    check_machines(options, job)
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
    spec: Manifest = {
        "entrypoint": entrypoint,
        # Ray's own 3 s are too short for a clean end.
        "runtimeEnvYAML": f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{STOP_WAIT_S}"\n',
        "metadata": {"memedit": "edit"},
        # A new cluster for what has failed; the same one, when only its head was lost.
        "backoffLimit": options.retries,
        "submitterConfig": {"backoffLimit": options.retries},
        "preRunningDeadlineSeconds": options.start_within_s,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _IDLE_S,
        "submitterPodTemplate": _submitter(options),
        "rayClusterSpec": {
            "rayVersion": ray_version(options),
            "authOptions": {"mode": "token"},
            "headGroupSpec": _head(options, name),
            "workerGroupSpecs": [_workers(options, job)],
        },
    }
    if options.ends_after_s is not None:
        spec["activeDeadlineSeconds"] = options.ends_after_s
    return spec


def _submitter(options: RenderKubernetesJob) -> Manifest:
    """KubeRay gives it the command that submits the job and prints the log."""
    container = container_of(options, name="ray-job-submitter", cpus="500m", memory="1Gi")
    return {
        "spec": {
            **secured(options),
            **placed(options),
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "containers": [container],
        }
    }


def _head(options: RenderKubernetesJob, name: str) -> Manifest:
    mounts = [{"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}]
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    container = ray_container(
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
        "template": ray_pod(
            options,
            container,
            volumes=[job_volume(name, "job.yaml")],
            gpus=options.head_gpus,
        ),
    }


def _workers(options: RenderKubernetesJob, job: EditJob) -> Manifest:
    pods, gpus = worker_pods(job)
    container = ray_container(
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
        "template": ray_pod(options, container, volumes=[], gpus=gpus),
    }


# A schedule that Kubernetes keeps


def _starter(name: str) -> str:
    return f"{name}-starter"


def _permissions(options: RenderKubernetesJob, name: str) -> list[Manifest]:
    """Whoever starts the runs may start, see and remove RayJobs here, and nothing else."""
    version = "rbac.authorization.k8s.io/v1"
    account = _object("v1", "ServiceAccount", name, options)
    role = _object(version, "Role", name, options)
    role["rules"] = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "delete"]}
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
    container = container_of(options, name="starter", cpus="100m", memory="128Mi")
    container["command"] = ["python", "-m", "workflows.rayjob_starter"]
    container["args"] = [f"{JOB_FOLDER}/rayjob.json"]
    label = "metadata.labels['batch.kubernetes.io/{}']"
    container["env"] = [
        {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": label.format(key)}}}
        for variable, key in (("JOB_NAME", "job-name"), ("JOB_UID", "controller-uid"))
    ]
    container["volumeMounts"] = [{"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}]
    pod: Manifest = {
        **secured(options),
        **placed(options),
        "serviceAccountName": _starter(name),
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [job_volume(name, "rayjob.json")],
    }
    schedule = _object("batch/v1", "CronJob", name, options)
    job: Manifest = {
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
    if options.ends_after_s is not None:
        # For a starter that does not start itself; all attempts of a run are over before.
        attempt_s = options.start_within_s + options.ends_after_s
        job["activeDeadlineSeconds"] = (options.retries + 1) * attempt_s + _SLACK_S
    schedule["spec"] = {
        **_when(options),
        "concurrencyPolicy": "Forbid",
        # An outage of the scheduler at night is made up for within an hour.
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"spec": job},
    }
    return schedule
