"""`memedit render`: what it can be told, as data; see `workflows.settings`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from memedit.errors import InputError
from workflows.fields import option
from workflows.ingestion.settings import IngestJob
from workflows.settings import EditJob, Job

ScheduledJob: TypeAlias = EditJob | IngestJob
"""What a scheduler can be told to run."""
_LARGEST_S = 30 * 24 * 3600
"""A month; KubeRay keeps seconds in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class RenderJob(Job):
    """A job file written in the words of a scheduler."""

    out: Path | None = option(
        None,
        "The file to write; what it holds is replaced. [default: stdout]",
        group="Output",
        metavar="FILE",
    )
    name: str | None = option(
        None,
        "Of all that is made: small letters, digits and '-'. [default: memedit-, then the name of"
        " the job file]",
        group="Output",
        metavar="NAME",
    )
    schedule: str | None = option(
        None,
        "A cron line of five fields, such as '0 2 * * *' (every night at two), or @daily.",
        group="Input",
        metavar="CRON",
    )
    time_zone: str = option(
        "Etc/UTC", "Of the schedule, such as Europe/Berlin.", group="Input", metavar="ZONE"
    )
    workers: int | None = option(
        None,
        "Ray actors. [default: the job file's; on Kubernetes else 1, elsewhere as many as the"
        " cluster holds]",
        group="Machine",
        metavar="N",
        at_least=1,
    )
    gpus_per_worker: float | None = option(
        None,
        "GPUs that each Ray actor asks for: a part of one, or a whole number. [default: the job"
        " file's]",
        group="Machine",
        metavar="N",
        at_least=0,
    )
    source: Any = option(None, "The job, checked, and where it comes from.", flag=False)


@dataclass(frozen=True, kw_only=True)
class RenderKubernetesJob(RenderJob):
    """`memedit render kubernetes`."""

    kind: Literal["rayjob", "raycronjob", "cronjob"] | None = option(
        None,
        "One run; a schedule kept by KubeRay (alpha); or one kept by Kubernetes, whose every run is"
        " a RayJob. [default: cronjob with --schedule, else rayjob] An ingestion with `executor:"
        " inline` and no workers is run by one pod, without Ray, unless it is to be a rayjob or"
        " raycronjob.",
        group="Output",
    )
    image: str = option(
        "memedit:latest",
        "The container image: memedit and Ray, run as --user.",
        group="Machine",
        metavar="IMAGE",
    )
    ray_version: str | None = option(
        None,
        "Ray's version in the image, which KubeRay must know. [default: the one here]",
        group="Machine",
        metavar="X.Y.Z",
    )
    user: int = option(
        1000, "The user in the pods, by number; never root.", group="Machine", at_least=1
    )
    namespace: str = option("default", "Where it all lies.", group="Output", metavar="NAME")
    queue: str | None = option(
        None, "Kueue's local queue to wait in.", group="Machine", metavar="NAME"
    )
    node_selector: tuple[str, ...] = option(
        (),
        "A label of the nodes that head and workers may run on; repeatable.",
        group="Machine",
        metavar="KEY=VALUE",
    )
    toleration: tuple[str, ...] = option(
        (),
        "A taint that every pod tolerates, beside that of GPUs; repeatable.",
        group="Machine",
        metavar="KEY[=VALUE][:EFFECT]",
    )
    image_pull_secret: str | None = option(
        None, "The Secret with which every pod gets the image.", group="Machine", metavar="NAME"
    )
    priority_class: str | None = option(
        None, "The PriorityClass of every pod.", group="Machine", metavar="NAME"
    )
    secret: str | None = option(
        None,
        "A Secret whose entries become environment variables of the pods: AWS_ACCESS_KEY_ID, …, and"
        " what an ingestion names ($NAME in `hooks`, `api_key_env` in `lineage`).",
        group="Input",
        metavar="NAME",
    )
    service_account: str | None = option(
        None,
        "The ServiceAccount of the Ray pods, such as one that object storage trusts.",
        group="Machine",
        metavar="NAME",
    )
    volume_claim: str | None = option(
        None,
        "A PersistentVolumeClaim that all pods mount (ReadWriteMany); finished work is kept there"
        " from run to run.",
        group="Input",
        metavar="NAME",
    )
    mount_path: str = option(
        "/data", "Where the claim is mounted.", group="Input", metavar="FOLDER"
    )
    in_image: tuple[str, ...] = option(
        (),
        "A folder that the image brings, from which a job may read; repeatable.",
        group="Input",
        metavar="FOLDER",
    )
    retries: int = option(
        1,
        "Times to run again what has failed: on the same cluster after the loss of its head, and"
        " else on a new one; without Ray in a new pod, unless its input or a gate was the reason.",
        group="Machine",
        metavar="N",
        at_least=0,
    )
    start_within_s: int = option(
        3600,
        "Seconds that an attempt may wait for its pods before it has failed; without Ray they are"
        " added to --deadline-s.",
        group="Machine",
        metavar="SECONDS",
        at_least=1,
        at_most=_LARGEST_S,
    )
    deadline_s: int | None = option(
        None,
        "Seconds after which an attempt is ended, whatever it does, and not tried again (without"
        " Ray: all attempts together); 0: never."
        " [default: 86400 with --schedule, else 0]",
        group="Machine",
        metavar="SECONDS",
        at_least=0,
        at_most=_LARGEST_S,
    )
    worker_cpus: int = option(
        4,
        "CPUs of each worker pod, shared by its workers where those share a GPU.",
        group="Machine",
        metavar="N",
        at_least=1,
    )
    worker_memory: str = option(
        "16Gi",
        "Memory of each worker pod, shared by its workers where those share a GPU.",
        group="Machine",
        metavar="SIZE",
    )
    head_cpus: int = option(
        4,
        "CPUs of the head pod, in which the run itself solves and publishes; without Ray this and"
        " the next two are of the only pod.",
        group="Machine",
        metavar="N",
        at_least=1,
    )
    head_memory: str = option("16Gi", "Memory of the head pod.", group="Machine", metavar="SIZE")
    head_gpus: int = option(
        0,
        "GPUs of the head pod, for the run itself and not for workers.",
        group="Machine",
        metavar="N",
        at_least=0,
    )

    def check(self) -> None:
        """See `Job`: a schedule belongs to the kinds that keep one."""
        if self.kind in ("raycronjob", "cronjob") and self.schedule is None:
            raise InputError(f"missing; a {self.kind} needs one", field="schedule")
        if self.kind == "rayjob" and self.schedule is not None:
            raise InputError(
                "a rayjob runs once; give --kind cronjob or raycronjob, or leave it out",
                field="schedule",
            )
        if self.kind == "raycronjob" and self.queue is not None:
            raise InputError(
                "a raycronjob does not hand its labels on to its RayJobs, so Kueue would not see"
                " them; give --kind cronjob",
                field="queue",
            )

    @property
    def kind_to_make(self) -> str:
        """The kind, chosen by the schedule where it is not given."""
        return self.kind or ("rayjob" if self.schedule is None else "cronjob")

    @property
    def ends_after_s(self) -> int | None:
        """The deadline; None for none. The next night must not wait for ever."""
        if self.deadline_s is None:
            return None if self.schedule is None else 24 * 3600
        return self.deadline_s or None


@dataclass(frozen=True, kw_only=True)
class RenderPythonJob(RenderJob):
    """`memedit render airflow` and `dagster`."""

    scheduler: str = option("", "Which of them.", flag=False)

    def check(self) -> None:
        """See `Job`: there is no such file without a schedule."""
        if self.schedule is None:
            raise InputError("missing; give a cron line", field="schedule")
