"""The commands over the facts of a registry: list, add, retract, restore, why, rejects.

They change what should be so; the next ingestion makes it so. Each gives a mapping, which `--json`
prints and `workflows.fact_tables` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.current import VERSIONS
from cluster.storage import StorageSettings
from cluster.store import open_file
from memedit.errors import InputError
from memedit.layouts import to_row
from memedit.progress import Progress
from memedit.writing import whole_file
from workflows.facts import rows_of, write_facts
from workflows.ingestion.claims import Held
from workflows.ingestion.fact_log import FactLog, request_of
from workflows.ingestion.head import Change, Head
from workflows.ingestion.merge import Merge
from workflows.ingestion.register import register_table
from workflows.ingestion.runs import Runs
from workflows.ingestion.settings import (
    FactsAddJob,
    FactsChangeJob,
    FactsListJob,
    FactsRejectsJob,
    FactsWhyJob,
)
from workflows.ingestion.source import SourceRow
from workflows.settings import new_run_id
from workflows.version_settings import RegistryJob

_PORTION = 10_000


def open_log(job: RegistryJob, storage: StorageSettings | None = None) -> FactLog:
    """The fact log of a job's registry.

    Raises:
        InputError: Nothing was ever ingested or added there.
    """
    log = FactLog(job.registry, cache=job.cache_folder, storage=storage)
    if log.head().sequence == 0:
        raise InputError("no facts here: nothing was ingested or added yet", source=job.registry)
    return log


def run_list(job: FactsListJob, progress: Progress) -> dict[str, Any]:
    """Some facts, or all of them into a file.

    Raises:
        InputError: There is no fact log, or the file cannot be written.
    """
    log = open_log(job)
    head = log.head()
    conditions = ["true"]
    values: dict[str, str] = {}
    if job.state != "any":
        conditions.append("state = $state")
        values["state"] = job.state
    if job.contains is not None:
        conditions.append(
            "(contains(lower(subject), lower($text)) OR contains(lower(target_new), lower($text)))"
        )
        values["text"] = job.contains
    if job.said_by is not None:
        conditions.append("source = $source")
        values["source"] = job.said_by
    where = " AND ".join(conditions)
    if job.out is not None:
        rows = log.select(head, f"SELECT * FROM state WHERE {where} ORDER BY fact", values)
        write_facts(job.out, map(request_of, rows))
        return {"registry": log.location, "out": str(job.out), "written": len(rows)}
    total = log.select(head, f"SELECT count(*) AS n FROM state WHERE {where}", values)[0]["n"]
    rows = log.select(
        head,
        "SELECT id, state, subject, prompt, target_new, source, place, row, valid_from, valid_to,"
        f" reason FROM state WHERE {where} ORDER BY id, source LIMIT {job.limit}",
        values,
    )
    return {
        "registry": log.location,
        "states": dict(head.counts),
        "matching": total,
        "facts": [_plain(row) for row in rows],
    }


def run_add(job: FactsAddJob, progress: Progress) -> dict[str, Any]:
    """Add facts; all of them or none.

    Raises:
        InputError: A row is wrong, or contradicts what may not be contradicted.
    """
    file = open_file(job.facts)

    def rows() -> Iterator[list[SourceRow]]:
        portion: list[SourceRow] = []
        found = 0
        for number, raw in rows_of(file):
            portion.append(SourceRow(raw=raw, place=str(file), row=number))
            found += 1
            if len(portion) == _PORTION:
                yield portion
                portion = []
        if portion:
            yield portion
        if not found:
            raise InputError("no row in it", source=file)

    log = FactLog(job.registry, cache=job.cache_folder, storage=job.storage_settings)
    before = log.head()
    after = register_table(log, rows(), source=job.name, rule=job.conflicts, run=new_run_id())
    return _changed(log, before, after, "added")


def run_retract(job: FactsChangeJob, progress: Progress) -> dict[str, Any]:
    """Take facts out by hand, and every other claim to the same question.

    Raises:
        InputError: There is no such fact, or it does not hold.
    """
    why = job.why or "retracted by hand"

    def held(rows: Sequence[Mapping[str, Any]], name: str) -> list[Held]:
        live = [r for r in rows if r["claimed"] and r["held"] is None]
        mine = [r for r in live if r["id"] == name]
        if not mine:
            states = ", ".join(sorted({r["state"] for r in rows if r["id"] == name}))
            raise InputError(f"the fact {name!r} is {states} already", field="ids")
        asked = {r["question"] for r in mine}  # the id may have meant something else before
        return [
            Held(source=r["source"], fact=r["fact"], held="retracted", reason=why)
            for r in live
            if r["question"] in asked
        ]

    return _change(job, held, "retracted")


def run_restore(job: FactsChangeJob, progress: Progress) -> dict[str, Any]:
    """Let facts count again, and with them what was taken out to the same question.

    Raises:
        InputError: There is no such fact, or nobody has taken it out.
    """

    def held(rows: Sequence[Mapping[str, Any]], name: str) -> list[Held]:
        claimed = [r for r in rows if r["claimed"]]
        asked = {r["question"] for r in claimed if r["id"] == name}
        found = [
            r
            for r in claimed
            if (r["held"] == "retracted" and r["question"] in asked)
            or (r["held"] is not None and r["id"] == name)
        ]
        if not found:
            raise InputError(
                f"the fact {name!r} was not taken out by hand or by a run; to say it again:"
                " memedit facts add",
                field="ids",
            )
        return [Held(source=r["source"], fact=r["fact"], held=None, reason=None) for r in found]

    return _change(job, held, "restored")


def _change(
    job: FactsChangeJob,
    held: Callable[[Sequence[Mapping[str, Any]], str], list[Held]],
    what: str,
) -> dict[str, Any]:
    log = open_log(job, job.storage_settings)
    before = log.head()
    run = new_run_id()

    def make(head: Head, merge: Merge) -> Change:
        claims: dict[tuple[str, str], Held] = {}
        for name in job.ids:
            for claim in held(_same_question(merge, name), name):
                claims[claim.source, claim.fact] = claim
        merge.hold(list(claims.values()), run=run, rule=head.conflicts, priority=head.priority)
        return Change()

    return _changed(log, before, log.commit(make), what)


def _same_question(merge: Merge, name: str) -> list[dict[str, Any]]:
    """The claims with this id, and the others to the same questions."""
    names = ("source", "fact", "id", "question", "state", "claimed", "held")
    rows = merge.database.execute(
        f"SELECT {', '.join(names)} FROM state WHERE question IN"
        " (SELECT question FROM state WHERE id = $name)",
        {"name": name},
    ).fetchall()
    if not rows:
        raise InputError(f"no fact {name!r} in the registry", field="ids")
    return [dict(zip(names, row, strict=True)) for row in rows]


_SHOWN = 100
_MOST_EVENTS = 1_000_000


def _changed(log: FactLog, before: Head, after: Head, what: str) -> dict[str, Any]:
    since = {"since": before.sequence}
    changed = log.history(after, "sequence > $since", since, limit=_SHOWN)
    return {
        "registry": log.location,
        "what": what,
        "changed": log.count_history(after, "sequence > $since", since),
        "active": after.active,
        "facts": [
            {name: row[name] for name in ("id", "state", "subject", "target_new")}
            for row in changed
        ],
    }


def run_why(job: FactsWhyJob, progress: Progress) -> dict[str, Any]:
    """All that the log knows of a fact, and the versions that say it.

    Raises:
        InputError: There is no such fact.
    """
    log = open_log(job)
    head = log.head()
    found = log.select(
        head,
        "SELECT * FROM state WHERE id = $what OR subject = $what ORDER BY id, source",
        {"what": job.what},
    )
    if not found:
        raise InputError(f"no fact with the id or subject {job.what!r}", field="what")
    names = sorted({row["fact"] for row in found})
    events = log.history(
        head, "fact IN (SELECT unnest($facts))", {"facts": names}, limit=_MOST_EVENTS
    )
    runs = Runs(log.store)
    versions = [
        (name, runs.sequence_of(name)) for name in log.store.folders(VERSIONS) if runs.record(name)
    ]
    told: list[dict[str, Any]] = []
    for row in found:
        mine = [e for e in events if (e["source"], e["fact"]) == (row["source"], row["fact"])]
        told.append(
            {
                **to_row(request_of(row)),
                **_plain({n: row[n] for n in _TOLD}),
                "history": [_plain({n: e[n] for n in _EVENT}) for e in mine],
                "versions": [name for name, seen in versions if _active_at(mine, seen)],
            }
        )
    return {"registry": log.location, "facts": told}


_TOLD = (
    *("state", "reason", "superseded_by", "source", "place", "row", "snapshot", "relation"),
    *("valid_from", "valid_to", "said_at", "run", "fact"),
)
_EVENT = ("sequence", "changed_at", "state", "reason", "place", "row", "snapshot", "run")


def _active_at(events: Sequence[Mapping[str, Any]], sequence: int) -> bool:
    past = [event for event in events if event["sequence"] <= sequence]
    return bool(past) and past[-1]["state"] == "active"


def run_rejects(job: FactsRejectsJob, progress: Progress) -> dict[str, Any]:
    """The newest rows that no fact was made of; into a file as they were, to be mended.

    Raises:
        InputError: There is no fact log, or the file cannot be written.
    """
    log = open_log(job)
    limit = 10_000_000 if job.out is not None else job.limit
    rows = log.rejected(log.head(), limit=limit)
    if job.out is not None:
        _write_raw(job.out, [row["raw"] for row in rows])
        return {"registry": log.location, "out": str(job.out), "written": len(rows)}
    return {"registry": log.location, "rejects": [_plain(row) for row in rows]}


def _write_raw(path: Path, texts: Sequence[str]) -> None:
    with whole_file(path) as partial, partial.open("x", encoding="utf-8", newline="\n") as out:
        for text in texts:
            out.write(text.replace("\n", " ") + "\n")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Times as texts."""
    return {
        name: value.isoformat(timespec="seconds") if isinstance(value, datetime) else value
        for name, value in row.items()
    }
