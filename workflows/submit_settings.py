"""The commands about jobs on a Ray cluster, as data; see `workflows.settings`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflows.fields import option
from workflows.settings import Job


@dataclass(frozen=True, kw_only=True)
class RemoteJob(Job):
    """A command that talks to a cluster's job server."""

    address: str | None = option(
        None,
        "The cluster's dashboard, http://HOST:PORT. [default: $RAY_API_SERVER_ADDRESS]",
        group="Machine",
        metavar="URL",
    )


@dataclass(frozen=True, kw_only=True)
class SubmitJob(RemoteJob):
    """`memedit submit`: run another command on a cluster."""

    wait: bool = option(
        False,
        "Follow the run's log on stderr until it ends, and exit with its exit code.",
        group="Reporting",
    )
    runtime_env: Path | None = option(
        None,
        "Ray's runtime environment for the run: a YAML or JSON file.",
        group="Machine",
        metavar="FILE",
    )
    upload: bool = option(
        False,
        "Send the fact table along; without it, paths are those of the cluster's file system.",
        group="Input",
    )
    driver_cpus: float = option(
        0.0,
        "CPUs to reserve for the run's own process, which then may be on any machine of the"
        " cluster; with 0 it is on the head.",
        group="Machine",
        metavar="N",
        at_least=0,
    )
    driver_gpus: float = option(
        0.0,
        "GPUs to reserve for the run's own process.",
        group="Machine",
        metavar="N",
        at_least=0,
    )
    job: Any = option(None, "What to run.", flag=False)

    @property
    def run_id(self) -> str:
        """Of the run, in this command's own log, too."""
        return str(self.job.run_id)


@dataclass(frozen=True, kw_only=True)
class StatusJob(RemoteJob):
    """`memedit status`: what the submitted runs are doing."""

    name: str | None = option(
        None,
        "The run to tell of. [default: all of memedit]",
        group="Input",
        metavar="RUN_ID",
        positional=True,
    )


@dataclass(frozen=True, kw_only=True)
class NamedRunJob(RemoteJob):
    """A command about one run."""

    name: str = option(
        None,
        "The run.",
        group="Input",
        metavar="RUN_ID",
        positional=True,
        required=True,
    )


@dataclass(frozen=True, kw_only=True)
class LogsJob(NamedRunJob):
    """`memedit logs`: what a run has written."""

    follow: bool = option(False, "Go on until the run has ended.", group="Reporting")


@dataclass(frozen=True, kw_only=True)
class StopJob(NamedRunJob):
    """`memedit stop`: end a run cleanly."""
