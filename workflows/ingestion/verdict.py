"""What was found when a version was judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from memedit.outcome import EditOutcome


@dataclass
class Verdict:
    """What was found; filled while a version is judged."""

    outcome: EditOutcome | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    """`before` and `after`, as in `edit --json`."""
    groups: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Metrics by group of facts: `new` and `all`."""
    missed: list[str] = field(default_factory=list)
    hurt: list[dict[str, Any]] = field(default_factory=list)
