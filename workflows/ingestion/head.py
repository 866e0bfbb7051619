"""Where a fact log is, as data: its head, what a change leaves, how two moments differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.store import ABSENT
from workflows.ingestion.claims import Rule
from workflows.ingestion.source import Mark


@dataclass(frozen=True, kw_only=True)
class Head:
    """What `facts/HEAD` says."""

    sequence: int = 0
    at: str = ""
    log: tuple[str, ...] = ()
    state: str | None = None
    rejects: tuple[str, ...] = ()
    read: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By source: its mark, kind, place and snapshot, and when it was read."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Claims by state."""
    conflicts: Rule = "newest"
    """What is done with contradictions, and with `priority` in which order of sources."""
    priority: tuple[str, ...] = ()
    token: str = ABSENT

    def mark(self, source: str) -> Mark | None:
        """How far a source was read."""
        found = self.read.get(source)
        mark: Mark | None = found["mark"] if found else None
        return mark

    @property
    def active(self) -> int:
        """How many facts hold."""
        return self.counts.get("active", 0)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a change leaves behind beside the claims that it touched."""

    rejects: Sequence[Mapping[str, Any]] = ()
    read: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rule: tuple[Rule, tuple[str, ...]] | None = None
    """What the registry does with contradictions from now on, and its priority."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What became of the facts between two moments."""

    added: frozenset[str] = frozenset()
    superseded: tuple[Mapping[str, Any], ...] = ()
    """Facts in whose place another one is now."""
    retracted: tuple[Mapping[str, Any], ...] = ()
