"""The commands over a registry: history, show, diff, rollback, pin, gc.

Each gives a mapping, which `--json` prints and `workflows.results` draws. What is safe to do at the
same time as what is known in `cluster.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.claims import Pin
from cluster.current import Current
from cluster.registry import open_registry
from cluster.retention import Plan, Rules, collect, make_plan
from cluster.store import ABSENT
from cluster.versions import Version, needs_of
from memedit.errors import InputError
from memedit.progress import Progress
from memedit.requests import EditBatch
from workflows.ingestion.fact_log import FactLog
from workflows.version_diff import (
    diff_facts,
    diff_metrics,
    diff_model,
    diff_settings,
    diff_updates,
    norms,
    read_version_facts,
)
from workflows.version_names import Found, find, registry_at, run_id_of
from workflows.version_settings import (
    DiffJob,
    GcJob,
    HistoryJob,
    PinJob,
    RollbackJob,
    ShowJob,
)


def run_history(job: HistoryJob, progress: Progress) -> dict[str, Any]:
    """All versions of a registry and the moves of CURRENT.

    Raises:
        InputError: There is no registry, or its CURRENT is damaged.
    """
    registry = open_registry(job.registry)
    current, pins = registry.current(), registry.pins()
    if job.page is not None:
        from workflows.ingestion.history_page import page_history
        from workflows.ingestion.page import write_page

        log = FactLog(job.registry, cache=job.cache_folder)
        write_page(page_history(log, registry), job.page)
    return {
        "registry": registry.location,
        "current": current.version if current else None,
        "versions": [_entry(version, current, pins) for version in registry.versions()],
        "moves": [asdict(move) for move in current.moves] if current else [],
    }


def _entry(version: Version, current: Current | None, pins: Mapping[str, Pin]) -> dict[str, Any]:
    """What `history` says of one version."""
    found: dict[str, Any] = {
        "version": version.name,
        "path": f"versions/{version.name}",
        "state": _state(version),
        "current": current is not None and version.name == current.version,
        "pinned": _pinned(pins.get(version.name)),
        "size_bytes": version.size_bytes,
        "problems": [] if version.unfinished else version.problems,
    }
    if (manifest := version.manifest) is not None:
        after = dict(manifest.metrics.get("after", {}))
        found |= {
            "created_at": manifest.created_at,
            "method": manifest.method,
            "format": manifest.format,
            "model": manifest.model.name,
            "layers": list(manifest.layers),
            "facts": manifest.facts.count,
            "score": after.get("score"),
            "metrics": after,
        }
    return found


def _state(version: Version) -> str:
    if version.removing:
        return "removing"
    if version.unfinished:
        return "unfinished"
    if version.damage:
        return "damaged"
    return "incomplete" if version.problems else "whole"


def _pinned(pin: Pin | None) -> dict[str, str] | None:
    return None if pin is None else {"pinned_at": pin.pinned_at, "why": pin.why}


def run_show(job: ShowJob, progress: Progress) -> dict[str, Any]:
    """All that is known of one version.

    Raises:
        InputError: There is no such version, or its manifest is damaged.
    """
    registry = registry_at(job.registry)
    found = find(job.version, registry, field="version")
    if registry is None or found.registry is None:
        sizes = found.files.sizes("", deep=True)
        version = Version(name=found.run_id, sizes=sizes, manifest=found.manifest)
        entry, needs = _entry(version, None, {}), needs_of(found.manifest)
    else:
        version = registry.version(found.run_id)
        entry, needs = _entry(version, registry.current(), registry.pins()), set(version.needs)
    return {
        "registry": found.registry,
        "location": found.location,
        **entry,
        "needs": sorted(needs),
        "updates": norms(found.manifest),
        "manifest": asdict(found.manifest),
    }


def run_diff(job: DiffJob, progress: Progress) -> dict[str, Any]:
    """What is new in one version against another.

    Raises:
        InputError: One of them is not there, or its table of facts is damaged.
    """
    registry = registry_at(job.registry)
    old, new = find(job.old, registry, field="old"), find(job.new, registry, field="new")
    facts = diff_facts(_facts_of(old, progress), _facts_of(new, progress))
    return {
        "registry": registry.location if registry else None,
        "old": {"version": old.run_id, "location": old.location},
        "new": {"version": new.run_id, "location": new.location},
        "facts": facts,
        "updates": diff_updates(old.manifest, new.manifest),
        "metrics": diff_metrics(old.manifest, new.manifest),
        "settings": diff_settings(old.manifest, new.manifest),
        "model": diff_model(old.manifest, new.manifest),
    }


def _facts_of(found: Found, progress: Progress) -> Any:
    requests = read_version_facts(found.files, found.manifest)
    if EditBatch.of(requests).digest != found.manifest.facts.digest:
        progress.message(
            f"{found.location}: {found.manifest.facts.file} was changed since it was published"
        )
    return requests


def run_rollback(job: RollbackJob, progress: Progress) -> dict[str, Any]:
    """Move CURRENT to another version that is whole.

    Raises:
        InputError: There is no such version, or it is not whole; CURRENT is where it was.
        LockError: CURRENT was moved by another run meanwhile, or the version is being removed.
    """
    registry = open_registry(job.registry, storage=job.storage_settings)
    seen = registry.current()
    to = run_id_of(job.to or "previous", registry, field="to")
    try:
        now = registry.move(to, expected=seen.token if seen else ABSENT, by="rollback")
    except InputError as error:
        raise InputError(
            f"{error.message}. {_stays(seen)}; memedit history shows what else there is",
            source=error.source,
            field="to" if job.to else None,
        ) from error
    return {
        "registry": registry.location,
        "moved": seen is None or seen.token != now.token,
        "from": seen.version if seen else None,
        "to": now.version,
        "path": now.path,
        "moved_at": now.moved_at,
    }


def _stays(seen: Current | None) -> str:
    return f"CURRENT stays at {seen.version}" if seen else "Nothing is CURRENT"


def run_pin(job: PinJob, progress: Progress) -> dict[str, Any]:
    """Keep a version until its pin is removed, or remove the pin.

    Raises:
        InputError: There is no such version.
        LockError: It is being removed at this moment.
    """
    registry = open_registry(job.registry, storage=job.storage_settings)
    if job.remove:
        # A pin can outlive its version, if that was removed by hand.
        pinned = job.version in registry.pins()
        run_id = job.version if pinned else run_id_of(job.version, registry, field="version")
        return {
            "registry": registry.location,
            "version": run_id,
            "pinned": False,
            "changed": registry.unpin(run_id),
        }
    if job.why is not None and not job.why.isprintable():
        raise InputError("must be one line without control characters", field="why")
    run_id = run_id_of(job.version, registry, field="version")
    pin = registry.pin(run_id, why=job.why or "")
    return {
        "registry": registry.location,
        "version": run_id,
        "pinned": True,
        "changed": True,
        "pinned_at": pin.pinned_at,
        "why": pin.why,
    }


def run_gc(job: GcJob, progress: Progress) -> dict[str, Any]:
    """Say what is not worth keeping, and why the rest is; with `run`, remove it.

    Raises:
        InputError: There is no registry, or its CURRENT is damaged; nothing was removed.
        LockError: Another run publishes there or removes; nothing was removed.
    """
    registry = open_registry(job.registry, storage=job.storage_settings)
    rules = Rules(keep=job.keep, keep_days=job.keep_days)
    if not job.run:
        plan = make_plan(registry, rules)
        return _gc_summary(registry.location, job, plan, plan.remove, plan.unfinished, ())
    done = collect(registry, rules)
    for name in done.spared:
        progress.message(f"{name} stays: somebody began to need it meanwhile")
    return _gc_summary(
        registry.location, job, done.plan, done.removed, done.unfinished, done.spared
    )


def _gc_summary(
    location: str,
    job: GcJob,
    plan: Plan,
    removed: tuple[Version, ...],
    unfinished: tuple[Version, ...],
    spared: tuple[str, ...],
) -> dict[str, Any]:
    return {
        "registry": location,
        "dry_run": not job.run,
        "kept": [{"version": name, "why": list(why)} for name, why in plan.kept.items()],
        "removed": [_removed(version) for version in removed],
        "unfinished": [_removed(version) for version in unfinished],
        "uploads": list(plan.uploads),
        "spared": list(spared),
        "size_bytes": sum(version.size_bytes for version in (*removed, *unfinished)),
    }


def _removed(version: Version) -> dict[str, Any]:
    return {
        "version": version.name,
        "created_at": version.manifest.created_at if version.manifest else None,
        "facts": version.manifest.facts.count if version.manifest else None,
        "size_bytes": version.size_bytes,
    }
