"""Which versions of a registry are worth keeping, and the removal of the others.

Knows the rules. How a removal and those who begin to need a version at the same moment get along is
`cluster.removal`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cluster import claims, removal
from cluster.current import VERSIONS, is_run_id
from cluster.registry import Registry
from cluster.store import Store
from cluster.versions import Version, closure
from memedit.manifest import MANIFEST_NAME


@dataclass(frozen=True, kw_only=True)
class Rules:
    """A version that meets any of them stays, as does all that is claimed or needed."""

    keep: int = 10
    """The newest."""
    keep_days: float | None = None
    """Those that are younger than this."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would be removed now."""

    versions: tuple[Version, ...]
    """All that are finished, the newest first."""
    kept: Mapping[str, tuple[str, ...]]
    """The reasons of those that stay."""
    unfinished: tuple[Version, ...]
    """Folders without a manifest: of runs that died, or of one that publishes now."""
    uploads: tuple[str, ...]
    """Objects whose upload began and did not end; likewise."""

    @property
    def remove(self) -> tuple[Version, ...]:
        """Those that would go."""
        return tuple(version for version in self.versions if version.name not in self.kept)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was removed; the plan is of the moment at which it was made."""

    plan: Plan
    removed: tuple[Version, ...]
    unfinished: tuple[Version, ...]

    @property
    def spared(self) -> tuple[str, ...]:
        """Versions that somebody began to need meanwhile."""
        gone = {version.name for version in self.removed}
        return tuple(v.name for v in self.plan.remove if v.name not in gone)


def make_plan(registry: Registry, rules: Rules) -> Plan:
    """What would be removed and what stays, and why; changes nothing.

    Raises:
        InputError: CURRENT is damaged.
    """
    found = registry.versions()
    finished = {v.name: v for v in found if not v.unfinished}
    reasons = {n: list(why) for n, why in registry.claims().items() if n in finished}
    for version, why in _by_rules(finished.values(), rules):
        reasons.setdefault(version.name, []).append(why)
    for name in [name for name in finished if name in reasons]:
        for needed in sorted(closure(registry.store, [name], finished) - {name}):
            if needed in finished:
                reasons.setdefault(needed, []).append(f"{name} needs it")
    return Plan(
        versions=tuple(finished.values()),
        kept={name: tuple(reasons[name]) for name in finished if name in reasons},
        unfinished=tuple(v for v in found if v.unfinished),
        uploads=tuple(registry.store.uploads(VERSIONS)),
    )


def _by_rules(versions: Iterable[Version], rules: Rules) -> Iterator[tuple[Version, str]]:
    """Versions, the newest first, that the rules keep, and why."""
    newest = "it is the newest" if rules.keep == 1 else f"it is one of the {rules.keep} newest"
    rank, since = 0, datetime.now(UTC) - timedelta(days=rules.keep_days or 0)
    for version in versions:
        if version.removing:  # decided before, and by now perhaps half done
            continue
        if version.created is None:
            yield version, "what made it, and when, cannot be read"
            continue
        if rank < rules.keep:
            yield version, newest
        if rules.keep_days is not None and version.created > since:
            yield version, f"it is younger than {rules.keep_days:g} days"
        rank += 1


def collect(registry: Registry, rules: Rules) -> Collected:
    """Remove what is not worth keeping, and what runs that died have left.

    Raises:
        InputError: CURRENT is damaged; nothing was removed.
        LockError: Somebody publishes, or removes, at this moment; nothing was removed.
    """
    store = registry.store
    with store.lock():
        # Nobody publishes now, so what is unfinished was left by a run that died.
        plan = make_plan(registry, rules)
        known = {version.name: version for version in plan.versions}
        # At once, so that a lock that is lost later on does no harm to whoever publishes then.
        store.abort_uploads(VERSIONS)
        removed = registry.remove([version.name for version in plan.remove], known)
        unfinished = tuple(v for v in plan.unfinished if _erase_unfinished(store, v.name))
        claims.drop_dead_holds(store)
        removal.forget(store, registry.ids())
    gone = tuple(known[name] for name in removed)
    return Collected(plan=plan, removed=gone, unfinished=unfinished)


def _erase_unfinished(store: Store, name: str) -> bool:
    """Delete a folder without a manifest; whether it still was one."""
    folder = f"{VERSIONS}/{name}"
    if not is_run_id(name):
        store.delete(store.sizes(folder, deep=True))
        return True
    # A publisher that lost the lock, say in a laptop that slept, may have ended after all.
    if store.get(f"{folder}/{MANIFEST_NAME}") is not None:
        return False
    removal.erase(store, name)
    return True
