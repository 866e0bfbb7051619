"""The versions published at one place: which there are, which is CURRENT, what may go.

In a folder or `s3://` prefix alike, through `cluster.store.Store` only:

    versions/<run_id>/…        a version; without its manifest it is none (`cluster.versions`)
    CURRENT                    which version is to be used (`cluster.current`)
    pins/…, holds/…            versions that must stay (`cluster.claims`)
    removing/<run_id>          what became of a removal (`cluster.removal`)

CURRENT is moved under a hold on the version, so it never names, not even for a moment, one that may
go. Does not know how versions are made, nor how many are worth keeping (`cluster.retention`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster import claims, removal, versions
from cluster.claims import Pin
from cluster.current import (
    CURRENT_NAME,
    VERSIONS,
    Current,
    Move,
    content_of,
    folder_of,
    is_run_id,
    now,
    read_current,
)
from cluster.storage import StorageSettings
from cluster.store import ABSENT, Store, join, open_store
from cluster.versions import Version
from memedit.errors import InputError, LockError


@dataclass(frozen=True)
class Registry:
    """A place with versions.

    Example:
        seen = registry.current()
        with registry.store.lock():
            …  # write versions/<run_id>/, its manifest last
            registry.move(run_id, expected=seen.token if seen else ABSENT, by="publish")
    """

    store: Store
    threads: int = field(default=8, kw_only=True)
    """Manifests that are read at once."""

    @property
    def location(self) -> str:
        """The place as a person writes it."""
        return self.store.location

    def at(self, name: str) -> str:
        """Where an object of this registry lies."""
        return join(self.location, name)

    def exists(self) -> bool:
        """Whether anything was ever published here."""
        return VERSIONS in self.store.folders() or self.store.get(CURRENT_NAME) is not None

    def current(self) -> Current | None:
        """Where CURRENT is; None before the first version.

        Raises:
            InputError: It is damaged, or leads out of `versions/`.
        """
        found = self.store.get(CURRENT_NAME)
        return read_current(*found, source=self.at(CURRENT_NAME)) if found else None

    def move(self, run_id: str, *, expected: str, by: Literal["publish", "rollback"]) -> Current:
        """Move CURRENT to a version, unless somebody has moved it meanwhile.

        A version that is CURRENT already is left so; that counts as no move.

        Args:
            run_id: The version.
            expected: `Current.token` as the caller saw it; `ABSENT` where there was none.
            by: Why it is moved.

        Raises:
            InputError: There is no such version, or it is not whole.
            LockError: CURRENT was moved meanwhile, or the version is being removed.
        """
        folder_of(run_id)  # refuses what is no name
        seen = self.current()
        if (seen.token if seen else ABSENT) != expected:
            where = f"is at {seen.version}" if seen else "is gone"
            raise LockError(f"{self.location}: CURRENT was moved by another run; now it {where}")
        with self.hold(run_id):
            self.require_whole(run_id)
            if seen is not None and seen.version == run_id:
                return seen
            move = Move(version=run_id, moved_at=now(), by=by)
            content = content_of((*(seen.moves if seen else ()), move))
            token = self.store.put(CURRENT_NAME, content, expected=expected)
        return read_current(content, token, source=self.at(CURRENT_NAME))

    def ids(self) -> list[str]:
        """The run ids that have a folder, sorted; nothing in the folders is read."""
        return [name for name in self.store.folders(VERSIONS) if is_run_id(name)]

    def versions(self) -> list[Version]:
        """All versions, the newest first, then what is unfinished."""
        removing = removal.decided(self.store)
        return versions.list_versions(self.store, removing=removing, threads=self.threads)

    def version(self, run_id: str) -> Version:
        """See `cluster.versions.read_version`."""
        found = versions.read_version(self.store, run_id)
        return replace(found, removing=removal.is_decided(self.store, run_id))

    def require_whole(self, run_id: str) -> Version:
        """See `cluster.versions.require_whole`."""
        return versions.require_whole(self.store, run_id)

    def pins(self) -> dict[str, Pin]:
        """See `cluster.claims.pins`."""
        return claims.pins(self.store)

    def pin(self, run_id: str, *, why: str = "") -> Pin:
        """See `cluster.claims.pin`."""
        return claims.pin(self.store, run_id, why=why)

    def unpin(self, run_id: str) -> bool:
        """See `cluster.claims.unpin`."""
        return claims.unpin(self.store, run_id)

    def hold(self, run_id: str) -> AbstractContextManager[None]:
        """See `cluster.claims.hold`."""
        return claims.hold(self.store, run_id)

    def claims(self) -> dict[str, list[str]]:
        """See `cluster.claims.claims`."""
        return claims.claims(self.store)

    def remove(
        self, run_ids: Iterable[str], known: Mapping[str, Version] | None = None
    ) -> list[str]:
        """Remove versions that nobody claims; the caller holds the lock of the store.

        A version that is claimed (`claims`), or needed by one that is, stays; whether others need
        it is for the caller to know.

        Args:
            run_ids: The versions.
            known: Versions that were read already.

        Returns:
            Those that were removed.
        """
        requests = [r for run_id in run_ids if (r := removal.ask(self.store, run_id)) is not None]
        # Only now: whoever claims one from here on finds the request.
        needed = versions.closure(self.store, self.claims(), known)
        removed = []
        for request in requests:
            if request.run_id in needed:
                removal.withdraw(self.store, request)
            elif removal.decide(self.store, request):
                removal.erase(self.store, request.run_id)
                removed.append(request.run_id)
        return removed


def open_registry(location: str, *, storage: StorageSettings | None = None) -> Registry:
    """The registry at a folder or `s3://` prefix; `storage` is how its objects are stored.

    Raises:
        InputError: Nothing was ever published there.
    """
    registry = Registry(open_store(location, storage=storage))
    if not registry.exists():
        raise InputError(
            f"no registry: neither {CURRENT_NAME} nor {VERSIONS}/ is here",
            source=location,
            field="registry",
        )
    return registry
