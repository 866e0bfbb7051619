"""The jobs over published versions, as data; see `workflows.settings`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workflows.fields import option
from workflows.settings import Job, PublishJob, StoringJob


@dataclass(frozen=True, kw_only=True)
class VerifyJob(Job):
    """`memedit verify`: check a published version against its manifest."""

    version: str = option(
        None,
        "The folder or s3:// prefix that holds memedit.json.",
        group="Input",
        metavar="PLACE",
        positional=True,
        required=True,
        location="path",
    )
    base: str | None = option(
        None,
        "Compare the tensors that were not edited with this model's. [default: the model that the"
        " version names, where it is at hand]",
        group="Input",
        metavar="MODEL",
        location=True,
    )
    quick: bool = option(
        False,
        "Read the edited tensors and the headers only; sizes and the storage's own checksums"
        " stand for the rest.",
        group="Checks",
    )


@dataclass(frozen=True, kw_only=True)
class ApplyJob(PublishJob):
    """`memedit apply`: a published delta and its base model in, the full checkpoint out."""

    delta: str = option(
        None,
        "The folder or s3:// prefix of a version that was published with --format delta.",
        group="Input",
        metavar="PLACE",
        positional=True,
        required=True,
        location="path",
    )
    model: str | None = option(
        None,
        "The base model. [default: the one that the delta names]",
        metavar="MODEL",
        location=True,
    )
    run_id: str | None = option(
        None,
        "Name of the version. [default: from the time]",
        group="Reporting",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class RegistryJob(Job):
    """A job over a registry of published versions."""

    registry: str = option(
        None,
        "The registry: a folder or s3:// prefix that `edit --registry` publishes into.",
        group="Input",
        metavar="PLACE",
        required=True,
        location="path",
    )


@dataclass(frozen=True, kw_only=True)
class HistoryJob(RegistryJob):
    """`memedit history`: the published versions."""

    page: Path | None = option(
        None,
        "Also write the history as a web page that needs nothing else.",
        group="Output",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class NamedVersionJob(Job):
    """A job over versions, each the name of one in a registry or a location."""

    registry: str | None = option(
        None,
        "The registry in which names are looked up: a folder or s3:// prefix.",
        group="Input",
        metavar="PLACE",
        location="path",
    )


@dataclass(frozen=True, kw_only=True)
class ShowJob(NamedVersionJob):
    """`memedit show`: all that is known of one version."""

    version: str = option(
        "current",
        "Its run id or the beginning of it, current, previous, or its folder or s3:// prefix.",
        group="Input",
        metavar="[VERSION]",
        positional=True,
        location=True,
    )


@dataclass(frozen=True, kw_only=True)
class DiffJob(NamedVersionJob):
    """`memedit diff`: what is new in one version against another."""

    old: str = option(
        "previous",
        "The version to compare with; see `memedit show`.",
        group="Input",
        metavar="[OLD]",
        positional=True,
        location=True,
    )
    new: str = option(
        "current",
        "The version to compare.",
        group="Input",
        metavar="[NEW]",
        positional=True,
        location=True,
    )


@dataclass(frozen=True, kw_only=True)
class RollbackJob(RegistryJob, StoringJob):
    """`memedit rollback`: use another version."""

    to: str | None = option(
        None,
        "The version to use: its run id or the beginning of it. [default: the one that was CURRENT"
        " before the last move to another]",
        group="Input",
        metavar="VERSION",
    )


@dataclass(frozen=True, kw_only=True)
class PinJob(RegistryJob, StoringJob):
    """`memedit pin`: keep a version whatever `gc` is told."""

    version: str = option(
        None,
        "Its run id or the beginning of it, current or previous.",
        group="Input",
        metavar="VERSION",
        positional=True,
        required=True,
    )
    remove: bool = option(False, "Remove the pin.", group="Output")
    why: str | None = option(
        None, "A word for those who ask later.", group="Output", metavar="TEXT"
    )


@dataclass(frozen=True, kw_only=True)
class GcJob(RegistryJob, StoringJob):
    """`memedit gc`: remove versions that are not worth keeping."""

    keep: int = option(
        10, "Keep this many of the newest versions.", group="Output", metavar="N", at_least=0
    )
    keep_days: float | None = option(
        None,
        "Keep versions that are younger than this, too.",
        group="Output",
        metavar="DAYS",
        at_least=0,
    )
    run: bool = option(
        False, "Remove them; without this, only say what would be removed.", group="Output"
    )
