"""Who needs a version: CURRENT, pins, and the holds of running commands.

    pins/<run_id>              kept until the pin is removed
    holds/<run_id>.<time>-<…>  kept while a command works with it

Whoever begins to need a version writes that down first and then looks whether the version, or one
that it needs itself, is being removed (`cluster.removal`). Knows no rules of how long versions are
kept (`cluster.retention`).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cluster import removal
from cluster.current import CURRENT_NAME, check_run_id, is_run_id, now, parse_time, read_current
from cluster.store import ABSENT, Store
from cluster.versions import join_of, require
from memedit.errors import InputError, LockError, MemeditError

PINS, HOLDS = "pins", "holds"
HOLD_DAYS = 7.0
"""A hold that is older than this was left by a command that died."""


@dataclass(frozen=True, kw_only=True)
class Pin:
    """Why a version is kept whatever the rules say."""

    version: str
    pinned_at: str
    why: str


def claims(store: Store) -> dict[str, list[str]]:
    """The versions that must not go, with the reasons.

    Raises:
        InputError: CURRENT is damaged.
    """
    found: dict[str, list[str]] = {}
    # Holds first: a move writes CURRENT and then gives up its hold, so read the other way round,
    # both could be missed.
    for _, run_id, since in _holds(store):
        if _living(since):
            found.setdefault(run_id, []).append("a running command holds it")
    if raw := store.get(CURRENT_NAME):
        current = read_current(*raw, source=join_of(store, CURRENT_NAME))
        found.setdefault(current.version, []).insert(0, "it is CURRENT")
        if current.previous:
            found.setdefault(current.previous, []).append("rollback leads to it")
    for run_id in _pinned(store):
        found.setdefault(run_id, []).append("it is pinned")
    return found


@contextmanager
def hold(store: Store, run_id: str) -> Iterator[None]:
    """Keep a version, and all that it needs, from being removed until the block ends.

    Raises:
        InputError: There is no such version.
        LockError: It, or a version that it needs, is being removed.
    """
    require(store, run_id)
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(8)}"
    name = f"{HOLDS}/{run_id}.{stamp}"
    store.put(name, b"{}\n", expected=ABSENT)
    try:
        _secure(store, run_id)
        yield
    finally:
        with suppress(MemeditError):  # it stops counting in a few days
            store.delete([name])


def drop_dead_holds(store: Store) -> None:
    """Remove what commands that died have left."""
    store.delete([name for name, _, since in _holds(store) if not _living(since)])


def pins(store: Store) -> dict[str, Pin]:
    """The pins by version; also of versions that are not there."""
    found = {run_id: store.get(f"{PINS}/{run_id}") for run_id in _pinned(store)}
    return {run_id: _pin(run_id, raw[0]) for run_id, raw in found.items() if raw is not None}


def pin(store: Store, run_id: str, *, why: str) -> Pin:
    """Keep a version until the pin is removed; a pin that is there gets the new reason.

    Raises:
        InputError: There is no such version.
        LockError: It is being removed, or somebody else pins it just now.
    """
    require(store, run_id)
    name = f"{PINS}/{run_id}"
    before = store.get(name)
    value = {"pinned_at": now(), "why": why, "nonce": secrets.token_hex(8)}
    content = f"{json.dumps(value, ensure_ascii=False)}\n".encode()
    store.put(name, content, expected=before[1] if before else ABSENT)
    try:
        _secure(store, run_id)
    except (InputError, LockError):
        store.delete([name])  # of whomever: it is too late for all
        raise
    return _pin(run_id, content)


def unpin(store: Store, run_id: str) -> bool:
    """Remove a pin; whether there was one."""
    name = f"{PINS}/{check_run_id(run_id)}"
    there = store.get(name) is not None
    store.delete([name])
    return there


def _secure(store: Store, run_id: str) -> None:
    """See that a version whose need was just written down stays, with all that it needs."""
    secured: set[str] = set()
    to_do = {run_id}
    while to_do:
        name = to_do.pop()
        secured.add(name)
        # In this order: after a removal there is neither a trace of it nor a manifest.
        removal.keep(store, name)
        to_do |= require(store, name) - secured


def _holds(store: Store) -> list[tuple[str, str, datetime | None]]:
    """Name of the object, version, since when."""
    found = []
    for name in store.sizes(HOLDS):
        run_id, _, stamp = name.rpartition("/")[2].partition(".")
        if is_run_id(run_id):
            found.append((name, run_id, parse_time(stamp.partition("-")[0])))
    return found


def _living(since: datetime | None) -> bool:
    return since is None or datetime.now(UTC) - since < timedelta(days=HOLD_DAYS)


def _pinned(store: Store) -> list[str]:
    names = (name.rpartition("/")[2] for name in store.sizes(PINS))
    return [name for name in names if is_run_id(name)]


def _pin(run_id: str, content: bytes) -> Pin:
    """A pin counts whatever is in it; only the reason is lost."""
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    texts = value if isinstance(value, dict) else {}
    pinned_at, why = (str(texts.get(name, "")) for name in ("pinned_at", "why"))
    return Pin(version=run_id, pinned_at=pinned_at, why=why)
