"""The fact log of a registry: everything that was ever said, and what holds now.

    facts/HEAD                          the last change: JSON, moved only from what was seen
    facts/log/<sequence>-….parquet      the claims that a change touched, as they are from then on
    facts/state/<sequence>-….parquet    the last of each claim: a summary of the log, sorted by id
    facts/rejects/<sequence>-….parquet  rows that no fact was made of

Files never change; what HEAD does not name, does not count. So a change is there as a whole or not
at all, and two writers cannot lose each other's. Knows files and HEAD; what a change does is in
`workflows.ingestion.merge`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.artifacts import Artifacts, open_artifacts
from cluster.storage import StorageSettings
from cluster.store import Store, is_remote, join, open_store
from memedit.errors import InputError, LockError
from memedit.requests import EditRequest, Neighbour, Provenance
from workflows.ingestion.claims import CLAIMS, Rule
from workflows.ingestion.head import Change, Difference, Head
from workflows.ingestion.merge import Merge
from workflows.ingestion.rows import STATEMENTS, TIME, DeadLetter

HEAD = "facts/HEAD"
_TRIES = 20
_MEMORY = "1GB"
_ROW_GROUP = 8192
"""Small, so that one fact is found by reading little."""

REJECTS = pa.schema(
    [
        ("rejected_at", TIME),
        ("run", pa.string()),
        ("source", pa.string()),
        ("snapshot", pa.string()),
        ("place", pa.string()),
        ("row", pa.int64()),
        ("field", pa.string()),
        ("reason", pa.string()),
        ("raw", pa.string()),
        ("sequence", pa.int64()),
    ]
)


class FactLog:
    """The facts of a registry, in a folder or under an `s3://` prefix.

    Args:
        registry: The registry's location.
        cache: Folder for copies of what lies in object storage.
        storage: How objects are stored.
    """

    def __init__(
        self, registry: str, *, cache: Path, storage: StorageSettings | None = None
    ) -> None:
        self.location, self._cache, self._storage = registry, cache, storage
        self.store: Store = open_store(registry, storage=storage)
        here = hashlib.sha256(registry.encode()).hexdigest()[:16]
        self._files: Artifacts = (
            open_artifacts(registry, cache=cache / "registries" / here, storage=storage)
            if is_remote(registry)
            else Artifacts(Path(registry).expanduser())
        )
        self._in_base = 0
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._tried: Head | None = None

    def scratch(self) -> FactLog:
        """A copy to try things on; what is written to it goes with this process."""
        found = copy(self)
        found._scratch = tempfile.TemporaryDirectory(prefix="memedit-facts-")
        found._tried = self.head()
        return found

    def on_base(self, sequence: int) -> FactLog:
        """The same log, for a base that says already what held after a change.

        Those facts have the state `compacted` as long as they hold.
        """
        found = copy(self)
        found._in_base = sequence
        return found

    @property
    def is_scratch(self) -> bool:
        """Whether nothing of this stays."""
        return self._scratch is not None

    def head(self) -> Head:
        """Where the log is.

        Raises:
            InputError: HEAD is damaged.
        """
        if self._tried is not None:
            return self._tried
        found = self.store.get(HEAD)
        if found is None:
            return Head()
        source = join(self.location, HEAD)
        try:
            value = json.loads(found[0])
            head = Head(
                sequence=int(value["sequence"]),
                at=datetime.fromisoformat(value["at"]).astimezone(UTC).isoformat(),
                log=tuple(map(str, value["log"])),
                state=str(value["state"]),
                rejects=tuple(map(str, value["rejects"])),
                read={str(k): {**v, "mark": dict(v["mark"])} for k, v in value["read"].items()},
                counts={str(k): int(v) for k, v in value["counts"].items()},
                conflicts=value.get("conflicts", "newest"),
                priority=tuple(map(str, value.get("priority", ()))),
                token=found[1],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"damaged: {error!r}", source=source) from error
        for name in (*head.log, head.state, *head.rejects):
            if name is None or not name.startswith("facts/") or ".." in name:
                raise InputError(f"damaged: it names {name!r}", source=source)
        if head.conflicts not in get_args(Rule):
            raise InputError(f"damaged: no rule {head.conflicts!r}", source=source)
        return head

    def path(self, name: str) -> Path:
        """A file of the log on this machine.

        Raises:
            InputError: It is gone, or not readable.
        """
        if self._scratch is not None and (tried := Path(self._scratch.name) / name).exists():
            return tried
        found = self._files.read(name, _readable)
        if found is None:
            raise InputError("is missing or damaged", source=join(self.location, name))
        return found

    @contextmanager
    def database(
        self, head: Head, *, in_base: int | None = None
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """A database in memory with the view `state`; may use the disk, in a folder that goes.

        Raises:
            InputError: The files cannot be read, or disk or memory do not suffice.
        """
        try:
            with self._database(head, in_base) as database:
                yield database
        except duckdb.Error as error:
            text = " ".join(str(error).split())
            raise InputError(f"the facts cannot be read: {text}", source=self.location) from error

    @contextmanager
    def _database(self, head: Head, in_base: int | None) -> Iterator[duckdb.DuckDBPyConnection]:
        in_base = self._in_base if in_base is None else in_base
        with tempfile.TemporaryDirectory(prefix="memedit-facts-") as folder:
            settings: dict[str, str | bool | int | float | list[str]] = {
                "memory_limit": _MEMORY,
                "temp_directory": folder,
                "threads": 2,
            }
            with duckdb.connect(":memory:", config=settings) as database:
                database.execute("SET TimeZone = 'UTC'")
                database.execute("SET preserve_insertion_order = false")
                if head.state is None:
                    database.register("state", CLAIMS.empty_table())
                elif base := self._last(head, in_base):
                    database.execute(
                        f"CREATE TEMP TABLE base AS SELECT fact, question FROM ({base})"
                    )
                    database.execute(
                        f"""CREATE TEMP VIEW state AS SELECT * REPLACE (CASE
                            WHEN state = 'active' AND fact IN (SELECT fact FROM base)
                            THEN 'compacted' ELSE state END AS state)
                        FROM {_scan([self.path(head.state)])}"""
                    )
                else:
                    database.execute(_view("state", [self.path(head.state)]))
                yield database

    def _last(self, head: Head, sequence: int) -> str:
        """A query for the facts that held after a change; empty where none can have."""
        segments = [self.path(name) for name in head.log if _sequence_of(name) <= sequence]
        if not segments:
            return ""
        return (
            f"SELECT fact, question, id, subject, target_new FROM {_scan(segments)} QUALIFY"
            " row_number() OVER (PARTITION BY source, fact ORDER BY sequence DESC) = 1"
            " AND state = 'active'"
        )

    # ------------------------------------------------------------------------------- changing

    def commit(
        self,
        make: Callable[[Head, Merge], Change | None],
        *,
        statements: Path | None = None,
    ) -> Head:
        """Make a change; where somebody else was quicker, make it again on what is there then.

        Args:
            make: Called with what is there; calls a method of the merge. None: no change.
            statements: A Parquet file with `STATEMENTS` and `position`, for `Merge.take`.

        Returns:
            The new head; the old one where nothing changed.

        Raises:
            LockError: Others were quicker again and again.
            InputError: The registry cannot be read or written.
        """
        for _ in range(_TRIES):
            head = self.head()
            at = _now(head)
            with self.database(head, in_base=0) as database:  # the log itself knows no base
                if statements is not None:
                    database.execute(_view("statements", [statements]))
                change = make(head, Merge(database, sequence=head.sequence + 1, at=at))
                new = None if change is None else self._written(head, database, change, at)
            if new is None:
                return head
            if self.is_scratch:
                self._tried = new
                return new
            try:
                return replace(new, token=self._move(new, head.token))
            except LockError:
                continue
        raise LockError(f"{self.location}: others change its facts all the time; try again")

    def _written(
        self, head: Head, database: duckdb.DuckDBPyConnection, change: Change, at: datetime
    ) -> Head | None:
        """The files of a change, not yet named by HEAD; None where nothing is new."""
        sequence = head.sequence + 1
        touched = _count(database, "SELECT count(*) FROM events")
        conflicts, priority = change.rule or (head.conflicts, head.priority)
        same_rule = (conflicts, priority) == (head.conflicts, head.priority)
        same_read = dict(head.read) == {**head.read, **change.read}
        if not touched and not change.rejects and same_read and same_rule:
            return None
        log, state, counts = head.log, head.state, head.counts
        if touched or state is None:
            name = f"{sequence:08d}-{secrets.token_hex(4)}.parquet"
            self._copy(
                database, "SELECT * FROM events ORDER BY id, source, fact", f"facts/log/{name}"
            )
            log, state = (*log, f"facts/log/{name}"), f"facts/state/{name}"
            self._copy(
                database,
                """SELECT * FROM (
                    SELECT * FROM state s WHERE NOT EXISTS (
                        SELECT 1 FROM events e WHERE e.source = s.source AND e.fact = s.fact)
                    UNION ALL SELECT * FROM events
                ) ORDER BY id, source, fact""",
                state,
            )
            counts = dict(
                database.execute(
                    f"SELECT state, count(*) FROM {_scan([self.path(state)])} GROUP BY state"
                ).fetchall()
            )
        rejects = head.rejects
        if change.rejects:
            name = f"facts/rejects/{sequence:08d}-{secrets.token_hex(4)}.parquet"
            rows = [{**row, "rejected_at": at, "sequence": sequence} for row in change.rejects]
            with self._new(name) as path:
                pq.write_table(pa.Table.from_pylist(rows, schema=REJECTS), path, compression="zstd")
            rejects = (*rejects, name)
        return Head(
            sequence=sequence,
            at=at.isoformat(),
            log=log,
            state=state,
            rejects=rejects,
            read={**head.read, **change.read},
            counts=counts,
            conflicts=conflicts,
            priority=priority,
        )

    @contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        """A file of the log to write."""
        if self._scratch is None:
            with self._files.kept(name) as path:
                yield path
        else:
            path = Path(self._scratch.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path

    def _copy(self, database: duckdb.DuckDBPyConnection, query: str, name: str) -> None:
        with self._new(name) as path:
            database.execute(
                f"COPY ({query}) TO '{_quoted(path)}'"
                f" (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_ROW_GROUP})"
            )

    def _move(self, new: Head, expected: str) -> str:
        value = asdict(new)
        del value["token"]
        content = f"{json.dumps(value, indent=1, ensure_ascii=False)}\n".encode()
        return self.store.put(HEAD, content, expected=expected)

    # -------------------------------------------------------------------------------- asking

    def select(
        self, head: Head, query: str, values: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """The rows of a query over the view `state`."""
        with self.database(head) as database:
            return list(_rows(database.execute(query, dict(values or {}))))

    def count(self, head: Head) -> int:
        """How many facts hold; with a base that says some already, of the others."""
        if not self._in_base:
            return head.active
        return int(
            self.select(head, "SELECT count(*) AS n FROM state WHERE state = 'active'")[0]["n"]
        )

    def stuck(self, head: Head) -> int:
        """How many facts of the base nobody says any more."""
        found = self.select(
            head,
            "SELECT count(*) AS n FROM base WHERE fact NOT IN"
            " (SELECT fact FROM state WHERE state IN ('active', 'compacted'))"
            " AND question NOT IN (SELECT question FROM state WHERE state = 'active')",
        )
        return int(found[0]["n"])

    def digest(self, head: Head) -> str:
        """Of the facts that hold, whatever the order in which they came."""
        found = hashlib.sha256()
        with self.database(head) as database:
            rows = database.execute(
                "SELECT fact, content FROM state WHERE state = 'active' ORDER BY fact, content"
            )
            while portion := rows.fetchmany(10_000):
                found.update("".join(f"{fact}{content}\n" for fact, content in portion).encode())
        return found.hexdigest()

    def difference(self, head: Head, since: int) -> Difference:
        """What holds now against what held after an earlier change (0: nothing did)."""
        nothing = "SELECT fact, question, id, subject, target_new FROM state WHERE false"
        with self.database(head) as database:
            database.execute(f"CREATE TEMP TABLE old AS {self._last(head, since) or nothing}")
            if base := self._last(head, self._in_base):
                database.execute(f"DELETE FROM old WHERE fact IN (SELECT fact FROM ({base}))")
            database.execute("CREATE TEMP VIEW new AS SELECT * FROM state WHERE state = 'active'")
            added = database.execute(
                "SELECT fact FROM new WHERE fact NOT IN (SELECT fact FROM old)"
            ).fetchall()
            found = database.execute(
                """SELECT fact, id, subject, target_new,
                    fact IN (SELECT fact FROM state WHERE state = 'superseded') AS replaced
                FROM old WHERE fact NOT IN (SELECT fact FROM new) ORDER BY id"""
            )
            gone = list(_rows(found))
        return Difference(
            added=frozenset(fact for (fact,) in added),
            superseded=tuple(row for row in gone if row["replaced"]),
            retracted=tuple(row for row in gone if not row["replaced"]),
        )

    def history(
        self, head: Head, where: str, values: Mapping[str, Any], *, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """What the log has of some claims, oldest first."""
        return self._scanned(head.log, f"WHERE {where} ORDER BY sequence, source", values, limit)

    def count_history(self, head: Head, where: str, values: Mapping[str, Any]) -> int:
        """How many changes of claims the log has."""
        if not head.log:
            return 0
        with self.database(Head()) as database:
            scan = _scan([self.path(name) for name in head.log])
            query = f"SELECT count(*) FROM {scan} WHERE {where}"
            (count,) = database.execute(query, dict(values)).fetchall()[0]
        return int(count)

    def rejected(self, head: Head, *, limit: int) -> list[dict[str, Any]]:
        """The newest rows that no fact was made of, newest first."""
        return self._scanned(head.rejects, "ORDER BY sequence DESC, place, row", {}, limit)

    def count_rejected(self, head: Head) -> int:
        """How many rows were rejected in all."""
        return sum(pq.read_metadata(self.path(name)).num_rows for name in head.rejects)

    def _scanned(
        self, names: Sequence[str], rest: str, values: Mapping[str, Any], limit: int
    ) -> list[dict[str, Any]]:
        if not names:
            return []
        with self.database(Head()) as database:
            scan = _scan([self.path(name) for name in names])
            query = f"SELECT * FROM {scan} {rest} LIMIT {int(limit)}"
            return list(_rows(database.execute(query, dict(values))))


def rejects_of(
    dead: Iterable[DeadLetter], *, run: str, source: str, snapshot: str
) -> list[dict[str, Any]]:
    """Dead letters as rows of the registry."""
    return [{**asdict(d), "run": run, "source": source, "snapshot": snapshot} for d in dead]


def statements_schema() -> pa.Schema:
    """`STATEMENTS` with the place of each in its reading."""
    return STATEMENTS.append(pa.field("position", pa.int64()))


def request_of(row: Mapping[str, Any]) -> EditRequest:
    """The fact in a row of the state."""
    return EditRequest(
        case_id=row["id"],
        subject=row["subject"],
        prompt=row["prompt"],
        target_new=row["target_new"],
        target_true=row["target_true"],
        paraphrases=tuple(row["paraphrases"] or ()),
        neighbourhood=tuple(Neighbour(**n) for n in row["neighbourhood"] or ()),
        provenance=Provenance(source=f"{row['source']}: {row['place']}", row=row["row"]),
    )


def _now(head: Head) -> datetime:
    """The time, or just after the last change where the clock of this machine is behind it."""
    now = datetime.now(UTC)
    if not head.at:
        return now
    return max(now, datetime.fromisoformat(head.at) + timedelta(microseconds=1))


def _rows(found: duckdb.DuckDBPyConnection) -> Iterator[dict[str, Any]]:
    names = [column[0] for column in found.description or ()]
    while portion := found.fetchmany(10_000):
        for row in portion:
            yield dict(zip(names, row, strict=True))


def _count(database: duckdb.DuckDBPyConnection, query: str) -> int:
    row = database.execute(query).fetchone()
    assert row is not None, "count(*) gives a row"
    return int(row[0])


def _readable(path: Path) -> Path:
    pq.read_metadata(path)
    return path


def _view(name: str, paths: Sequence[Path]) -> str:
    return f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT * FROM {_scan(paths)}"


def _scan(paths: Sequence[Path]) -> str:
    quoted = ", ".join(f"'{_quoted(path)}'" for path in paths)
    # Folders of the registry's own place may be named `key=value`.
    return f"read_parquet([{quoted}], hive_partitioning = false)"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _sequence_of(name: str) -> int:
    return int(name.rpartition("/")[2].partition("-")[0])
