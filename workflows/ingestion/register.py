"""Registering: what is new in a source becomes part of the fact log, in one change.

Rows become statements in portions, on all cores where there are many, and lie in a file until all
were read; nothing is registered before that. Knows sources and the log; what follows from the
statements is in `workflows.ingestion.merge`.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memedit.config import digest_of
from memedit.errors import InputError
from memedit.progress import Progress
from workflows.ingestion.claims import Rule, Said
from workflows.ingestion.fact_log import FactLog, rejects_of, statements_schema
from workflows.ingestion.head import Change, Head
from workflows.ingestion.merge import Merge
from workflows.ingestion.rows import DeadLetter, RowReader
from workflows.ingestion.settings import IngestJob
from workflows.ingestion.source import Reading, SourceRow
from workflows.ingestion.sources import load_templates, open_source, parse_source, place_of

_PORTION = 10_000
"""Rows that are sent to another process together, at least."""
_AT_ONCE = 4
"""Portions that are on their way to other processes."""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """What a reading came to."""

    source: str
    place: str
    snapshot: str | None = None
    """None where nothing was new."""
    read: int = 0
    rejected: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass
class _Read:
    """Counts and dead letters while a reading goes on."""

    rows: int = 0
    statements: int = 0
    dead: list[DeadLetter] = field(default_factory=list)


def register(job: IngestJob, log: FactLog, *, run: str, progress: Progress) -> Registered:
    """Read what is new in the job's source and register it, or register nothing.

    Raises:
        InputError: The source cannot be read, or a row is wrong and the job wants to be told.
    """
    began = time.monotonic()
    settings = parse_source(job.source)
    templates = load_templates(settings)
    source = open_source(
        settings, templates={k: list(v) for k, v in templates.items()}, on_bad_file=job.on_bad_row
    )
    reader = RowReader(columns=settings.columns, templates=templates)
    head = log.head()
    place = place_of(settings)
    before = head.read.get(source.name)
    if not settings.name:
        _check_same_place(before, settings.kind, place, source.name)
    # Under a name of its own a source may have become another one.
    same_kind = before is not None and before["kind"] == settings.kind
    mark = head.mark(source.name) if same_kind else None
    how = digest_of(dict(settings.columns), settings.where, templates)
    # Files compare it themselves: only they know which of their rows were read before.
    is_read_otherwise = before is not None and before.get("reader") != how
    reading = source.read(None if is_read_otherwise and settings.kind != "files" else mark)
    rule = (job.conflicts, job.priority if job.conflicts == "priority" else ())
    if reading is None:
        if head.sequence and rule != (head.conflicts, head.priority):
            log.commit(lambda now, merge: _decide(merge, rule))
        if mark is not None and not log.is_scratch:
            source.settle(mark)  # a run may have been killed before it had
        return Registered(source=source.name, place=place, seconds=_since(began))
    for note in reading.notes:
        progress.message(note, warning=False)
    with tempfile.TemporaryDirectory(prefix="memedit-rows-") as folder:
        path = Path(folder) / "statements.parquet"
        read = _collect(reading, reader, path)
        if read.dead and job.on_bad_row == "fail":
            raise _error_of(read.dead)
        said = {
            "kind": settings.kind,
            "place": place,
            "snapshot": reading.snapshot,
            "reader": how,
        }
        registered: list[Registered] = []

        def make(now: Head, merge: Merge) -> Change | None:
            registered.clear()
            if now.read.get(source.name) != before:  # another run has read the same meanwhile
                return None
            refused = merge.take(
                Said(
                    source=source.name,
                    at=merge.at,
                    run=run,
                    snapshot=reading.snapshot,
                    complete=reading.complete,
                    rule=job.conflicts,
                    priority=job.priority,
                    rule_is_new=rule != (now.conflicts, now.priority),
                    rejected=[(d.id, d.place, d.row) for d in read.dead],
                )
            )
            dead = [*read.dead, *_refused(path, refused)]
            if dead and job.on_bad_row == "fail":
                raise _error_of(dead)
            if reading.complete:
                _check_retracted(merge, now, source.name, job.most_retracted, place)
            notes = reading.notes
            if spared := merge.spared():
                notes = (*notes, f"{spared:,} facts stay, though their rows were rejected now")
            registered.append(
                Registered(
                    source=source.name,
                    place=place,
                    snapshot=reading.snapshot,
                    read=read.rows,
                    rejected=len(dead),
                    notes=notes,
                )
            )
            read_at = merge.at.isoformat(timespec="seconds")
            return Change(
                rejects=rejects_of(dead, run=run, source=source.name, snapshot=reading.snapshot),
                read={source.name: {**said, "mark": dict(reading.mark), "read_at": read_at}},
                rule=rule,
            )

        head = log.commit(make, statements=path)
    # Not what was read here: another run may have registered less of it.
    mark = head.mark(source.name)
    if mark is not None and not log.is_scratch:
        source.settle(mark)
    found = registered[0] if registered else Registered(source=source.name, place=place)
    for note in found.notes[len(reading.notes) :]:
        progress.message(note, warning=False)
    return replace(found, seconds=_since(began))


def _check_same_place(before: Mapping[str, Any] | None, kind: str, place: str, name: str) -> None:
    """See that a name that nobody has given means what it meant before."""
    if before is None:
        return
    if before["kind"] == kind and before["place"].rstrip("/") == place.rstrip("/"):
        return
    raise InputError(
        f"another place was read under the name {name}: {before['place']}; give each source a"
        f" `name` of its own, or, if this one has moved, write `name: {name}`: then it keeps its"
        " facts",
        source=place,
        field="source.name",
    )


def _decide(merge: Merge, rule: tuple[Rule, tuple[str, ...]]) -> Change:
    merge.decide(*rule)
    return Change(rule=rule)


def register_table(
    log: FactLog, rows: Iterator[list[SourceRow]], *, source: str, rule: Rule, run: str
) -> Head:
    """Register facts that a person gives; a row that is wrong stops it.

    Contradictions are resolved as the registry does; with `refuse` there must be none.

    Raises:
        InputError: A row is wrong; nothing was registered.
    """
    reading = Reading(rows=rows, mark={}, snapshot="by hand", complete=False)
    with tempfile.TemporaryDirectory(prefix="memedit-rows-") as folder:
        path = Path(folder) / "statements.parquet"
        read = _collect(reading, RowReader(), path)
        if read.dead:
            raise _error_of(read.dead)

        def make(now: Head, merge: Merge) -> Change:
            refused = merge.take(
                Said(
                    source=source,
                    at=merge.at,
                    run=run,
                    snapshot="by hand",
                    complete=False,
                    rule=now.conflicts,
                    priority=now.priority,
                    guarded=rule == "refuse",
                )
            )
            if dead := _refused(path, refused):
                raise _error_of(dead)
            return Change()

        return log.commit(make, statements=path)


def _collect(reading: Reading, reader: RowReader, path: Path) -> _Read:
    """Write the statements of a reading to a file, and gather what is none."""
    found = _Read()
    with pq.ParquetWriter(path, statements_schema(), compression="lz4") as writer:
        for rows, batch, dead in _read_all(reading.rows, reader):
            positions = pa.array(range(found.statements, found.statements + batch.num_rows))
            table = pa.Table.from_batches([batch]).append_column(
                "position", positions.cast(pa.int64())
            )
            writer.write_table(table)
            found.rows += rows
            found.statements += batch.num_rows
            found.dead += dead
    return found


def _read_all(
    portions: Iterator[list[SourceRow]], reader: RowReader
) -> Iterator[tuple[int, pa.RecordBatch, list[DeadLetter]]]:
    """Each portion with its number of rows; in order, also where several processes read."""
    portions = _merged(portions)
    first = next(portions, None)
    if first is None:
        return
    second = next(portions, None)
    cores = len(os.sched_getaffinity(0))
    if second is None or cores < 2:
        for portion in itertools.chain([first], [] if second is None else [second], portions):
            yield len(portion), *reader.read(portion)
        return
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        waiting: deque[tuple[int, Future[tuple[pa.RecordBatch, list[DeadLetter]]]]] = deque()
        for portion in itertools.chain([first, second], portions):
            waiting.append((len(portion), pool.submit(reader.read, portion)))
            if len(waiting) > cores + _AT_ONCE:
                size, future = waiting.popleft()
                yield size, *future.result()
        for size, future in waiting:
            yield size, *future.result()


def _merged(portions: Iterator[list[SourceRow]]) -> Iterator[list[SourceRow]]:
    """The same rows without portions that are not worth a process."""
    gathered: list[SourceRow] = []
    for portion in portions:
        gathered.extend(portion)
        if len(gathered) >= _PORTION:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


def _refused(path: Path, refused: list[tuple[int, str, str]]) -> list[DeadLetter]:
    """Dead letters of statements that what is known does not allow."""
    if not refused:
        return []
    wanted = {position: (name, reason) for position, name, reason in refused}
    found: list[DeadLetter] = []
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches():
            positions = batch.column("position").to_pylist()
            for index, position in enumerate(positions):
                if position in wanted:
                    row = batch.slice(index, 1).to_pylist()[0]
                    name, reason = wanted[position]
                    found.append(
                        DeadLetter(
                            place=row["place"],
                            row=row["row"],
                            field=name,
                            reason=reason,
                            raw=_raw(row),
                        )
                    )
    return found


def _raw(row: Mapping[str, Any]) -> str:
    names = ("id", "subject", "prompt", "target_new", "target_true", "relation")
    kept = {name: row[name] for name in names if row[name] is not None}
    if row["op"] == "retract":
        kept["retracted"] = True
    return json.dumps(kept, ensure_ascii=False)


def _check_retracted(merge: Merge, now: Head, source: str, most: float, place: str) -> None:
    """Take it for a mistake if most of a source is gone at once."""
    gone, before = merge.gone(source)
    if before and gone * 100 > most * before and (gone == before or gone > 10):
        raise InputError(
            f"{gone} of the {before} facts of this source are gone from it at once; if that is so,"
            " allow it: --most-retracted 100",
            source=place,
            field="most_retracted",
        )


def _error_of(dead: list[DeadLetter]) -> InputError:
    first = dead[0]
    more = f" ({len(dead) - 1:,} more rows are wrong)" if len(dead) > 1 else ""
    return InputError(
        f"{first.reason}{more}", source=first.place, row=first.row or None, field=first.field
    )


def _since(began: float) -> float:
    return round(time.monotonic() - began, 4)
