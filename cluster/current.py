"""`CURRENT`: which version of a registry is to be used, and the moves that led there.

Knows what the object says and how to read it without trusting it. Does not know when it may be
moved (`cluster.registry`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from memedit.errors import InputError

CURRENT_NAME = "CURRENT"
VERSIONS = "versions"
"""The folder of the versions."""
ALIASES = ("current", "previous")
"""What people call two of the versions; no version should be named so."""
MOST_MOVES = 1000
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


def is_run_id(name: str) -> bool:
    """Whether a name can be that of a version; such a name leaves no folder and hides nothing."""
    return _RUN_ID.fullmatch(name) is not None


def check_run_id(name: str) -> str:
    """The name of a version, unchanged.

    Raises:
        InputError: It has other characters than letters, digits, `_` and `-`.
    """
    if not is_run_id(name):
        raise InputError(
            f"{name!r} is no name of a version; that is letters, digits, _ and -", field="version"
        )
    return name


def folder_of(run_id: str) -> str:
    """The folder of a version in its registry."""
    return f"{VERSIONS}/{check_run_id(run_id)}"


def now() -> str:
    """The time (UTC) to the second, as it stands in a registry."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def parse_time(text: str) -> datetime | None:
    """A time as it stands in a registry; None if it is none. Without a zone it is UTC."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of CURRENT; `by` is `publish` or `rollback`."""

    version: str
    moved_at: str
    by: str


@dataclass(frozen=True, kw_only=True)
class Current:
    """Where CURRENT is. `moves`: oldest first, the last is that to `version`; never empty."""

    moves: tuple[Move, ...]
    token: str
    """The version of the object; who moves it says which one it saw."""

    @property
    def version(self) -> str:
        """The run id of the version to be used."""
        return self.moves[-1].version

    @property
    def path(self) -> str:
        """Its folder in the registry."""
        return folder_of(self.version)

    @property
    def moved_at(self) -> str:
        """When it became the one to be used."""
        return self.moves[-1].moved_at

    @property
    def previous(self) -> str | None:
        """The version before the last move to another version."""
        others = (move.version for move in reversed(self.moves) if move.version != self.version)
        return next(others, None)


def content_of(moves: tuple[Move, ...]) -> bytes:
    """CURRENT after these moves."""
    last = moves[-1]
    value = {
        "version": last.version,
        "path": folder_of(last.version),
        "moved_at": last.moved_at,
        "by": last.by,
        "moves": [asdict(move) for move in moves[-MOST_MOVES:]],
    }
    return f"{json.dumps(value, indent=1)}\n".encode()


def read_current(content: bytes, token: str, *, source: str) -> Current:
    """CURRENT from its bytes.

    Raises:
        InputError: It is damaged, or names something that is no version of this registry.
    """

    def damaged(what: str) -> InputError:
        return InputError(
            f"damaged: {what}. Remove it, then say which version to use:"
            " memedit rollback --registry … --to VERSION",
            source=source,
        )

    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise damaged("not a JSON object")
    last = _move(value)
    if last is None:
        raise damaged("version, moved_at and by are wanted, as published")
    if value.get("path") != folder_of(last.version):
        raise damaged(f"path must be {folder_of(last.version)!r}, but it is {value.get('path')!r}")
    listed = value.get("moves")
    moves = [_move(each) for each in listed] if isinstance(listed, list) else [None]
    found = tuple(move for move in moves if move is not None)
    if len(found) < len(moves):
        raise damaged("moves must be a list of {version, moved_at, by}")
    if not found or found[-1] != last:
        raise damaged("the last of the moves leads to another version")
    return Current(moves=found, token=token)


def _move(value: Any) -> Move | None:
    if not isinstance(value, Mapping):
        return None
    version, moved_at, by = (value.get(name) for name in ("version", "moved_at", "by"))
    if not (isinstance(version, str) and isinstance(moved_at, str) and isinstance(by, str)):
        return None
    if not is_run_id(version) or parse_time(moved_at) is None:
        return None
    return Move(version=version, moved_at=moved_at, by=by)
