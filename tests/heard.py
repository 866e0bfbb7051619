"""A receiver of progress that remembers."""

from __future__ import annotations

from memedit.progress import Silent, UnitReport


class Heard(Silent):
    """Keeps the messages of a job, and how its units ended."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.units: list[UnitReport] = []

    def message(self, text: str, *, warning: bool = True) -> None:
        self.texts.append(text)

    def unit(self, report: UnitReport) -> None:
        self.units.append(report)
