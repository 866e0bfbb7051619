"""A Delta Lake table as a source of facts: the rows that were added since a version, or all.

Knows versions and the feed; does not know what makes a row a fact. Reads, and never writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from cluster.store import is_remote
from memedit.errors import InputError
from workflows.ingestion.source import Mark, Reading, Source
from workflows.ingestion.source_settings import DeltaSettings
from workflows.ingestion.where import PORTION, portions, require_columns, require_condition
from workflows.wording import without_keys

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

_MISSING = "deltalake is not installed; pip install 'memedit[delta]'"
_CHANGE, _VERSION = "_change_type", "_commit_version"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ANSWER = re.compile(r"<\?xml.*?(?:<Code>(\w+)</Code>.*)?\Z", re.DOTALL)
_DENIED = re.compile(r"\b403\b|\b401\b|Forbidden|necessary privileges")


class DeltaSource(Source):
    """A Delta table in a folder or under an `s3://` prefix."""

    def __init__(self, settings: DeltaSettings) -> None:
        self.settings = settings

    @property
    def name(self) -> str:
        """See `Source`."""
        return self.settings.name or f"delta:{without_keys(self.settings.path)}"

    def read(self, since: Mark | None) -> Reading | None:
        """See `Source`; rows that were added come in the order of their versions.

        Where rows were also taken back, the whole table is read: which of several equal or
        contradicting rows is left cannot be told from the changes. All changes are in memory at
        once, as Arrow has them: only when they have been read is it known that none of their files
        is gone.

        Raises:
            InputError: The package, the table or a column is missing, the table cannot be read, or
                the versions since the mark are gone and that is to be an error.
        """
        table = self._open()
        mark = {"table_id": str(table.metadata().id), "version": table.version()}
        if since == mark:
            return None

        schema = self._asked(lambda: _schema(table))
        require_columns(self.settings.columns, schema.names, source=self.settings.path)
        require_condition(self.settings.where, schema, source=self.settings.path)
        added, why = None, None
        if since is not None:
            added, why = self._added(table, mark, since)
        rows = portions(
            self._all(table) if added is None else iter([added]),
            place=self.settings.path,
            where=self.settings.where,
        )
        return Reading(
            rows=rows,
            mark=mark,
            snapshot=f"version {mark['version']}",
            complete=added is None,
            notes=() if why is None else (f"read the whole table: {why}",),
        )

    def settle(self, mark: Mark) -> None:
        """See `Source`; a table stays as it is."""

    # ------------------------------------------------------------------------------- opening

    def _open(self, version: int | None = None) -> DeltaTable:
        path, options = self.settings.path, None
        try:
            from deltalake import DeltaTable
            from deltalake.exceptions import TableNotFoundError
        except ImportError:
            raise InputError(_MISSING, source=path, field="source.kind") from None
        if is_remote(path):
            from cluster.s3 import Place  # imports boto3, which takes a moment

            path, options = str(Place.of(path)), _storage_options()
        else:
            folder = Path(path).expanduser()
            if not folder.is_dir():
                raise InputError("no such folder", source=folder, field="source.path")
            path = str(folder)
        try:
            return DeltaTable(path, version=version, storage_options=options)
        except TableNotFoundError:
            raise InputError(
                "not a Delta table: no version in its _delta_log", source=path, field="source.path"
            ) from None
        except Exception as error:
            raise self._failed(error) from None

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> InputError:
        text = _plain(error)
        hint = "access denied; check the AWS keys: " if _DENIED.search(text) else "cannot be read: "
        return InputError(hint + text, source=self.settings.path, field="source.path")

    # ------------------------------------------------------------------------------- changes

    def _added(
        self, table: DeltaTable, mark: Mark, since: Mark
    ) -> tuple[pa.Table | None, str | None]:
        """The rows that were added since a mark, or why that is not enough.

        Raises:
            InputError: The versions since are gone, and that is to be an error.
        """
        last = since.get("version")
        if since.get("table_id") != mark["table_id"] or not isinstance(last, int):
            return None, "it is another one than was read last, at the same place"
        if last > mark["version"]:
            return None, f"it is at version {mark['version']}, but was read at {last} before"
        advice = "`delta.enableChangeDataFeed = true` on the table makes the next readings short"
        if not _has_feed(table):
            return None, f"it has no change data feed; {advice}"
        try:
            before = self._open(last)
        except InputError as error:
            return None, self._gone(last, error.message)
        if not _has_feed(before):
            return None, f"its change data feed began after version {last}, which was read last"
        try:
            added = _feed(table, last + 1)
        except Exception as error:
            text = _plain(error)
            if "change data" in text.lower():
                return None, f"its change data feed was off at some time since version {last}"
            return None, self._gone(last, text)
        if added is None:
            return None, f"rows were changed or deleted since version {last}"
        return added, None

    def _gone(self, last: int, reason: str) -> str:
        gone = f"the changes since version {last}, which was read last, are gone ({reason})"
        if self.settings.expired == "fail":
            raise InputError(
                f"{gone}. With `expired: rescan` the whole table is read; keep versions and files"
                " for longer than the time between two readings (delta.logRetentionDuration,"
                " delta.deletedFileRetentionDuration)",
                source=self.settings.path,
                field="source.expired",
            )
        return gone

    # ------------------------------------------------------------------------------- all rows

    def _all(self, table: DeltaTable) -> Iterator[pa.RecordBatch]:
        """All rows of a version, those of older files first."""
        batches = _by_age(table)
        while True:
            batch = self._asked(lambda: next(batches, None))
            if batch is None:
                return
            yield batch


def _schema(table: DeltaTable) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(table.schema().to_arrow())


def _has_feed(table: DeltaTable) -> bool:
    settings = table.metadata().configuration
    return str(settings.get("delta.enableChangeDataFeed")).lower() == "true"


def _feed(table: DeltaTable, first: int) -> pa.Table | None:
    """The rows that were added from a version on, in order; None if any was taken back."""
    import pyarrow as pa
    import pyarrow.compute as pc

    schema = _schema(table)
    wanted = schema.append(pa.field(_CHANGE, pa.string())).append(pa.field(_VERSION, pa.uint64()))
    feed = table.load_cdf(
        starting_version=first, ending_version=table.version(), columns=wanted.names
    )
    # Without this some texts come as views, which cannot be sorted.
    changes = pa.RecordBatchReader.from_stream(feed, schema=wanted).read_all()
    if pc.any(pc.not_equal(changes.column(_CHANGE), "insert")).as_py():
        return None
    order = pc.sort_indices(changes, sort_keys=[(_VERSION, "ascending")])
    return changes.select(schema.names).take(order)


def _by_age(table: DeltaTable) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    from deltalake.exceptions import DeltaProtocolError

    mapped = table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none"
    dataset = None
    if not mapped:
        try:
            dataset = table.to_pyarrow_dataset()
        except DeltaProtocolError:  # deletion vectors, say
            dataset = None
    if dataset is None:
        # Knows all features of tables, but no order of files.
        yield from pa.RecordBatchReader.from_stream(table.scan(), schema=_schema(table))
        return
    actions = pa.table(table.get_add_actions())
    written = dict(
        zip(
            map(unquote, actions.column("path").to_pylist()),
            actions.column("modification_time").to_pylist(),
            strict=True,
        )
    )
    for fragment in sorted(dataset.get_fragments(), key=lambda f: (written.get(f.path, 0), f.path)):
        yield from fragment.to_batches(schema=dataset.schema, batch_size=PORTION)


# --- S3 ----------------------------------------------------------------------------------------


def _storage_options() -> dict[str, str]:
    """What the AWS variables say, as the other parts of memedit read them."""
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    options = {"AWS_REGION": region or "us-east-1"}
    if endpoint:
        options["AWS_ENDPOINT_URL"] = endpoint
        if endpoint.startswith("http://"):
            options["AWS_ALLOW_HTTP"] = "true"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if environment.get(name):
            options[name] = environment[name]
    return options


def _plain(error: Exception) -> str:
    """An error's text in one line, without the keys that a storage may repeat in its answer."""
    text = _ANSWER.sub(lambda match: match[1] or "", _COLOUR.sub("", str(error)))
    text = " ".join(text.replace("↳", " ").split())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return text[:500]
