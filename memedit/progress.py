"""What a running job tells the outside while it works.

Knows the three calls; does not know terminals or log formats (`workflows.progress`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """How a unit of work ended at a worker."""

    work: str
    """The worker's method: `count`, `targets`, `sum_keys`, `score`, …"""
    unit_id: int
    """Its number among the run's units of this work."""
    worker: str
    seconds: float
    attempt: int
    """1 for the first."""
    failure: str | None = None
    """Why it did not end well."""


class Progress(Protocol):
    """Receiver of progress. Stages, in order: load, stats, targets, solve, publish, evaluate."""

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        """A stage begins; `total` units of work (facts, tokens, layers …) are expected."""

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        """`done` more units are finished; `measures` such as `loss=0.21` or `error=0.03`."""

    def finish(self, stage: str) -> None:
        """The stage is over."""

    def message(self, text: str, *, warning: bool = True) -> None:
        """Something that a person should read, such as a warning."""

    def unit(self, report: UnitReport) -> None:
        """A unit of work has ended at a worker of a cluster, well or not; for logs and metrics."""


class Silent:
    """A receiver that drops everything."""

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        """Nothing."""

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        """Nothing."""

    def finish(self, stage: str) -> None:
        """Nothing."""

    def message(self, text: str, *, warning: bool = True) -> None:
        """Nothing."""

    def unit(self, report: UnitReport) -> None:
        """Nothing."""
