"""What Kubernetes, KubeRay or Ray would refuse, refused before anything is written."""

from __future__ import annotations

import importlib.metadata
import math
import re

from packaging.version import Version

from memedit.errors import InputError
from workflows.ingestion.hooks import WebHook, parse_hooks
from workflows.ingestion.lineage import parse_lineage
from workflows.ingestion.settings import IngestJob
from workflows.render_settings import RenderKubernetesJob, ScheduledJob
from workflows.wording import did_you_mean

OLDEST_RAY = Version("2.52.0")
"""KubeRay refuses older ones where it makes a token."""
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_QUANTITY = re.compile(r"[1-9]\d*(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?")
_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_NAME = "[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_WORD = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_KEY = f"({_NAME}/)?{_WORD}"
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)", re.ASCII)


def in_one_pod(options: RenderKubernetesJob, job: ScheduledJob) -> bool:
    """Whether one pod does it all, without Ray: an ingestion that asks for no workers."""
    if not isinstance(job, IngestJob) or options.kind in ("rayjob", "raycronjob"):
        return False
    return job.executor == "inline" and job.workers is None and job.gpus_per_worker == 0


def variables_of(job: ScheduledJob) -> list[str]:
    """The environment variables with secrets that an ingestion names."""
    if not isinstance(job, IngestJob):
        return []
    hooks, lineage = parse_hooks(job.hooks), parse_lineage(job.lineage or None)
    texts = [
        text
        for hook in (*hooks.success, *hooks.failure)
        if isinstance(hook, WebHook)
        for text in (*hook.headers.values(), *([hook.url] if hook.url.startswith("$") else []))
    ]
    found = {name for text in texts for name in _VARIABLE.findall(text)}
    if lineage is not None and lineage.api_key_env is not None:
        found.add(lineage.api_key_env)
    return sorted(found)


def check_pods(options: RenderKubernetesJob) -> None:
    """Names and sizes of any pod.

    Raises:
        InputError: Names the field.
    """
    for name in ("worker_memory", "head_memory"):
        if not _QUANTITY.fullmatch(getattr(options, name)):
            raise InputError(
                f"{getattr(options, name)!r} is no size; write 64Gi or 512Mi", field=name
            )
    names = ("queue", "secret", "service_account", "volume_claim")
    for name in (*names, "image_pull_secret", "priority_class"):
        value = getattr(options, name)
        if value is not None and not re.fullmatch(_NAME, value):
            raise InputError(f"{value!r} is no name of Kubernetes", field=name)
    if not re.fullmatch(_LABEL, options.namespace):
        raise InputError(
            f"{options.namespace!r} is no namespace; write small letters, digits and '-'",
            field="namespace",
        )
    if not re.fullmatch(r"\S+", options.image) or "://" in options.image:
        raise InputError(f"{options.image!r} is no image; write registry/name:tag", field="image")
    node_selector_of(options)
    for text in options.toleration:
        toleration_of(text)


def check_machines(options: RenderKubernetesJob, job: ScheduledJob) -> None:
    """What `check_pods` checks, Ray's version, and whether the workers fit into their pods.

    Raises:
        InputError: Names the field.
    """
    check_pods(options)
    ray_version(options)
    _check_workers(options, job)


def worker_pods(job: ScheduledJob) -> tuple[int, int]:
    """How many pods hold the workers, and the GPUs of each.

    Where workers share a GPU, a pod holds all workers of one GPU.
    """
    share = job.gpus_per_worker
    in_pod = int(1 / share + 1e-9) if 0 < share < 1 else 1
    return math.ceil((job.workers or 1) / in_pod), math.ceil(share)


def _check_workers(options: RenderKubernetesJob, job: ScheduledJob) -> None:
    share = job.gpus_per_worker
    if share > 1 and share != int(share):
        raise InputError(
            f"{share:g}; give 0, a part of one, or a whole number", field="gpus_per_worker"
        )
    needed = math.ceil((job.workers or 1) / worker_pods(job)[0])
    if options.worker_cpus < needed:
        raise InputError(
            f"{options.worker_cpus}, but {needed} workers of {share:g} GPU share a pod and need a"
            f" CPU each; give {needed} or more (--worker-memory is shared, too)",
            field="worker_cpus",
        )


def ray_version(options: RenderKubernetesJob) -> str:
    """Ray's version in the image: the one that was given, or else the one here."""
    version = options.ray_version or importlib.metadata.version("ray")
    if options.ray_version is not None and not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise InputError(f"{version!r} is no version; write 2.60.0", field="ray_version")
    if Version(version) < OLDEST_RAY:
        whose = "" if options.ray_version is not None else ", the one here,"
        raise InputError(
            f"{version}{whose} knows no tokens; KubeRay takes {OLDEST_RAY} or later",
            field="ray_version",
        )
    return version


def node_selector_of(options: RenderKubernetesJob) -> dict[str, str]:
    """The labels of `--node-selector`."""
    found = {}
    for text in options.node_selector:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(_KEY, key) or not re.fullmatch(f"({_WORD})?", value):
            raise InputError(f"{text!r} is no label; write KEY=VALUE", field="node_selector")
        found[key] = value
    return found


def toleration_of(text: str) -> dict[str, str]:
    """`KEY[=VALUE][:EFFECT]`, as `kubectl taint` writes a taint."""
    taint, colon, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    if not re.fullmatch(_KEY, key) or not re.fullmatch(f"({_WORD})?", value):
        raise InputError(f"{text!r} is no taint; write KEY[=VALUE][:EFFECT]", field="toleration")
    if colon and effect not in _EFFECTS:
        raise InputError(
            f"{text!r}: {effect!r} is no effect{did_you_mean(effect, _EFFECTS)}",
            field="toleration",
        )
    found = {"key": key, "operator": "Equal" if equals else "Exists"}
    if equals:
        found["value"] = value
    if colon:
        found["effect"] = effect
    return found
