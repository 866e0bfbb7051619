"""What a running job tells the outside while it works.

Knows the three calls; does not know terminals or log formats (`workflows.progress`).
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receiver of progress. Stages, in order: load, stats, targets, solve, publish, evaluate."""

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        """A stage begins; `total` units of work (facts, tokens, layers …) are expected."""

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        """`done` more units are finished; `measures` such as `loss=0.21` or `error=0.03`."""

    def finish(self, stage: str) -> None:
        """The stage is over."""

    def message(self, text: str) -> None:
        """Something that a person should read, such as a warning."""


class Silent:
    """A receiver that drops everything."""

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        """Nothing."""

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        """Nothing."""

    def finish(self, stage: str) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""
