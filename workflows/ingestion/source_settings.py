"""The `source` section of an ingestion: one dataclass a kind of source.

Knows fields and their defaults; does not open anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What every kind of source can be told."""

    name: str = ""
    """What its facts are known by in the registry; by default from its kind and place."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of a fact -> column of the source; by default a field has the column of its name."""
    where: str | None = None
    """An SQL condition over the columns; other rows count as not there."""
    templates: Mapping[str, str | list[str]] | str | None = None
    """Relation -> prompt with `{}`, or a list: the prompt, then its paraphrases. A text names a
    YAML or JSON file that holds this."""


@dataclass(frozen=True, kw_only=True)
class FilesSettings(SourceSettings):
    """Files in a folder or under an `s3://` prefix."""

    kind: Literal["files"] = "files"
    path: str
    """A file, a folder, or a glob (`*`, `?`, `**`), here or at `s3://`."""
    complete: bool = False
    """The files together are the whole table: a fact that is in none of them any more is gone.
    Otherwise each new or changed file adds to what was said before."""
    after: Literal["keep", "archive", "delete"] = "keep"
    """What becomes of a file once its facts are registered; `archive` moves it into `archive/`
    beside it."""


@dataclass(frozen=True, kw_only=True)
class IcebergSettings(SourceSettings):
    """An Apache Iceberg table."""

    kind: Literal["iceberg"] = "iceberg"
    table: str
    """`namespace.table`."""
    catalog: str | Mapping[str, str]
    """The path of a SQLite catalog, the name of a catalog in `.pyiceberg.yaml`, or the properties
    of one (`{type: rest, uri: …}`)."""
    expired: Literal["rescan", "fail"] = "rescan"
    """What to do when the snapshot that was read last is gone: read the whole table, or stop."""


@dataclass(frozen=True, kw_only=True)
class DeltaSettings(SourceSettings):
    """A Delta Lake table."""

    kind: Literal["delta"] = "delta"
    path: str
    """Its folder or `s3://` prefix."""
    expired: Literal["rescan", "fail"] = "rescan"
    """What to do when the versions since the last reading are gone: read the whole table, or
    stop."""


AnySource: TypeAlias = FilesSettings | IcebergSettings | DeltaSettings
