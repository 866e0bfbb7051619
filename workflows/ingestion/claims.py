"""Claims as data: their table, who makes them, and how they are taken out.

What a set of claims comes to is in `workflows.ingestion.merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

import pyarrow as pa

from workflows.ingestion.rows import NEIGHBOURS, TEXTS, TIME

Rule: TypeAlias = Literal["newest", "priority", "refuse"]

CLAIMS = pa.schema(
    [
        ("id", pa.string()),
        ("state", pa.string()),
        ("subject", pa.string()),
        ("prompt", pa.string()),
        ("target_new", pa.string()),
        ("target_true", pa.string()),
        ("paraphrases", TEXTS),
        ("neighbourhood", NEIGHBOURS),
        ("relation", pa.string()),
        ("valid_from", TIME),
        ("valid_to", TIME),
        ("reason", pa.string()),
        ("superseded_by", pa.string()),
        ("source", pa.string()),
        ("place", pa.string()),
        ("row", pa.int64()),
        ("snapshot", pa.string()),
        ("run", pa.string()),
        ("said_at", TIME),
        ("claimed", pa.bool_()),
        ("held", pa.string()),
        ("fact", pa.string()),
        ("content", pa.string()),
        ("question", pa.string()),
        ("changed_at", TIME),
        ("sequence", pa.int64()),
    ]
)
"""One claim; a segment of the log holds those that changed, the state the last of each."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """Who says something, when, and what is done with contradictions."""

    source: str
    at: datetime
    run: str
    snapshot: str
    complete: bool
    rule: Rule
    priority: Sequence[str] = ()
    """Sources from the most trusted on; those not named come last."""
    guarded: bool = False
    """What contradicts is refused whatever the rule."""
    rule_is_new: bool = False
    """All contested questions are answered again."""
    rejected: Sequence[tuple[str | None, str, int]] = ()
    """Id, place and row of rows that no statement could be made of."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """A claim that is taken out (`retracted`, `quarantined`), or with None counts again."""

    source: str
    fact: str
    held: str | None
    reason: str | None
