"""What every source of facts has in common: rows since a mark, and where the next reading begins.

Knows no format and no table (`source_files`, `source_iceberg`, `source_delta`), and not what makes
a row a fact (`workflows.ingestion.rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from workflows.facts import Unreadable

Mark: TypeAlias = Mapping[str, Any]
"""How far a source was read, as JSON has it; what is in it is the source's own business."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One row as the source has it, with its place."""

    raw: Any
    """A mapping of columns to values; `Unreadable` where there is no such thing."""
    place: str
    """The file or table."""
    row: int
    """1-based row or line."""
    again: bool = False
    """It was read before: it says nothing new, unless no fact could be made of it then."""
    rewritten: bool = False
    """Of a file that was read before, and has been written anew as a whole since: it says nothing
    new where the source says the very same already."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is new in a source.

    `rows` is read once, in order: of two rows that contradict each other the later one is newer,
    unless they say themselves when they were written.
    """

    rows: Iterator[list[SourceRow]]
    """In portions of some thousand rows."""
    mark: Mark
    """Where the next reading begins, once this one was registered; final when `rows` was read."""
    snapshot: str
    """What was read, as a person would name it: a snapshot id, a table version, files."""
    complete: bool
    """Whether it is all that the source says: what it said before and is not here, is gone."""
    notes: tuple[str, ...] = ()
    """What a person should know of this reading."""


class Source(Protocol):
    """A place with rows of facts."""

    @property
    def name(self) -> str:
        """What its facts are known by; stays the same while the place may move."""

    def read(self, since: Mark | None) -> Reading | None:
        """What is new since a mark (None: everything); None where nothing is.

        Raises:
            InputError: There is no such place, it cannot be read, or a column is gone.
        """

    def settle(self, mark: Mark) -> None:
        """Do what is to be done with what was read, now that the registry has it."""


__all__ = ["Mark", "Reading", "Source", "SourceRow", "Unreadable"]
