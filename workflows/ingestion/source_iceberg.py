"""An Apache Iceberg table as a source of facts: the rows appended since a snapshot, or all of them.

Knows catalogs, snapshots and what may have happened between two of them; does not know what makes a
row a fact. Reads, and never writes: neither to the table nor to its catalog.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from memedit.errors import InputError
from workflows.ingestion.source import Mark, Reading, Source
from workflows.ingestion.source_settings import IcebergSettings
from workflows.ingestion.where import portions, require_columns, require_condition
from workflows.wording import did_you_mean, without_keys

if TYPE_CHECKING:
    import pyarrow as pa
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import FileScanTask, Table
    from pyiceberg.table.snapshots import Snapshot

_MISSING = "pyiceberg is not installed; pip install 'memedit[iceberg]'"
_CATALOG, _TABLE = "source.catalog", "source.table"
_PUBLIC = frozenset({"type", "name", "uri", "warehouse"})
"""Properties of a catalog that are no secret, but for a password in a `uri`."""
_SHOWN = 20
"""How many tables a message lists."""


class IcebergSource(Source):
    """A table of an Iceberg catalog."""

    def __init__(self, settings: IcebergSettings) -> None:
        self.settings = settings

    @property
    def name(self) -> str:
        """See `Source`."""
        return self.settings.name or f"iceberg:{self.settings.table}"

    def read(self, since: Mark | None) -> Reading | None:
        """See `Source`; the rows of a file that was added later come later.

        Raises:
            InputError: The package, catalog, table or a column is missing, the table cannot be
                read, or the snapshot read last is gone and that is to be an error.
        """
        try:
            import pyiceberg.table  # noqa: F401
            import sqlalchemy  # noqa: F401
        except ImportError:
            raise InputError(_MISSING, source=self.settings.table, field="source.kind") from None
        opened = _Opened.of(self.settings)
        current = opened.table.current_snapshot()
        if current is None and since is None:
            return None
        mark = {
            "table_uuid": str(opened.table.metadata.table_uuid),
            "snapshot": None if current is None else current.snapshot_id,
        }
        if since == mark:
            return None
        if current is None:
            return Reading(
                rows=iter(()),
                mark=mark,
                snapshot="no snapshot",
                complete=True,
                notes=("the table has no snapshot any more: it is read as empty",),
            )

        schema = opened.schema()
        require_columns(self.settings.columns, schema.names, source=self.settings.table)
        require_condition(self.settings.where, schema, source=self.settings.table)
        appended, why = None, None
        if since is not None and since.get("snapshot") is not None:
            appended, why = self._appended(opened.table, current, mark, since)
        tasks = opened.all_of(current) if appended is None else opened.added_by(appended)
        return Reading(
            rows=portions(
                opened.batches(tasks), place=self.settings.table, where=self.settings.where
            ),
            mark=mark,
            snapshot=f"snapshot {current.snapshot_id}",
            complete=appended is None,
            notes=() if why is None else (f"read the whole table: {why}",),
        )

    def settle(self, mark: Mark) -> None:
        """See `Source`; a table stays as it is."""

    def _appended(
        self, table: Table, current: Snapshot, mark: Mark, since: Mark
    ) -> tuple[list[Snapshot] | None, str | None]:
        """The snapshots since a mark that added rows, oldest first, or why that is not enough."""
        from pyiceberg.table.snapshots import Operation, ancestors_of

        if since.get("table_uuid") != mark["table_uuid"]:
            return None, "it is another one than was read last, under the same name"
        last = since.get("snapshot")
        history = list(ancestors_of(current, table.metadata))
        ids = [snapshot.snapshot_id for snapshot in history]
        if last not in ids:
            gone = (
                f"snapshot {last}, which was read last, has expired"
                if table.metadata.snapshot_by_id(last or 0) is None
                else f"snapshot {last}, which was read last, is not in the history of the current"
                f" one, {current.snapshot_id} (a rollback)"
            )
            if self.settings.expired == "fail":
                raise InputError(
                    f"{gone}; what has changed since cannot be told. With `expired: rescan` the"
                    " whole table is read; keep snapshots for longer than the time between two"
                    " readings",
                    source=self.settings.table,
                    field="source.expired",
                )
            return None, gone

        since_last = history[: ids.index(last)]
        appended = []
        for snapshot, before in zip(since_last, history[1:], strict=False):
            if _only_adds(snapshot):
                appended.append(snapshot)
            elif not _only_moves(snapshot, before):
                operation = snapshot.summary.operation if snapshot.summary else None
                what = operation.value if isinstance(operation, Operation) else "unknown operation"
                return None, f"snapshot {snapshot.snapshot_id} ({what}) did more than add rows"
        return appended[::-1], None


def _count(snapshot: Snapshot, key: str) -> int:
    text = snapshot.summary.get(key) if snapshot.summary else None
    return int(text) if text else 0


def _only_adds(snapshot: Snapshot) -> bool:
    """Whether a snapshot has rows that the one before did not have, and all that it had."""
    from pyiceberg.table.snapshots import Operation

    return (
        snapshot.summary is not None
        and snapshot.summary.operation == Operation.APPEND
        and not any(_count(snapshot, k) for k in ("deleted-data-files", "added-delete-files"))
    )


def _only_moves(snapshot: Snapshot, before: Snapshot) -> bool:
    """Whether a snapshot has the same rows as the one before, in other files.

    That is what `replace` means; the counts are asked for in case that its writer saw it otherwise.
    """
    from pyiceberg.table.snapshots import Operation

    total = "total-records"
    return (
        snapshot.summary is not None
        and snapshot.summary.operation == Operation.REPLACE
        and _count(snapshot, "added-records") == _count(snapshot, "deleted-records")
        and not any(_count(snapshot, k) for k in ("added-delete-files", "removed-delete-files"))
        and bool(snapshot.summary.get(total))
        and _count(snapshot, total) == _count(before, total)
    )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A table as it was when it was opened."""

    table: Table
    name: str
    secrets: frozenset[str]

    @classmethod
    def of(cls, settings: IcebergSettings) -> _Opened:
        """Open a table.

        Raises:
            InputError: There is none.
        """
        from pyiceberg.catalog import load_catalog
        from pyiceberg.exceptions import NoSuchTableError

        namespace, _, table = settings.table.rpartition(".")
        if not namespace or not table:
            raise InputError("must be `namespace.table`", source=settings.table, field=_TABLE)
        name, properties, shown = _catalog(settings)
        secrets = _secrets(properties)
        with _told(shown, _CATALOG, secrets):
            catalog = load_catalog(name, **properties)
        with _told(settings.table, _TABLE, secrets):
            try:
                return cls(
                    table=catalog.load_table(settings.table), name=settings.table, secrets=secrets
                )
            except NoSuchTableError:
                missing = _no_such_table(catalog, namespace, table)
        raise InputError(missing, source=shown, field=_TABLE)

    def schema(self) -> pa.Schema:
        """Its columns as they are now, which snapshots before a change of them lack."""
        with self._reading():
            return self.table.schema().as_arrow()

    def added_by(self, snapshots: list[Snapshot]) -> list[FileScanTask]:
        """What to read for the rows that these snapshots appended, one after the other."""
        tasks: list[FileScanTask] = []
        for snapshot in snapshots:
            with self._reading():
                added = self.table.incremental_append_scan(
                    from_snapshot_id_exclusive=snapshot.parent_snapshot_id,
                    to_snapshot_id_inclusive=snapshot.snapshot_id,
                ).plan_files()
                tasks += sorted(added, key=lambda task: task.file.file_path)
        return tasks

    def all_of(self, current: Snapshot) -> list[FileScanTask]:
        """What to read for all rows, oldest files first; a manifest list has the newest first."""
        from pyiceberg.manifest import ManifestContent
        from pyiceberg.table.snapshots import ancestors_of

        with self._reading():
            history = [s.snapshot_id for s in ancestors_of(current, self.table.metadata)]
            age = {snapshot: -n for n, snapshot in enumerate(history)}
            ages: dict[str, tuple[int, int]] = {}
            for manifest in current.manifests(self.table.io):
                if manifest.content == ManifestContent.DATA:
                    for entry in manifest.fetch_manifest_entry(self.table.io):
                        # Tables of format 1 have no sequence numbers.
                        ages[entry.data_file.file_path] = (
                            entry.sequence_number or 0,
                            age.get(entry.snapshot_id or 0, -len(history)),
                        )
            tasks = self.table.scan(snapshot_id=current.snapshot_id).plan_files()
            return sorted(
                tasks, key=lambda task: (ages.get(task.file.file_path, (0, 0)), task.file.file_path)
            )

    def batches(self, tasks: list[FileScanTask]) -> Iterator[pa.RecordBatch]:
        """The rows of some files, one file after the other: a scan of all would read ahead."""
        from pyiceberg.expressions import AlwaysTrue
        from pyiceberg.io.pyarrow import ArrowScan

        for task in tasks:
            with self._reading():
                scan = ArrowScan(
                    self.table.metadata, self.table.io, self.table.schema(), AlwaysTrue()
                )
                batches = list(scan.to_record_batches([task]))
            yield from batches

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with _told(self.name, None, self.secrets):
            yield


@contextmanager
def _told(source: object, field: str | None, secrets: frozenset[str]) -> Iterator[None]:
    """Tell whatever the libraries below raise (there is no common class) without any secret."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        text = _without(error, secrets)
        message = f"a file is gone; if the table was being cleaned up, run again ({text})"
        raise InputError(message, source=source, field=field) from None
    except Exception as error:
        message = f"cannot be read: {type(error).__name__}: {_without(error, secrets)}"
        raise InputError(message, source=source, field=field) from None


def _without(error: Exception, secrets: frozenset[str]) -> str:
    text = " ".join(str(error).split())
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_keys(text)[:500]


def _secrets(properties: Mapping[str, Any]) -> frozenset[str]:
    found = {str(value) for key, value in properties.items() if key not in _PUBLIC}
    try:
        found.add(urlsplit(str(properties.get("uri", ""))).password or "")
    except ValueError:
        found.add(str(properties["uri"]))
    found |= {unquote(secret) for secret in found} | {quote(s, safe="") for s in found}
    return frozenset(secret for secret in found if len(secret) > 1)


def _no_such_table(catalog: Catalog, namespace: str, table: str) -> str:
    from pyiceberg.exceptions import NoSuchNamespaceError

    try:
        found = [str(identifier[-1]) for identifier in catalog.list_tables(namespace)]
    except NoSuchNamespaceError:
        return f"no namespace {namespace!r} in the catalog"
    hint = did_you_mean(table, found) if 0 < len(found) <= _SHOWN else ""
    return f"no table {table!r} in the namespace {namespace!r}{hint}"


# --- Catalogs ----------------------------------------------------------------------------------


def _catalog(settings: IcebergSettings) -> tuple[str, dict[str, Any], str]:
    """A catalog's name, its properties, and what to call it in messages."""
    from pyiceberg.utils.config import Config

    catalog = settings.catalog
    if not isinstance(catalog, str):
        properties = {key: str(value) for key, value in catalog.items()}
        name = properties.pop("name", "default")
        return name, properties, f"catalog {name!r}"
    if "://" in catalog:  # not shown: it may hold a password
        raise InputError(
            "is a location; expected the path of a SQLite file, the name of a catalog in"
            " .pyiceberg.yaml, or properties (`{type: rest, uri: …}`)",
            source=settings.table,
            field=_CATALOG,
        )
    path = Path(catalog).expanduser()
    if path.is_file():
        return _in_sqlite(path, settings.table), _sqlite_properties(path), str(path)
    with _told(".pyiceberg.yaml", _CATALOG, frozenset()):
        config = Config()
        known = config.get_known_catalogs()
        if catalog.lower() in known:
            return catalog, dict(config.get_catalog_config(catalog) or {}), f"catalog {catalog!r}"
    if path.is_absolute() or len(path.parts) > 1:
        raise InputError("no such file", source=path, field=_CATALOG)
    raise InputError(
        f"neither a SQLite file nor a catalog in .pyiceberg.yaml{did_you_mean(catalog, known)}",
        source=catalog,
        field=_CATALOG,
    )


def _in_sqlite(path: Path, table: str) -> str:
    """The name under which a file keeps a table: one file can hold several catalogs."""
    namespace, _, name = table.rpartition(".")
    try:
        with closing(sqlite3.connect(f"{_uri(path)}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "SELECT DISTINCT catalog_name, table_namespace = ? AND table_name = ?"
                " FROM iceberg_tables ORDER BY 1",
                (namespace, name),
            ).fetchall()
    except sqlite3.Error as error:
        raise InputError(
            f"not an Iceberg catalog in SQLite: {error}", source=path, field=_CATALOG
        ) from None
    names = [catalog for catalog, has_it in rows if has_it]
    if len(names) > 1:
        raise InputError(
            f"catalogs {', '.join(names)} in this file have the table {table}; choose one with"
            f" `catalog: {{type: sql, name: {names[0]}, uri: 'sqlite:///{path}'}}`",
            source=path,
            field=_CATALOG,
        )
    return next(iter(names or [catalog for catalog, _ in rows]), "default")


def _sqlite_properties(path: Path) -> dict[str, str]:
    """What a file cannot say: how to open it, and where its object storage is."""
    from sqlalchemy import URL

    place = URL.create("sqlite", database=_uri(path), query={"mode": "ro", "uri": "true"})
    properties = {
        "type": "sql",
        "uri": place.render_as_string(),
        "init_catalog_tables": "false",
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return properties | {
        key: value for key, value in (("s3.endpoint", endpoint), ("s3.region", region)) if value
    }


def _uri(path: Path) -> str:
    return f"file:{quote(str(path.absolute()))}"
