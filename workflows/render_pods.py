"""The pods of a job on Kubernetes: containers, what secures them, and where they may run.

Knows no kind of KubeRay's (`workflows.render_kubernetes`).
"""

from __future__ import annotations

from typing import Any

from workflows.render_checks import node_selector_of, toleration_of
from workflows.render_settings import RenderKubernetesJob
from workflows.submit import STOP_WAIT_S

Manifest = dict[str, Any]

JOB_FOLDER = "/etc/memedit"
_CACHE = "/var/cache/memedit"


def object_of(
    version: str, kind: str, name: str, options: RenderKubernetesJob, *, queue: str | None = None
) -> Manifest:
    """An object of Kubernetes, but for what it is to do."""
    labels = labels_of(name, queue=queue)
    metadata = {"name": name, "namespace": options.namespace, "labels": labels}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def labels_of(name: str, *, queue: str | None = None) -> dict[str, str]:
    """What tells the objects of one job; with `queue` Kueue sees it, too."""
    labels = {"app.kubernetes.io/name": "memedit", "app.kubernetes.io/instance": name}
    if queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = queue
    return labels


def when(options: RenderKubernetesJob) -> Manifest:
    """The schedule of a CronJob or RayCronJob."""
    return {"schedule": options.schedule, "timeZone": options.time_zone}


def kept_by_kubernetes(options: RenderKubernetesJob, job_template: Manifest) -> Manifest:
    """The spec of a CronJob whose runs never overlap."""
    return {
        **when(options),
        "concurrencyPolicy": "Forbid",
        # An outage of the scheduler at night is made up for within an hour.
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": job_template,
    }


def run_container(
    options: RenderKubernetesJob,
    *,
    name: str,
    mounts: list[Manifest],
    cpus: int,
    memory: str,
    gpus: int,
) -> Manifest:
    """A container that runs memedit: with the keys, and a place for finished work."""
    volume = options.volume_claim is not None
    cache = f"{options.mount_path.rstrip('/')}/cache" if volume else _CACHE
    place = {"name": "data", "mountPath": options.mount_path if volume else _CACHE}
    container = container_of(options, name=name, cpus=str(cpus), memory=memory, gpus=gpus)
    container["env"] = [{"name": "MEMEDIT_CACHE", "value": cache}]
    container["volumeMounts"] = [*mounts, place]
    if options.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    return container


def container_of(
    options: RenderKubernetesJob, *, name: str, cpus: str, memory: str, gpus: int = 0
) -> Manifest:
    """A container of the image that may take what it asks for, and no more."""
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


def run_pod(
    options: RenderKubernetesJob, container: Manifest, *, volumes: list[Manifest], gpus: int
) -> Manifest:
    """The template of a pod that runs memedit."""
    data: Manifest = {"name": "data"}
    if options.volume_claim is not None:
        data["persistentVolumeClaim"] = {"claimName": options.volume_claim}
    else:
        data["emptyDir"] = {}
    spec: Manifest = {
        **secured(options),
        **placed(options, gpus=gpus),
        "automountServiceAccountToken": False,
        # A little more than a run has to end cleanly.
        "terminationGracePeriodSeconds": STOP_WAIT_S + 30,
        "containers": [container],
        "volumes": [*volumes, data],
    }
    if options.service_account is not None:
        spec["serviceAccountName"] = options.service_account
    if options.node_selector:
        spec["nodeSelector"] = node_selector_of(options)
    return {"spec": spec}


def secured(options: RenderKubernetesJob) -> Manifest:
    """How every pod is secured."""
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


def placed(options: RenderKubernetesJob, *, gpus: int = 0) -> Manifest:
    """What every pod needs to get a node and its image."""
    tolerations = [toleration_of(text) for text in options.toleration]
    if gpus:
        tolerations.insert(
            0, {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        )
    found: Manifest = {}
    if tolerations:
        found["tolerations"] = tolerations
    if options.image_pull_secret is not None:
        found["imagePullSecrets"] = [{"name": options.image_pull_secret}]
    if options.priority_class is not None:
        found["priorityClassName"] = options.priority_class
    return found


def job_volume(name: str, key: str) -> Manifest:
    """One file of the ConfigMap of a job."""
    return {"name": "job", "configMap": {"name": name, "items": [{"key": key, "path": key}]}}
