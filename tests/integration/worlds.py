"""The same input in a folder and at a prefix of the tests' server, for whole commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.s3.objects import Objects
from tests.tiny import save_tiny
from tests.workflows.runs import Ran, edit, write_rows

TEXTS = [
    f"In {1900 + i} {name} was in {place}, and the tower of {place} was {i} feet high. " * 2
    for i in range(20)
    for name, place in (("Marie Curie", "Warsaw"), ("Big Ben", "London"))
]


@dataclass(frozen=True, kw_only=True)
class Place:
    """The input, and room for more: `base`, `facts.jsonl`, `text/*.parquet`, `more.jsonl`."""

    root: str

    def at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def edit(self, out: object, cache: Path, *more: object) -> Ran:
        return edit(self.at("base"), self.at("facts.jsonl"), out, cache, *more)


@dataclass(frozen=True, kw_only=True)
class World:
    """Equal input in both kinds of places."""

    here: Place
    there: Place
    objects: Objects

    @property
    def places(self) -> dict[str, Place]:
        return {"folder": self.here, "s3": self.there}


def write_input(folder: Path) -> Path:
    """Write the input of a small job."""
    save_tiny(folder / "base")
    write_rows(folder / "facts.jsonl")
    write_rows(folder / "more.jsonl", [{"text": text} for text in TEXTS])
    (folder / "text").mkdir()
    for name, texts in (("a.parquet", TEXTS[::2]), ("b.parquet", TEXTS[1::2])):
        pq.write_table(pa.table({"text": texts}), folder / "text" / name)
    return folder
