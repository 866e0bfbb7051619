"""Which version should be there: the name that the active facts, the base and the settings give.

Knows the fact log, the base's checkpoint and the registry; loads no weights and writes nothing but
quarantines. How a version is made is in `workflows.ingest`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cluster.artifacts import open_artifacts
from cluster.current import Current, folder_of, parse_time
from cluster.registry import Registry
from cluster.store import ABSENT, join, open_file
from memedit.config import EditSettings, digest_of
from memedit.errors import InputError
from memedit.progress import Progress
from memedit.requests import EditRequest
from workflows.ingestion.claims import Held
from workflows.ingestion.compacted import compacted_at
from workflows.ingestion.fact_log import FactLog, request_of
from workflows.ingestion.head import Change, Difference, Head
from workflows.ingestion.merge import Merge
from workflows.ingestion.rows import DIGEST
from workflows.ingestion.runs import Runs
from workflows.ingestion.settings import IngestJob
from workflows.moments import STATS_NAME, TokenSource, corpus_of
from workflows.session import Base, contexts_of, encode_fact, open_base, settings_of
from workflows.settings import EditJob
from workflows.wording import plural

_VERSION = 1
"""Rises when the same facts and settings begin to give another model."""
_EXAMPLES = 20
_PORTION = 2000
_COLUMNS = (
    "id, subject, prompt, target_new, target_true, paraphrases, neighbourhood, source, place, row,"
    " relation, fact"
)


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
    seen: str
    """The token of CURRENT when it was looked at."""
    refused: int
    """How many facts were quarantined on the way."""
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
            f"SELECT {_COLUMNS} FROM state WHERE state = 'active' ORDER BY fact",
        )
        if self.on_top is None:
            return rows
        return [row for row in rows if row["fact"] in self.difference.added]

    @cached_property
    def requests(self) -> tuple[EditRequest, ...]:
        """What is written into the model."""
        return tuple(request_of(row) for row in self.rows)

    @cached_property
    def texts(self) -> frozenset[str]:
        """The prompts of all facts that are written, filled in."""
        return frozenset(request.text for request in self.requests)

    def sample(self, count: int) -> list[EditRequest]:
        """Facts that the version must say, new or old: those with the smallest digests."""
        rows = self.log.select(
            self.head,
            f"SELECT {_COLUMNS} FROM state WHERE state IN ('active', 'compacted') ORDER BY fact"
            f" LIMIT {int(count)}",
        )
        return [request_of(row) for row in rows]

    @cached_property
    def relations(self) -> Mapping[str, str]:
        """The relation of a fact by its id, where it has one."""
        return {row["id"]: row["relation"] for row in self.rows if row["relation"] is not None}

    def is_new(self, request: EditRequest) -> bool:
        """Whether CURRENT does not say this yet."""
        return request.digest[:DIGEST] in self.difference.added

    def record(self) -> dict[str, Any]:
        """What the record of the run says of the facts."""
        rows = self.log.select(
            self.head,
            "SELECT source, count(*) AS n FROM state WHERE state = 'active' GROUP BY source",
        )
        return {
            "sequence": self.head.sequence,
            "mode": "sequential" if self.sequential else "desired",
            "facts": self.counts,
            "by_source": {row["source"]: int(row["n"]) for row in rows},
            "previous": self.current,
        }

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
    active = log.count(head)
    settings = settings_of(edit, base, max(1, active), progress)
    refused = _unreadable(log, head, difference, base, settings)
    if refused:
        for reason in list(refused.values())[:5]:
            progress.message(f"a fact is quarantined: {reason}")
        head = quarantine(log, refused, run=job.run_id or "")
        difference = log.difference(head, since)
        active = log.count(head)
        settings = settings_of(edit, base, max(1, active), progress)
    sequential = job.mode == "sequential"
    run_id = _run_id(log, head, edit, base, settings, current if sequential else None)
    version = current.version if current else None
    exists = _is_whole(registry, run_id)
    is_current = version is not None and (
        (version == run_id and exists) or (sequential and not difference.added)
    )
    notes = []
    if refused:
        notes.append(f"{plural(len(refused), 'fact')} quarantined: this model cannot be asked")
    if baked is not None and (stuck := log.stuck(head)):
        notes.append(
            f"{plural(stuck, 'fact')} of the base retracted since: they stay in its weights"
        )
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
        exists=exists,
        seen=current.token if current else ABSENT,
        refused=len(refused),
        is_current=is_current,
        was_rolled_back=_rolled_back(current, run_id, runs.watermark()),
        sequential=sequential,
        notes=tuple(notes),
    )


def quarantine(log: FactLog, refused: Mapping[str, str], *, run: str) -> Head:
    """Take facts out, whoever says them: reason by the fact's digest."""

    def make(head: Head, merge: Merge) -> Change:
        rows = merge.database.execute(
            "SELECT source, fact FROM state WHERE claimed AND held IS NULL"
            " AND fact IN (SELECT unnest($facts))",
            {"facts": sorted(refused)},
        ).fetchall()
        held = [
            Held(source=source, fact=fact, held="quarantined", reason=refused[fact])
            for source, fact in rows
        ]
        merge.hold(held, run=run, rule=head.conflicts, priority=head.priority)
        return Change()

    return log.commit(make)


def _unreadable(
    log: FactLog,
    head: Head,
    difference: Difference,
    base: Base,
    settings: EditSettings,
) -> dict[str, str]:
    """Facts that cannot be put to the model, with the reason; only new ones are looked at."""
    contexts = contexts_of(settings, base, None)
    found: dict[str, str] = {}
    added = sorted(difference.added)
    for start in range(0, len(added), _PORTION):
        rows = log.select(
            head,
            "SELECT * FROM state WHERE state = 'active' AND fact IN (SELECT unnest($added))",
            {"added": added[start : start + _PORTION]},
        )
        for row in rows:
            try:
                encode_fact(request_of(row), base, contexts)
            except InputError as error:
                found[row["fact"]] = error.message
    return found


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
        chosen.of_method(),
        _digest_of_stats(edit.stats) if edit.stats else source.digest,
        edit.dtype,
        dict(edit.architecture),
        on_top.version if on_top else None,
    )[:16]


def _digest_of_stats(location: str) -> str:
    """Of given statistics, wherever they lie."""
    return hashlib.sha256(open_file(join(location, STATS_NAME)).read()).hexdigest()


def _is_whole(registry: Registry, run_id: str) -> bool:
    try:
        return not registry.require_whole(run_id).removing
    except InputError:
        return False


def _rolled_back(current: Current | None, run_id: str, watermark: Mapping[str, Any] | None) -> bool:
    """Whether people have moved CURRENT away from this version, and that still holds.

    It does until a run has moved CURRENT since, or has found that it is what the facts give.
    """
    moves = list(current.moves) if current else []
    while moves and moves[-1].by == "rollback":
        moves.pop()
    if current is None or len(moves) == len(current.moves) or not moves:
        return False
    back, seen = parse_time(current.moves[-1].moved_at), None
    if watermark is not None and watermark.get("run_id") == current.version:
        seen = parse_time(str(watermark.get("published_at")))
    confirmed = seen is not None and back is not None and seen >= back
    return moves[-1].version == run_id and not confirmed


def model_of(registry: Registry, desired: Desired) -> str | None:
    """Where the model lies that is edited, where it is not the base."""
    if desired.on_top is None:
        return None
    return join(registry.location, folder_of(desired.on_top))
