"""A scheduled run: make the model say what a table of facts says.

    published model = base + MEMIT(active facts)

Reads top to bottom as a run goes: what is new in the source is registered; the active facts, the
base and the settings give the name of the version that should be there; if it is not, it is made,
judged and published; then the watermark moves. Each step can be done twice, so a run that was
killed anywhere is simply run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from cluster import removal
from cluster.artifacts import open_artifacts
from cluster.registry import Registry
from cluster.store import Guard, Store, join
from memedit.errors import GateError, LockError
from memedit.progress import Progress
from workflows.destination import new_version
from workflows.edit import edit_facts
from workflows.editing import target_digests
from workflows.facts import FactTable
from workflows.ingestion.base_version import publish_base
from workflows.ingestion.desired import Desired, desired_state, model_of, quarantine
from workflows.ingestion.fact_log import FactLog
from workflows.ingestion.history_page import publish_page
from workflows.ingestion.notice import Notice
from workflows.ingestion.register import Registered, register
from workflows.ingestion.review import RefusedError, ReviewSample
from workflows.ingestion.runs import Runs
from workflows.ingestion.settings import IngestJob
from workflows.moments import TokenSource, corpus_of, moments_for
from workflows.progress import Timed
from workflows.session import Base, contexts_of, open_workers
from workflows.settings import EditJob, new_run_id


@dataclass(frozen=True, kw_only=True)
class IngestOutcome:
    """What a run has done; `summary()` is what `ingest --json` prints."""

    run_id: str
    """The version that should be there."""
    status: str
    """`published`, `unchanged`, `gated`, or `planned` by a dry run."""
    version: str | None
    """What CURRENT names now."""
    facts: Mapping[str, int]
    targets: Mapping[str, int] = field(default_factory=lambda: {"computed": 0, "reused": 0})
    metrics: Mapping[str, Any] = field(default_factory=dict)
    timings_s: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hurt: tuple[Mapping[str, Any], ...] = ()
    """Of a gated run: the facts that went badly, the worst first."""
    report: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of a dry run: some of the facts that are new or gone, and what would be done."""

    def summary(self) -> dict[str, Any]:
        """The JSON object that `ingest --json` prints."""
        found = asdict(self)
        found["path"] = None if self.version is None else f"versions/{self.version}"
        for name in ("hurt", "changes", "report"):
            if not found[name]:
                del found[name]
        if self.status == "gated":
            found |= {"ok": False, "exit_code": GateError.exit_code}
        return found


def run_ingest(job: IngestJob, progress: Progress) -> IngestOutcome | Mapping[str, Any]:
    """Run `memedit ingest`, once or whenever the schedule says.

    Raises:
        InputError: The input or the settings are wrong; nothing was written.
        LockError: Another run works on this registry.
    """
    if job.every is None:
        return ingest(job, progress)
    from workflows.ingestion.every import repeat

    def once() -> None:
        outcome = ingest(replace(job, run_id=new_run_id()), progress)
        progress.message(f"{outcome.run_id}: {outcome.status}", warning=False)

    repeat(job.every, job.time_zone, once, progress=progress)
    return {"status": "stopped", "every": job.every}


def ingest(job: IngestJob, progress: Progress) -> IngestOutcome:
    """One run; hooks and lineage are told how it ended."""
    notice = Notice(job, progress)
    notice.begun()
    try:
        outcome = _ingest(job, _Counting(progress), notice)
    except _BusyError:  # another run does the work: nothing has failed
        notice.left_out()
        raise
    except BaseException as error:
        notice.failed(error)
        raise
    notice.ended(outcome.summary())
    return outcome


def _ingest(job: IngestJob, timed: _Counting, notice: Notice) -> IngestOutcome:
    log = FactLog(job.registry, cache=job.cache_folder, storage=job.storage_settings)
    registry = Registry(log.store)
    attempt = job.run_id or new_run_id()
    if job.dry_run:
        log = log.scratch()
        registered = register(job, log, run=attempt, progress=timed)
        return _planned(job, log, registry, registered, timed)
    registered = register(job, log, run=attempt, progress=timed)
    notice.read(registered.snapshot)
    with _locked(log.store) as guard:
        outcome = _until_current(job, log, registry, guard, timed, attempt, registered)
        if outcome.status != "unchanged" or registered.snapshot is not None:
            _tell_history(log, registry, timed)
    return replace(
        outcome,
        timings_s=timed.timings_s | {"read": registered.seconds},
        notes=(*registered.notes, *outcome.notes),
        targets=timed.targets,
    )


class _BusyError(LockError):
    """Another run works on the registry."""


@contextmanager
def _locked(store: Store) -> Iterator[Guard | None]:
    with ExitStack() as held:
        try:
            guard = held.enter_context(store.lock())
        except LockError as error:
            raise _BusyError(str(error)) from error
        yield guard


def _tell_history(log: FactLog, registry: Registry, progress: Progress) -> None:
    """The page is for people: without it all is published just the same."""
    try:
        publish_page(log, registry)
    except Exception as error:
        progress.message(f"the history page was not written: {error}")


def _until_current(
    job: IngestJob,
    log: FactLog,
    registry: Registry,
    guard: Guard | None,
    timed: _Counting,
    attempt: str,
    registered: Registered,
) -> IngestOutcome:
    """Bring CURRENT to the version that should be there; begin anew where facts are refused."""
    refused = 0
    while True:
        desired = desired_state(job, edit_job(job), log, registry, timed)
        refused += desired.refused
        try:
            outcome = _reconcile(job, registry, desired, guard, timed, attempt, registered)
        except RefusedError as error:  # kept are the z vectors of all others
            quarantine(log, error.reasons, run=desired.run_id)
            refused += len(error.reasons)
            timed.begin_anew()
            continue
        return replace(outcome, facts={**outcome.facts, "rejected": registered.rejected + refused})


def _reconcile(
    job: IngestJob,
    registry: Registry,
    desired: Desired,
    guard: Guard | None,
    timed: Timed,
    attempt: str,
    registered: Registered,
) -> IngestOutcome:
    """Bring CURRENT to the version that should be there."""
    runs = Runs(registry.store, guard)
    done = IngestOutcome(
        run_id=desired.run_id,
        status="unchanged",
        version=desired.current,
        facts=desired.counts,
        notes=desired.notes,
    )
    if desired.is_nothing:
        return done
    if desired.is_current:
        assert desired.current is not None, "it is CURRENT"
        # A run may have been killed just before its end.
        runs.finish(desired.current, desired.head)
        return replace(done, metrics=_metrics_of(registry, desired.current))
    if desired.was_rolled_back:
        note = (
            f"CURRENT was rolled back from {desired.run_id}, which is what the facts give: it stays"
            " where it is until they or the settings change"
        )
        return replace(done, notes=(*desired.notes, note))
    if guard is not None:
        guard.check()
    if desired.exists:  # the facts are again what they were once
        registry.move(desired.run_id, expected=desired.seen, by="publish")
        runs.finish(desired.run_id, desired.head)
        metrics = _metrics_of(registry, desired.run_id)
        return replace(done, status="published", version=desired.run_id, metrics=metrics)
    if desired.run_id in registry.ids():  # damaged, or half removed
        removal.erase(registry.store, desired.run_id)
    facts = desired.record() | {"rejected": registered.rejected}
    runs.claim(desired.run_id, attempt=attempt, facts=facts)
    try:
        return _make(job, registry, desired, guard, timed, runs, done)
    except Exception as error:
        with suppress(Exception):  # what has ended the run is what is to be told
            runs.failed(desired.run_id, f"{type(error).__name__}: {error}")
        raise


def _metrics_of(registry: Registry, version: str) -> Mapping[str, Any]:
    manifest = registry.version(version).manifest
    return {} if manifest is None else manifest.metrics


def _make(
    job: IngestJob,
    registry: Registry,
    desired: Desired,
    guard: Guard | None,
    timed: Timed,
    runs: Runs,
    done: IngestOutcome,
) -> IngestOutcome:
    """Make the version that should be there, judge it, and publish it."""
    edit = edit_job(job, model=model_of(registry, desired))
    review = ReviewSample(job, desired, registry)
    if desired.on_top is not None:
        _count_on_base(edit, desired.base, desired, timed)
    facts = FactTable(
        source=join(registry.location, "facts"),
        requests=desired.requests,
        read=len(desired.requests),
    )
    try:
        with new_version(
            registry, desired.run_id, guard=guard, storage=job.storage_settings
        ) as publication:
            if not desired.requests:
                outcome = publish_base(desired, publication, timed)
            else:
                outcome = edit_facts(
                    edit,
                    facts,
                    publication,
                    timed,
                    run_id=desired.run_id,
                    review=review,
                    counted=desired.base,
                    notes={"ingest": desired.notes_for_manifest()},
                )
    except GateError as error:
        verdict = review.verdict
        return replace(
            done,
            status="gated",
            metrics=verdict.metrics,
            notes=(*done.notes, str(error)),
            hurt=tuple(verdict.hurt),
            report=runs.gated(desired.run_id, verdict),
        )
    runs.published(desired.run_id, desired.head, outcome, review.verdict)
    return replace(
        done,
        status="published",
        version=desired.run_id,
        metrics=dict(outcome.summary()["metrics"]),
        report=outcome.report,
    )


def _count_on_base(edit: EditJob, base: Base, desired: Desired, timed: Timed) -> None:
    """See that the base's second moments are there: the version on top has none of its own."""
    if edit.stats is not None:
        return
    artifacts = open_artifacts(
        edit.artifacts, cache=edit.cache_folder, storage=edit.storage_settings
    )
    source = TokenSource(
        corpus=corpus_of(edit),
        base=base,
        settings=desired.settings.moments,
        heldout_tokens=edit.evaluation_settings.heldout_tokens,
        artifacts=artifacts,
    )
    with open_workers(edit, base.spec(), timed) as executor:
        moments_for(
            source,
            base=base,
            settings=desired.settings,
            executor=executor,
            artifacts=artifacts,
            progress=timed,
        )
        source.heldout(executor, timed)


def _planned(
    job: IngestJob, log: FactLog, registry: Registry, registered: Registered, timed: Timed
) -> IngestOutcome:
    """What a run would do, by what is registered in a scratch copy."""
    edit = edit_job(job)
    desired = desired_state(job, edit, log, registry, timed)
    would, targets = "nothing", {"computed": 0, "reused": 0}
    if desired.is_current or desired.is_nothing or desired.was_rolled_back:
        pass
    elif desired.exists:
        would = "move CURRENT to a version that is there"
    else:
        would = "publish a new version"
        targets = _planned_targets(edit, desired)
    return IngestOutcome(
        run_id=desired.run_id,
        status="planned",
        version=desired.current,
        facts=desired.counts | {"rejected": registered.rejected + desired.refused},
        targets=targets,
        timings_s=timed.timings_s | {"read": registered.seconds},
        notes=(*registered.notes, *desired.notes),
        changes={
            "would": would,
            "solved": sum(targets.values()),
            "layers": list(desired.settings.layers),
            **desired.examples(),
        },
    )


def _planned_targets(edit: EditJob, desired: Desired) -> dict[str, int]:
    """How many z vectors a run would find, and how many are kept."""
    facts = len(desired.requests)
    if desired.settings.contexts.kind == "sampled" or desired.on_top is not None:
        return {"computed": len(desired.difference.added), "reused": 0}  # only known later
    artifacts = open_artifacts(
        edit.artifacts, cache=edit.cache_folder, storage=edit.storage_settings
    )
    contexts = contexts_of(desired.settings, desired.base, None)
    digests = target_digests(desired.requests, contexts, desired.base, desired.settings)
    kept = len(artifacts.kept_targets(digests.values()))
    return {"computed": facts - kept, "reused": kept}


def edit_job(job: IngestJob, *, model: str | None = None) -> EditJob:
    """The edit that an ingestion makes of its active facts, of `model` if not of the base."""
    shared = {f.name for f in fields(EditJob)} & {f.name for f in fields(IngestJob)}
    values: dict[str, Any] = {name: getattr(job, name) for name in shared}
    values |= {
        "model": model or job.model,
        "artifacts": job.artifacts or join(job.registry, "artifacts"),
        "facts": join(job.registry, "facts"),
        "on_bad_row": "skip",
        "gate": (),  # by the review
        "out": None,
    }
    return EditJob(**values)


class _Counting(Timed):
    """Counts the z vectors that were found, and those that were there."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress)
        self.targets = {"computed": 0, "reused": 0}
        self._own = 0

    def begin_anew(self) -> None:
        """What was found now will be there in the next attempt."""
        self._own = self.targets["computed"]
        self.targets["reused"] = 0

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        """Count and pass on."""
        if stage == "targets":
            reused = int(measures.get("reused", 0))
            own = min(reused, self._own)
            self._own -= own
            self.targets["reused"] += reused - own
            self.targets["computed"] += done - reused
        super().advance(stage, done, **measures)
