"""Where a version goes: to a place of its own, or into a registry whose CURRENT it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cluster import removal
from cluster.current import ALIASES
from cluster.publication import Publication, open_publication
from cluster.registry import Registry
from cluster.storage import StorageSettings
from cluster.store import ABSENT, Guard, join, open_store
from memedit.errors import InputError, LockError, MemeditError
from workflows.settings import PublishJob


@contextmanager
def destination(job: PublishJob, run_id: str) -> Iterator[Publication]:
    """A publication to the job's `out` or `registry`; leaving the block moves CURRENT.

    Into a registry one run publishes at a time: it is locked until the block ends.

    Raises:
        InputError: The place cannot be written to, or is not empty.
        LockError: Another run publishes there, or CURRENT was moved meanwhile.
    """
    storage = job.storage_settings
    if job.out is not None:
        with open_publication(job.out, run_id=run_id, storage=storage) as publication:
            yield publication
        return
    assert job.registry is not None, "a job has one of the two"
    if run_id in ALIASES:
        raise InputError(f"{run_id} is what another version is called; name it", field="run_id")
    registry = Registry(open_store(job.registry, storage=storage))
    with (
        registry.store.lock() as guard,
        new_version(registry, run_id, guard=guard, storage=storage) as publication,
    ):
        yield publication


@contextmanager
def new_version(
    registry: Registry, run_id: str, *, guard: Guard | None, storage: StorageSettings
) -> Iterator[Publication]:
    """A publication into a registry that is locked; leaving the block moves CURRENT.

    Args:
        registry: The registry.
        run_id: Of the version.
        guard: What the lock of the registry's store gave.
        storage: How objects are stored.

    Raises:
        InputError: The place cannot be written to, or is not empty.
        LockError: CURRENT was moved meanwhile.
    """
    if guard is not None:
        guard.check()  # what lies there may be another run's by now
    if removal.is_decided(registry.store, run_id):  # and has not ended: somebody was killed
        removal.erase(registry.store, run_id)
    seen = registry.current()
    place = join(registry.location, f"versions/{run_id}")
    with open_publication(place, run_id=run_id, storage=storage, guard=guard) as publication:
        yield publication
    try:
        registry.move(run_id, expected=seen.token if seen else ABSENT, by="publish")
    except MemeditError as error:
        kind = LockError if isinstance(error, LockError) else MemeditError
        raise kind(
            f"{error}. The version {run_id} is published and whole; to use it:"
            f" memedit rollback --registry {registry.location} --to {run_id}"
        ) from error
