"""`memedit render SCHEDULER`: a job file in the words of Kubernetes, Airflow or Dagster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from memedit.errors import InputError
from workflows.command_help import JobCommand, flags_of
from workflows.jobfile import load_job
from workflows.render_settings import RenderJob, RenderKubernetesJob, RenderPythonJob

RENDER_SUMMARY = "Write a job file as Kubernetes manifests, an Airflow DAG or a Dagster job."
RENDER_EXAMPLES = (
    "memedit render kubernetes --config job.yaml --schedule '0 2 * * *' --secret s3 --out k8s.yaml",
    "memedit render airflow --config job.yaml --schedule '0 2 * * *' --out dags/nightly.py",
    "memedit render kubernetes --config ingest.yaml --schedule '0 2 * * *' --head-gpus 1",
)
_SCHEDULERS: dict[str, tuple[type[RenderJob], str, str]] = {
    "kubernetes": (
        RenderKubernetesJob,
        "Manifests for KubeRay: a RayJob, or what starts one every night; without Ray for one pod.",
        "memedit render kubernetes --config job.yaml --workers 8 --gpus-per-worker 1 --secret s3",
    ),
    "airflow": (
        RenderPythonJob,
        "A DAG that runs the job on a Ray cluster; needs Airflow and Ray's client.",
        RENDER_EXAMPLES[1],
    ),
    "dagster": (
        RenderPythonJob,
        "A job and a schedule that run it on a Ray cluster; needs Dagster and Ray's client.",
        "memedit render dagster --config job.yaml --schedule '0 2 * * *' --out nightly.py",
    ),
}


def render_command(act: Callable[[RenderJob], None]) -> click.Command:
    """The command; `act` is called with what is to be rendered, checked."""
    group = click.Group(
        name="render",
        help=f"{RENDER_SUMMARY}\n\nThe job file is the one that `memedit edit --config` reads, or"
        " `memedit ingest --config`: that one has a section `source`.",
        short_help=RENDER_SUMMARY,
        epilog="\b\nExamples:\n" + "\n".join(f"  {example}" for example in RENDER_EXAMPLES),
        context_settings={"max_content_width": 100},
    )
    for name in _SCHEDULERS:
        group.add_command(_rendered(name, act))
    return group


def _rendered(scheduler: str, act: Callable[[RenderJob], None]) -> click.Command:
    kind, summary, example = _SCHEDULERS[scheduler]

    def callback(config: Path | None, assignments: tuple[str, ...], **flags: Any) -> None:
        if config is None:
            raise InputError(
                "missing; give --config, the job file that `memedit edit` or `ingest` reads",
                field="config",
            )
        options: Any = load_job(kind, flags=flags)
        spread = {name: flags[name] for name in ("workers", "gpus_per_worker")}
        if isinstance(options, RenderPythonJob):
            options = dataclasses.replace(options, scheduler=scheduler)
        from workflows.render import Source  # imports YAML, which --help should not wait for

        source = Source.read(config, flags=spread, assignments=assignments)
        zone = getattr(source.job, "time_zone", None)  # an ingestion may say it
        if flags["time_zone"] is None and zone is not None:
            options = dataclasses.replace(options, time_zone=zone)
        act(dataclasses.replace(options, source=source))

    parameters = [p for p in flags_of(kind) if p.name != "cache"]
    for parameter in parameters:
        if isinstance(parameter, click.Option) and parameter.name == "config":
            parameter.help = "The job file that `memedit edit` or `ingest` reads. [required]"
        if isinstance(parameter, click.Option) and parameter.name == "assignments":
            parameter.help = "Set a field of the job, the value read as YAML; repeatable."
            parameter.metavar = "SECTION.FIELD=VALUE"
    return JobCommand(
        name=scheduler,
        job=kind,
        callback=callback,
        params=parameters,
        help=summary,
        short_help=summary,
        examples=(example,),
    )
