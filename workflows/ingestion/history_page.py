"""What the history page of a registry tells, gathered from its versions, runs and facts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.current import Current, now
from cluster.registry import Registry
from cluster.store import ABSENT
from cluster.versions import Version
from workflows.ingestion.fact_log import FactLog
from workflows.ingestion.head import Head
from workflows.ingestion.page import (
    SHOWN_REJECTS,
    PageHistory,
    PageReject,
    PageSource,
    PageVersion,
    write_page,
)
from workflows.ingestion.runs import Runs

PAGE = "history.html"


def publish_page(log: FactLog, registry: Registry) -> None:
    """Write the page into the registry, in place of what was there."""
    with tempfile.TemporaryDirectory(prefix="memedit-page-") as folder:
        path = Path(folder) / PAGE
        write_page(page_history(log, registry), path)
        found = registry.store.get(PAGE)
        registry.store.put(PAGE, path.read_bytes(), expected=found[1] if found else ABSENT)


def page_history(log: FactLog, registry: Registry) -> PageHistory:
    """All that the page tells.

    Raises:
        InputError: The registry is damaged.
    """
    head, current, runs = log.head(), registry.current(), Runs(log.store)
    pins = registry.pins()
    versions = [v for v in registry.versions() if v.manifest is not None]
    records = {v.name: runs.record(v.name) or {} for v in versions}
    return PageHistory(
        registry=registry.location,
        model=next((v.manifest.model.name for v in versions if v.manifest), ""),
        generated_at=now(),
        current=current.version if current else None,
        versions=tuple(_version(v, records[v.name], current, v.name in pins) for v in versions),
        sources=tuple(_sources(log, head)),
        rejects=tuple(_reject(row) for row in log.rejected(head, limit=SHOWN_REJECTS)),
        rejects_total=log.count_rejected(head),
        states=dict(head.counts),
    )


def _version(
    version: Version, record: Mapping[str, Any], current: Current | None, pinned: bool
) -> PageVersion:
    manifest = version.manifest
    assert manifest is not None, "only versions with one are shown"
    moves = [m for m in (current.moves if current else ()) if m.version == version.name]
    by: Literal["publish", "rollback", ""] = ""
    if moves:
        by = "rollback" if moves[-1].by == "rollback" else "publish"
    facts = record.get("facts", {})
    return PageVersion(
        run_id=version.name,
        created_at=manifest.created_at,
        moved_at=moves[-1].moved_at if moves else None,
        current=current is not None and current.version == version.name,
        method=manifest.method,
        facts=manifest.facts.count,
        added=facts.get("added"),
        superseded=facts.get("superseded"),
        retracted=facts.get("retracted"),
        rejected=record.get("rejected"),
        metrics=dict(manifest.metrics.get("after", {})),
        path=f"versions/{version.name}",
        pinned=pinned,
        problems=tuple(version.problems),
        by=by,
        sources=dict(record.get("by_source", {})),
    )


def _sources(log: FactLog, head: Head) -> list[PageSource]:
    rows = log.select(
        head,
        "SELECT source, count(*) FILTER (state = 'active') AS active FROM state GROUP BY source"
        " ORDER BY source",
    )
    found = []
    for row in rows:
        read = head.read.get(row["source"], {})
        found.append(
            PageSource(
                name=row["source"],
                kind=str(read.get("kind", "by hand")),
                place=str(read.get("place", "")),
                active=int(row["active"]),
                last_read=read.get("read_at"),
                snapshot=read.get("snapshot"),
            )
        )
    return found


def _reject(row: Mapping[str, Any]) -> PageReject:
    return PageReject(
        at=row["rejected_at"].isoformat(timespec="seconds"),
        source=row["source"],
        place=row["place"],
        row=row["row"] or None,
        field=row["field"],
        reason=row["reason"],
        raw=row["raw"],
    )
