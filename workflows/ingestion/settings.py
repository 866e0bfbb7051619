"""The jobs over a set of facts, as data; see `workflows.settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memedit.config import MethodName
from workflows.fields import option
from workflows.gates import Gate, parse_gate
from workflows.settings import MethodJob, StoringJob
from workflows.version_settings import RegistryJob


@dataclass(frozen=True, kw_only=True)
class IngestJob(MethodJob, StoringJob):
    """`memedit ingest`: make the model say what a table of facts says."""

    method: MethodName = option(
        "memit",
        "The editing method: memit, whose z vectors stay what they are from night to night, or"
        " memedit, whose repair seeks some anew each night.",
        group="Method",
    )
    registry: str = option(
        None,
        "The registry (folder or s3:// prefix): fact log, z vectors, statistics, versions.",
        group="Output",
        metavar="PLACE",
        required=True,
        location="path",
    )
    source: Mapping[str, Any] = option(
        {},
        "Where facts come from: `kind` (files, iceberg, delta) and its fields.",
        flag=False,
    )
    conflicts: Literal["newest", "priority", "refuse"] = option(
        "newest",
        "Of two answers to one question: the newest holds, that of the source that comes first in"
        " `priority`, or the one that stands until it is retracted.",
        group="Input",
    )
    priority: tuple[str, ...] = option(
        (), "A source, the most trusted first; repeatable.", group="Input", metavar="SOURCE"
    )
    on_bad_row: Literal["reject", "fail"] = option(
        "reject",
        "A row that is wrong: keep it in the dead letter, or stop before anything is written.",
        group="Input",
    )
    most_retracted: float = option(
        50.0,
        "Percent of a source's facts that may be gone at once; more is taken for a mistake.",
        group="Checks",
        metavar="PERCENT",
        at_least=0,
        at_most=100,
    )
    judged_new: int = option(
        1000, "New facts that are judged at most.", group="Checks", metavar="N", at_least=0
    )
    judged_all: int = option(
        500,
        "Facts out of all active ones that are judged, whatever is new; the same every night.",
        group="Checks",
        metavar="N",
        at_least=0,
    )
    gate: tuple[str, ...] = option(
        (),
        "Refuse to publish unless this holds: 'score>=80', 'all.efficacy>=previous-2',"
        " 'perplexity<=base*1.1'; repeatable.",
        group="Checks",
        metavar="GATE",
    )
    canary: str | None = option(
        None,
        "JSON lines of prompts with what the model must (`expect`) or must not (`forbid`) go on"
        " with.",
        group="Checks",
        metavar="FILE",
        location="path",
    )
    mode: Literal["desired", "sequential"] = option(
        "desired",
        "Solve all active facts from the base, or the new ones on top of the version before"
        " (drifts; for comparison).",
        group="Method",
    )
    dry_run: bool = option(
        False, "Say what is new and what would be done; change nothing.", group="Output"
    )
    every: str | None = option(
        None,
        "Stay and run whenever this cron line says, such as '0 2 * * *'.",
        group="Machine",
        metavar="CRON",
    )
    time_zone: str = option(
        "Etc/UTC", "Of --every, such as Europe/Berlin.", group="Machine", metavar="ZONE"
    )
    hooks: Mapping[str, Any] = option(
        {}, "Commands and webhooks that are told of `success` and `failure`.", flag=False
    )
    lineage: Mapping[str, Any] = option(
        {}, "Where OpenLineage events go: `file` or `url`.", flag=False
    )

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates, parsed."""
        return tuple(parse_gate(text) for text in self.gate)

    def check(self) -> None:
        """See `Job`: what stands in the nested sections is read once, before anything is done."""
        from workflows.ingestion.hooks import parse_hooks
        from workflows.ingestion.lineage import parse_lineage
        from workflows.ingestion.sources import parse_source

        parse_source(self.source)
        parse_hooks(self.hooks or None)
        parse_lineage(self.lineage or None)
        if self.every is not None:
            from workflows.ingestion.every import Schedule

            Schedule.of(self.every, self.time_zone)


@dataclass(frozen=True, kw_only=True)
class FactsListJob(RegistryJob):
    """`memedit facts list`: the facts of a registry."""

    state: Literal["active", "superseded", "retracted", "quarantined", "any"] = option(
        "active", "Only facts in this state.", group="Input"
    )
    contains: str | None = option(
        None, "Only facts with this text in subject or target.", group="Input", metavar="TEXT"
    )
    said_by: str | None = option(None, "Only of this source.", group="Input", metavar="SOURCE")
    limit: int = option(100, "Show this many.", group="Output", metavar="N", at_least=1)
    out: Path | None = option(
        None,
        "Write all of them as a fact table (.jsonl) instead of showing some.",
        group="Output",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class FactsAddJob(RegistryJob, StoringJob):
    """`memedit facts add`: facts by hand."""

    facts: str = option(
        None,
        "The fact table: JSON lines, JSON, Parquet or CSV; a path or s3:// object.",
        group="Input",
        metavar="FILE",
        positional=True,
        required=True,
        location="path",
    )
    name: str = option("manual", "The source they are known by.", group="Input", metavar="SOURCE")
    conflicts: Literal["newest", "refuse"] = option(
        "newest",
        "Of two answers to one question: the newest holds, or that which stands.",
        group="Input",
    )


@dataclass(frozen=True, kw_only=True)
class FactsChangeJob(RegistryJob, StoringJob):
    """`memedit facts retract` and `restore`: facts out of the desired state, or back into it."""

    ids: tuple[str, ...] = option(
        (),
        "Ids of facts, as `memedit facts list` shows them.",
        group="Input",
        metavar="ID...",
        positional=True,
        required=True,
    )
    why: str | None = option(
        None, "A word for those who ask later.", group="Output", metavar="TEXT"
    )


@dataclass(frozen=True, kw_only=True)
class FactsWhyJob(RegistryJob):
    """`memedit facts why`: all that is known of a fact."""

    what: str = option(
        None,
        "The id of a fact, or a subject.",
        group="Input",
        metavar="ID|SUBJECT",
        positional=True,
        required=True,
    )


@dataclass(frozen=True, kw_only=True)
class FactsRejectsJob(RegistryJob):
    """`memedit facts rejects`: rows that no fact was made of."""

    limit: int = option(50, "Show this many, the newest.", group="Output", metavar="N", at_least=1)
    out: Path | None = option(
        None,
        "Write the rows as they were (.jsonl), to mend them and ingest them again.",
        group="Output",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class CompactJob(RegistryJob, StoringJob):
    """`memedit compact`: a version becomes a base of its own."""

    version: str = option(
        "current",
        "Its run id or the beginning of it, current or previous.",
        group="Input",
        metavar="[VERSION]",
        positional=True,
    )
    out: str = option(
        None,
        "Folder or s3:// prefix for the new base; new or empty.",
        group="Output",
        metavar="PLACE",
        required=True,
        location="path",
    )
