"""`memedit submit COMMAND ...`: every command that runs a model, with its own flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from workflows.command_help import JobCommand, flags_of
from workflows.jobfile import JOBS, load_job
from workflows.settings import Job, new_run_id
from workflows.submit_settings import SubmitJob

SUMMARY = "Run a command on a Ray cluster, through its job server."
EXAMPLES = (
    "memedit submit --address http://head:8265 edit --config job.yaml --run-id night-1",
    "memedit submit --wait --json edit --facts s3://facts/today.parquet --registry s3://models/m",
)
_ELSEWHERE = ("config", "assignments", "cache")
"""What is said to the command itself."""


def submit_command(act: Callable[[SubmitJob], None]) -> click.Command:
    """The command; `act` is called with what is to be submitted, checked."""
    group = click.Group(
        name="submit",
        params=[p for p in flags_of(SubmitJob) if p.name not in _ELSEWHERE],
        help=f"{SUMMARY}\n\nThe flags of `submit` come before COMMAND, those of the command after"
        " it. Paths are those of the cluster's file system. The run id names the run there: what"
        " is submitted again under it is not started again.",
        short_help=SUMMARY,
        epilog="\b\nExamples:\n" + "\n".join(f"  {example}" for example in EXAMPLES),
        context_settings={"max_content_width": 100},
    )
    for name, kind in JOBS.items():
        if "run_id" in {field.name for field in dataclasses.fields(kind)}:
            group.add_command(_submitted(name, kind, act))
    return group


def _submitted(name: str, kind: type[Job], act: Callable[[SubmitJob], None]) -> click.Command:
    def callback(config: Path | None, assignments: tuple[str, ...], **flags: Any) -> None:
        from workflows.submit import submitted_defaults

        context = click.get_current_context()
        assert context.parent is not None
        options = load_job(SubmitJob, flags=context.parent.params)
        job: Any = load_job(
            kind,
            config=config,
            flags=flags,
            assignments=assignments,
            defaults=submitted_defaults(kind),
        )
        act(
            dataclasses.replace(
                options,
                job=dataclasses.replace(job, run_id=job.run_id or new_run_id()),
                json=options.json or job.json,
                debug=options.debug or job.debug,
            )
        )

    summary = f"Submit `memedit {name}`."
    return JobCommand(
        name=name,
        job=kind,
        callback=callback,
        params=flags_of(kind),
        help=summary,
        short_help=summary,
        examples=(f"memedit submit --address http://head:8265 {name} --config job.yaml",),
    )
