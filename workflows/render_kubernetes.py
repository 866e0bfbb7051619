"""The manifests of a job on KubeRay, as plain data.

`docs/operations.md` says what an operator does with them; the tests hold them against KubeRay's
published schemas. No value is a key: the pods take them from a Secret that is only named here.
"""

from __future__ import annotations

import json
import shlex

from memedit.errors import InputError
from workflows.arguments import command_of
from workflows.ingestion.settings import IngestJob
from workflows.render_checks import check_machines, in_one_pod, ray_version, worker_pods
from workflows.render_inline import one_pod
from workflows.render_pods import (
    JOB_FOLDER,
    Manifest,
    container_of,
    job_volume,
    kept_by_kubernetes,
    object_of,
    placed,
    run_container,
    run_pod,
    secured,
    when,
)
from workflows.render_settings import RenderKubernetesJob, ScheduledJob
from workflows.submit import STOP_WAIT_S

LONGEST_NAME = {"rayjob": 47, "raycronjob": 36, "cronjob": 34}
"""KubeRay allows a RayJob 47 characters; those of a CronJob are called NAME-29345678-run."""
_LONGEST_WITHOUT_RAY = {"job": 63, "cronjob": 52}
_LARGEST_JOB_BYTES = 900_000
"""A ConfigMap holds a mebibyte."""
_IDLE_S = 60
"""A cluster whose run has ended stays as long, for whoever is reading its log."""
_SLACK_S = 900
"""What the attempts of a run take beside their deadlines."""


def kind_to_make(options: RenderKubernetesJob, job: ScheduledJob) -> str:
    """The kind, chosen by the schedule where it is not given; in one pod `job` or `cronjob`."""
    if in_one_pod(options, job):
        return "job" if options.schedule is None else "cronjob"
    return options.kind_to_make


def longest_name(options: RenderKubernetesJob, job: ScheduledJob) -> int:
    """How many characters a name may have."""
    longest = _LONGEST_WITHOUT_RAY if in_one_pod(options, job) else LONGEST_NAME
    return longest[kind_to_make(options, job)]


def made_for(options: RenderKubernetesJob, job: ScheduledJob) -> str:
    """The comment at the top."""
    kind = kind_to_make(options, job)
    return f"# Made by `memedit render kubernetes` ({kind}); see docs/operations.md.\n"


def manifests(
    options: RenderKubernetesJob, *, name: str, job: ScheduledJob, job_file: str
) -> list[Manifest]:
    """All that is to be applied, in that order.

    Args:
        options: What was asked for, checked.
        name: Of everything.
        job: The job, for its command, workers and GPUs.
        job_file: What is mounted in the pod of the run itself.

    Raises:
        InputError: A name or a size is none, or the job file is too large.
    """
    if len(job_file.encode()) > _LARGEST_JOB_BYTES:
        raise InputError("the job file is too large for a ConfigMap", field="config")
    settings = object_of("v1", "ConfigMap", name, options)
    settings["data"] = {"job.yaml": job_file}
    if in_one_pod(options, job):
        return [settings, one_pod(options, name=name, run_id=job.run_id)]
    check_machines(options, job)
    kind, run_id = options.kind_to_make, job.run_id or name
    # An ingestion calls what it makes after the facts; the name of an attempt matters to nobody.
    named = job.run_id if isinstance(job, IngestJob) else run_id
    entrypoint = _entrypoint(job, run_id=named if kind == "rayjob" else None)
    spec = _ray_job_spec(options, name=name, job=job, entrypoint=entrypoint)
    if kind == "rayjob":
        run = object_of("ray.io/v1", "RayJob", name, options, queue=options.queue)
        # The run id is the submission's, so that `memedit status` finds it by its name.
        return [settings, run | {"spec": {"jobId": run_id, **spec}}]
    if kind == "raycronjob":
        schedule = object_of("ray.io/v1", "RayCronJob", name, options)
        schedule["spec"] = {**when(options), "jobTemplate": spec}
        return [settings, schedule]
    run = object_of("ray.io/v1", "RayJob", name, options, queue=options.queue)
    del run["metadata"]["name"]  # each run has its own
    template = json.dumps(run | {"spec": spec}, indent=2, ensure_ascii=False)
    settings["data"]["rayjob.json"] = f"{template}\n"
    return [settings, *_permissions(options, name), _cron_job(options, name)]


def _entrypoint(job: ScheduledJob, *, run_id: str | None) -> str:
    # Of an ingestion, that another run holds the lock is no failure.
    program = ["python", "-m", "workflows.render_entry"]
    parts = [*(program if isinstance(job, IngestJob) else ["memedit"]), command_of(job)]
    parts += ["--config", f"{JOB_FOLDER}/job.yaml", "--executor", "ray"]
    parts += ["--address", "auto", "--log-format", "json", "--json"]
    parts += ["--workers", str(job.workers or 1)]
    if job.gpus_per_worker:
        parts += ["--gpus-per-worker", f"{job.gpus_per_worker:g}"]
    if run_id is not None:
        parts += ["--run-id", run_id]
    return shlex.join(parts)


# The Ray cluster of a run


def _ray_job_spec(
    options: RenderKubernetesJob, *, name: str, job: ScheduledJob, entrypoint: str
) -> Manifest:
    spec: Manifest = {
        "entrypoint": entrypoint,
        # Ray's own 3 s are too short for a clean end.
        "runtimeEnvYAML": f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{STOP_WAIT_S}"\n',
        "metadata": {"memedit": command_of(job)},
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
    container = run_container(
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
        "template": run_pod(
            options,
            container,
            volumes=[job_volume(name, "job.yaml")],
            gpus=options.head_gpus,
        ),
    }


def _workers(options: RenderKubernetesJob, job: ScheduledJob) -> Manifest:
    pods, gpus = worker_pods(job)
    container = run_container(
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
        "template": run_pod(options, container, volumes=[], gpus=gpus),
    }


# A schedule that Kubernetes keeps


def _starter(name: str) -> str:
    return f"{name}-starter"


def _permissions(options: RenderKubernetesJob, name: str) -> list[Manifest]:
    """Whoever starts the runs may start, see and remove RayJobs here, and nothing else."""
    version = "rbac.authorization.k8s.io/v1"
    account = object_of("v1", "ServiceAccount", name, options)
    role = object_of(version, "Role", name, options)
    role["rules"] = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "delete"]}
    ]
    binding = object_of(version, "RoleBinding", name, options)
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
    schedule = object_of("batch/v1", "CronJob", name, options)
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
    schedule["spec"] = kept_by_kubernetes(options, {"spec": job})
    return schedule
