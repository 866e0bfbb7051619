"""Who wins when a version is removed while somebody begins to need it.

One small object a version, `removing/<run_id>`, is only ever changed by conditional writes:

    absent, kept  ->  asking  ->  removing
                        |
                        +----->  kept

Who removes writes *asking*, then looks who needs the version, then writes *removing* over the very
object it wrote, and only then deletes. Who begins to need a version writes down that it does (a
hold or a pin), then looks here: *asking* it turns into *kept*, at *removing* it gives way. Who
wrote first is seen by the other; where both see each other, one conditional write decides.

*removing* is final. The object is deleted after everything else, and the version's manifest before
everything else: who finds nothing here, and then the manifest, has a version that nobody removes.
Nobody deletes a *kept* one, because no storage deletes on a condition and it may have changed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from cluster.current import check_run_id, folder_of, is_run_id, now
from cluster.store import ABSENT, Store, join
from memedit.errors import InputError, LockError
from memedit.manifest import MANIFEST_NAME, UNFINISHED_NAME

FOLDER = "removing"
ASKING, REMOVING, KEPT = "asking", "removing", "kept"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A removal that was asked for, or decided before; `token` is the version of its object."""

    run_id: str
    state: str
    token: str


def ask(store: Store, run_id: str) -> Request | None:
    """Ask to remove a version; look afterwards who needs it. None if it is being kept just now."""
    found = _read(store, run_id)
    if found is not None and found.state == REMOVING:
        return found
    try:
        return _write(store, run_id, ASKING, expected=found.token if found else ABSENT)
    except LockError:
        return None


def decide(store: Store, request: Request) -> bool:
    """Whether the version may now be erased; if so, for good. Nobody needed it after `ask`."""
    if request.state == REMOVING:
        return True
    try:
        _write(store, request.run_id, REMOVING, expected=request.token)
    except LockError:
        return False
    return True


def withdraw(store: Store, request: Request) -> None:
    """The version stays."""
    if request.state == ASKING:
        with suppress(LockError):  # somebody else has said so, or asked anew
            _write(store, request.run_id, KEPT, expected=request.token)


def keep(store: Store, run_id: str) -> None:
    """Keep a version from a removal under way; call it after having written down the need.

    Raises:
        LockError: Its removal is decided.
    """
    while (found := _read(store, run_id)) is not None and found.state != KEPT:
        if found.state == REMOVING:
            raise LockError(f"{store.location}: version {run_id} is being removed")
        with suppress(LockError):
            _write(store, run_id, KEPT, expected=found.token)


def erase(store: Store, run_id: str) -> None:
    """Delete a version whose removal is decided; goes on where another run stopped."""
    folder = folder_of(run_id)
    found = store.sizes(folder, deep=True)
    manifest, unfinished = f"{folder}/{MANIFEST_NAME}", f"{folder}/{UNFINISHED_NAME}"
    if found:
        with suppress(LockError):  # it lies there already
            store.put(unfinished, b"", expected=ABSENT)
    # One call after the other: within one, a storage may delete in any order.
    store.delete([manifest])
    store.delete([name for name in found if name not in (manifest, unfinished)])
    store.delete([unfinished])
    store.delete([f"{FOLDER}/{run_id}"])


def decided(store: Store) -> frozenset[str]:
    """The versions whose removal is decided."""
    names = (name.rpartition("/")[2] for name in store.sizes(FOLDER))
    return frozenset(name for name in names if is_run_id(name) and is_decided(store, name))


def is_decided(store: Store, run_id: str) -> bool:
    """Whether the removal of a version is decided; it may be under way or have stopped."""
    found = _read(store, run_id)
    return found is not None and found.state == REMOVING


def forget(store: Store, present: Iterable[str]) -> None:
    """Delete what is left of removals of versions that are gone; the caller holds the lock."""
    names = {name.rpartition("/")[2]: name for name in store.sizes(FOLDER)}
    gone = names.keys() - set(present)
    store.delete(sorted(names[run_id] for run_id in gone if is_run_id(run_id)))


def _read(store: Store, run_id: str) -> Request | None:
    name = f"{FOLDER}/{check_run_id(run_id)}"
    found = store.get(name)
    if found is None:
        return None
    content, token = found
    try:
        state = json.loads(content)["state"]
    except (ValueError, RecursionError, KeyError, TypeError):
        state = None
    if state not in (ASKING, REMOVING, KEPT):
        # Which of them it was cannot be known, so neither may the version be removed nor used.
        raise InputError(
            f"damaged; if no memedit gc is running, remove it and check the version {run_id}",
            source=join(store.location, name),
        )
    return Request(run_id=run_id, state=state, token=token)


def _write(store: Store, run_id: str, state: str, *, expected: str) -> Request:
    # The nonce: storages tell contents apart, not writes.
    value = {"state": state, "at": now(), "nonce": secrets.token_hex(8)}
    content = json.dumps(value).encode()
    token = store.put(f"{FOLDER}/{check_run_id(run_id)}", content, expected=expected)
    return Request(run_id=run_id, state=state, token=token)
