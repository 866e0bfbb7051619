"""Which version should be there: the name that the active facts, the base and the settings give.

Knows the fact log, the base's checkpoint and the registry; loads no weights and writes nothing but
quarantines. How a version is made is in `workflows.ingest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from cluster.artifacts import open_artifacts
from cluster.current import Current, folder_of
from cluster.registry import Registry
from cluster.store import join
from memedit.config import EditSettings, digest_of
from memedit.errors import InputError
from memedit.progress import Progress
from memedit.requests import EditRequest
from workflows.facts import FactTable, Reject
from workflows.ingestion.compacted import compacted_at
from workflows.ingestion.fact_log import Change, Difference, FactLog, Head, request_of
from workflows.ingestion.merge import Held, Merge
from workflows.ingestion.rows import DIGEST
from workflows.ingestion.runs import Runs
from workflows.ingestion.settings import IngestJob
from workflows.moments import TokenSource, corpus_of
from workflows.session import Base, contexts_of, encode_facts, open_base, settings_of
from workflows.settings import EditJob

_VERSION = 1
"""Rises when the same facts and settings begin to give another model."""
_EXAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class Desired:
    """The version that should be there, and what is."""

    run_id: str
    head: Head
    active: int
    """How many facts are to be said on top of the base."""
    log: FactLog = field(repr=False)
    base: Base = field(repr=False)
    settings: EditSettings = field(repr=False)
    difference: Difference = field(repr=False)
    """Against what CURRENT says."""
    current: str | None
    exists: bool
    """It was made before, and is whole."""
    is_current: bool
    was_rolled_back: bool
    """CURRENT was moved away from it by a person."""
    sequential: bool
    notes: tuple[str, ...] = ()

    @property
    def is_nothing(self) -> bool:
        """No fact holds, and none was ever published."""
        return self.current is None and not self.active

    @property
    def counts(self) -> dict[str, int]:
        """The facts of `ingest --json`, but for those that were rejected."""
        return {
            "active": self.active,
            "added": len(self.difference.added),
            "superseded": len(self.difference.superseded),
            "retracted": len(self.difference.retracted),
        }

    @property
    def on_top(self) -> str | None:
        """The version that is edited, where it is not the base."""
        return self.current if self.sequential else None

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The active facts as they lie in the log, in canonical order."""
        rows = self.log.select(
            self.head,
            "SELECT id, subject, prompt, target_new, target_true, paraphrases, neighbourhood,"
            " source, place, row, relation, fact FROM state WHERE state = 'active' ORDER BY fact",
        )
        if self.on_top is None:
            return rows
        return [row for row in rows if row["fact"] in self.difference.added]

    @cached_property
    def requests(self) -> tuple[EditRequest, ...]:
        """What is written into the model."""
        return tuple(request_of(row) for row in self.rows)

    @cached_property
    def relations(self) -> Mapping[str, str]:
        """The relation of a fact by its id, where it has one."""
        return {row["id"]: row["relation"] for row in self.rows if row["relation"] is not None}

    def is_new(self, request: EditRequest) -> bool:
        """Whether CURRENT does not say this yet."""
        return request.digest[:DIGEST] in self.difference.added

    def notes_for_manifest(self) -> dict[str, Any]:
        """What the manifest of the version says of where its facts are from."""
        return {
            "sequence": self.head.sequence,
            "mode": "sequential" if self.sequential else "desired",
            **self.counts,
        }

    def examples(self) -> dict[str, Any]:
        """Some of the facts that are new or gone."""
        added = self.log.select(
            self.head,
            "SELECT id, subject, prompt, target_new, fact FROM state WHERE state = 'active'"
            " AND fact IN (SELECT unnest($added)) ORDER BY id LIMIT $limit",
            {"added": sorted(self.difference.added), "limit": _EXAMPLES},
        )
        names = ("id", "subject", "target_new")

        def some(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            return [{name: row[name] for name in names} for row in rows[:_EXAMPLES]]

        return {
            "added": some(added),
            "superseded": some(self.difference.superseded),
            "retracted": some(self.difference.retracted),
        }


def desired_state(
    job: IngestJob, edit: EditJob, log: FactLog, registry: Registry, progress: Progress
) -> Desired:
    """What should be there, by the facts as they are now.

    A fact that the model cannot be asked about (too long, no place for the subject) is taken out of
    the active facts first, with its reason.

    Raises:
        InputError: The base or the settings are wrong.
    """
    base = open_base(edit, progress)
    head, current = log.head(), registry.current()
    runs = Runs(log.store)
    since = runs.sequence_of(current.version) if current else 0
    if (baked := compacted_at(log.store, base.checkpoint.digest)) is not None:
        log = log.on_base(baked)
    difference = log.difference(head, since)
    head, refused = _quarantine_unreadable(log, head, difference, edit, base, job, progress)
    if refused:
        difference = log.difference(head, since)
    active = log.count(head)
    settings = settings_of(edit, base, max(1, active), progress)
    sequential = job.mode == "sequential"
    run_id = _run_id(log, head, edit, base, settings, current if sequential else None)
    version = current.version if current else None
    is_current = version is not None and (
        version == run_id or run_id in runs.also(version) or (sequential and not difference.added)
    )
    notes = [f"{refused} facts cannot be put to this model and are quarantined"] if refused else []
    if sequential and (difference.retracted or difference.superseded):
        notes.append("--mode sequential cannot take facts out of the model")
    return Desired(
        run_id=run_id,
        head=head,
        active=active,
        log=log,
        base=base,
        settings=settings,
        difference=difference,
        current=version,
        exists=_is_whole(registry, run_id),
        is_current=is_current,
        was_rolled_back=_rolled_back(current, run_id),
        sequential=sequential,
        notes=tuple(notes),
    )


def quarantine(
    log: FactLog, rejects: Sequence[Reject], *, run: str, job: IngestJob, state: str = "quarantined"
) -> Head:
    """Take facts out of the active ones, each with its reason."""
    reasons = {str(reject.raw["id"]): reject.reason for reject in rejects}

    def make(head: Head, merge: Merge) -> Change:
        rows = merge.database.execute(
            "SELECT source, fact, id FROM state WHERE state = 'active'"
            " AND id IN (SELECT unnest($ids))",
            {"ids": sorted(reasons)},
        ).fetchall()
        held = [
            Held(source=source, fact=fact, held=state, reason=reasons[name])
            for source, fact, name in rows
        ]
        merge.hold(held, run=run, rule=job.conflicts, priority=job.priority)
        return Change()

    return log.commit(make)


def _quarantine_unreadable(
    log: FactLog,
    head: Head,
    difference: Difference,
    edit: EditJob,
    base: Base,
    job: IngestJob,
    progress: Progress,
) -> tuple[Head, int]:
    """Look at the facts that are new; those that were active before were looked at then."""
    rows = log.select(
        head,
        "SELECT * FROM state WHERE state = 'active' AND fact IN (SELECT unnest($added))",
        {"added": sorted(difference.added)},
    )
    if not rows:
        return head, 0
    table = FactTable(
        source=log.location, requests=tuple(request_of(row) for row in rows), read=len(rows)
    )
    settings = settings_of(edit, base, max(1, log.count(head)), progress)
    try:
        table, _ = encode_facts(table, base, contexts_of(settings, base, None), on_bad_row="skip")
        rejects = table.rejects
    except InputError:  # none of them can
        rejects = _all_rejected(table, edit, base, settings)
    if not rejects:
        return head, 0
    for reject in rejects[:5]:
        progress.message(f"fact {reject.raw['id']} is quarantined: {reject.reason}")
    return quarantine(log, rejects, run=job.run_id or "", job=job), len(rejects)


def _all_rejected(
    table: FactTable, edit: EditJob, base: Base, settings: EditSettings
) -> tuple[Reject, ...]:
    """The reason of each, where no fact of a table is left."""
    found: list[Reject] = []
    for request in table.requests:
        one = replace(table, requests=(request,))
        try:
            encode_facts(one, base, contexts_of(settings, base, None), on_bad_row="fail")
        except InputError as error:
            rejected = one.reject(request.case_id, error.message, field=error.field)
            found += rejected.rejects
    return tuple(found)


def _run_id(
    log: FactLog,
    head: Head,
    edit: EditJob,
    base: Base,
    settings: EditSettings,
    on_top: Current | None,
) -> str:
    source = TokenSource(
        corpus=corpus_of(edit),
        base=base,
        settings=settings.moments,
        heldout_tokens=edit.evaluation_settings.heldout_tokens,
        artifacts=open_artifacts(None, cache=edit.cache_folder),
    )
    chosen = replace(settings, targets=replace(settings.targets, tokens_per_batch=None))
    return digest_of(
        _VERSION,
        base.checkpoint.digest,
        log.digest(head),
        asdict(chosen),
        edit.stats or source.digest,
        edit.dtype,
        dict(edit.architecture),
        on_top.version if on_top else None,
    )[:16]


def _is_whole(registry: Registry, run_id: str) -> bool:
    try:
        registry.require_whole(run_id)
    except InputError:
        return False
    return True


def _rolled_back(current: Current | None, run_id: str) -> bool:
    if current is None or current.moves[-1].by != "rollback":
        return False
    return current.version != run_id and any(move.version == run_id for move in current.moves)


def model_of(registry: Registry, desired: Desired) -> str | None:
    """Where the model lies that is edited, where it is not the base."""
    if desired.on_top is None:
        return None
    return join(registry.location, folder_of(desired.on_top))
