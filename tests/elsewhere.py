"""A place that is not of this machine, as far as memedit can tell, and what was read there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from memedit.files import LocalFiles


@dataclass(frozen=True)
class Noted(LocalFiles):
    """A folder that notes which bytes of it are read."""

    reads: list[tuple[str, int, int]] = field(default_factory=list, compare=False)
    """(name, start, size) of each read."""
    opened: list[str] = field(default_factory=list, compare=False)
    """Names of what was opened, and so perhaps read from end to end."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self.reads.append((name, start, len(buffer)))
        super().read_into(name, start, buffer)

    def open(self, name: str) -> BinaryIO:
        self.opened.append(name)
        return super().open(name)


@dataclass(frozen=True)
class Elsewhere(Noted):
    """The same as a place that can only be asked for bytes."""

    asked_for: list[str] = field(default_factory=list, compare=False)
    """Names that a library wanted on a disk."""

    @property
    def location(self) -> str:
        return f"far://{self.root.name}"

    @property
    def here(self) -> Path | None:
        return None

    def folder(self, names: Iterable[str]) -> Path:
        self.asked_for.extend(names)
        return self.root
