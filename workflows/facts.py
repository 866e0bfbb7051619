"""Fact tables: files of facts in, validated requests and rejected rows out.

Knows file formats (JSON lines, JSON array, Parquet, CSV) and what happens to bad rows. Does not
know how data sets name their fields (`memedit.layouts`) or what makes a fact valid
(`memedit.requests`).
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cluster.store import is_remote, open_file
from memedit.errors import InputError
from memedit.files import File
from memedit.layout_readers import EVALUATION_ONLY
from memedit.layouts import layout_of, read_row, split_row, to_row
from memedit.requests import Duplicate, EditBatch, EditRequest, Provenance, resolve
from memedit.writing import whole_file

OnBadRow: TypeAlias = Literal["fail", "skip"]

_SHOWN = 10
"""How many bad rows an error message lists."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A row that is not edited, with its place and the reason."""

    source: str
    row: int
    field: str | None
    reason: str
    raw: Any
    """The row as it was read; text where it is no JSON object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreadable:
    """In place of a row that its format does not allow; the rest of the file can be read."""

    reason: str
    text: str
    field: str | None = None


@dataclass(frozen=True, kw_only=True)
class FactTable:
    """The outcome of reading: `read` = requests + rejects + duplicates."""

    source: str
    requests: tuple[EditRequest, ...]
    rejects: tuple[Reject, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    read: int = field(default=0)

    @property
    def batch(self) -> EditBatch:
        """The accepted requests in canonical order."""
        return EditBatch.of(self.requests)

    def reject(self, case_id: str, reason: str, field: str | None = "subject") -> FactTable:
        """A table in which this fact is rejected, for reasons that only a later stage can see.

        Raises:
            KeyError: No accepted request has this id.
        """
        gone = next((r for r in self.requests if r.case_id == case_id), None)
        if gone is None:
            raise KeyError(case_id)
        reject = _rejected(gone, field=field, reason=reason, raw=to_row(gone), table=self.source)
        return replace(
            self,
            requests=tuple(r for r in self.requests if r is not gone),
            rejects=_by_place([*self.rejects, reject]),
        )

    def require_no_rejects(self) -> None:
        """Raise if any row was rejected.

        Raises:
            InputError: At the first bad row; the message counts them all and lists up to ten.
        """
        if self.rejects:
            raise _error_of(self.rejects)

    def require_requests(self) -> None:
        """Raise if no row was accepted.

        Raises:
            InputError: Nothing is left to edit.
        """
        if not self.requests:
            error = _error_of(self.rejects)
            raise InputError(
                f"none of {self.read} rows can be used; the first reason: {error.message}",
                source=error.source,
                row=error.row,
                field=error.field,
            )


def read_facts(path: str | os.PathLike[str], *, on_bad_row: OnBadRow = "fail") -> FactTable:
    """Read a fact table; its format is told by the suffix, its layout by its fields.

    Args:
        path: A `.jsonl`, `.json` (an array), `.parquet` or `.csv` file, here or at `s3://`.
        on_bad_row: "fail" raises when any row is bad; "skip" collects bad rows in `rejects`.

    Raises:
        InputError: The file cannot be read, has no row, lacks a column, or has a bad row.
    """
    path = os.fspath(path)
    if is_remote(path) and "/" not in path.removeprefix("s3://").rstrip("/"):
        raise InputError("a whole bucket; a fact table is one object in it", source=path)
    file = open_file(path)
    accepted: list[EditRequest] = []
    rejects: list[Reject] = []
    read = 0
    for row, raw in ((row, raw) for row, whole in rows_of(file) for raw in split_row(whole)):
        read += 1
        if isinstance(raw, Unreadable):
            rejects.append(
                Reject(source=str(file), row=row, field=raw.field, reason=raw.reason, raw=raw.text)
            )
            continue
        try:
            accepted.append(read_row(raw, provenance=Provenance(source=str(file), row=row)))
        except InputError as error:
            rejects.append(
                Reject(source=str(file), row=row, field=error.field, reason=error.message, raw=raw)
            )
    if read == 0:
        raise InputError("no row in it; a fact table needs at least one fact", source=file)

    resolution = resolve(accepted)
    for conflict in resolution.conflicts:
        rejects += [
            _rejected(r, field=conflict.field, reason=conflict.reason, raw=to_row(r), table=file)
            for r in conflict.requests
        ]
    table = FactTable(
        source=str(file),
        requests=resolution.requests,
        rejects=_by_place(rejects),
        duplicates=resolution.duplicates,
        read=read,
    )
    if on_bad_row == "fail":
        table.require_no_rejects()
    table.require_requests()
    return table


def write_facts(path: str | os.PathLike[str], requests: Iterable[EditRequest]) -> None:
    """Write requests as native JSON lines, all or nothing."""
    _write_lines(path, (to_row(request) for request in requests))


def write_rejects(path: str | os.PathLike[str], rejects: Iterable[Reject]) -> None:
    """Write rejected rows as JSON lines with source, row, field, reason and raw."""
    _write_lines(path, (vars(reject) for reject in rejects))


def _write_lines(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    with (
        whole_file(Path(path)) as partial,
        # Half a surrogate pair in a rejected row comes out as its JSON escape.
        partial.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as out,
    ):
        for row in rows:
            # A table's dates and bytes have no JSON form; their text will do for a reject.
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _rejected(
    request: EditRequest, *, field: str | None, reason: str, raw: Any, table: object
) -> Reject:
    place = request.provenance
    return Reject(
        source=place.source if place else str(table),
        row=place.row if place else 0,
        field=field,
        reason=reason,
        raw=raw,
    )


def _by_place(rejects: Iterable[Reject]) -> tuple[Reject, ...]:
    return tuple(sorted(rejects, key=lambda r: (r.source, r.row)))


def _error_of(rejects: tuple[Reject, ...]) -> InputError:
    first, *others = rejects
    message = first.reason
    if others:
        message += f"\n{len(others)} more bad row{'s' if len(others) > 1 else ''}:"
        for other in others[: _SHOWN - 1]:
            place = f"row {other.row}" + (f" [{other.field}]" if other.field else "")
            message += f"\n  {place}: {other.reason}"
        if len(others) >= _SHOWN:
            message += "\n  …"
    return InputError(message, source=first.source, row=first.row, field=first.field)


# --- Formats: each yields (1-based row or line, raw row) ---------------------------------------


Rows: TypeAlias = Iterator[tuple[int, Any]]
"""1-based row or line, and the raw row or an `Unreadable`."""
CheckColumns: TypeAlias = Callable[[list[str], File], Collection[str]]
"""Raises where columns are missing; gives those whose empty cells are kept as empty texts."""


def rows_of(file: File, check: CheckColumns | None = None) -> Rows:
    """The rows of a file in its format, which its suffix tells.

    Args:
        file: The file.
        check: Looks at the columns of a format that has them; by default `check_layout`.

    Raises:
        InputError: No such file, an unknown suffix, or a file that cannot be read at all.
    """
    reader = READERS.get(file.suffix)
    if file.files.size(file.name) is None:
        is_folder = file.files.here is not None and (file.files.here / file.name).is_dir()
        wrong = "not a file; a fact table is one file" if is_folder else "no such file"
        raise InputError(wrong, source=file)
    if reader is None:
        raise InputError(
            f"unknown suffix {file.suffix!r}; a fact table is one of {', '.join(READERS)}",
            source=file,
        )
    yield from reader(file, check or check_layout)


def _json_lines(file: File, check: CheckColumns) -> Rows:
    with file.open() as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, _parse(line.decode())
            except UnicodeDecodeError as error:
                yield (
                    number,
                    Unreadable(reason=_not_utf8(error), text=line.decode(errors="replace").strip()),
                )
            except (ValueError, RecursionError) as error:
                reason = f"not JSON: {error}; write one object a line"
                yield number, Unreadable(reason=reason, text=line.decode().strip())


def _json_array(file: File, check: CheckColumns) -> Rows:
    text = _decoded(file)
    hint = "; expected an array of objects, or one object a line in a .jsonl file"
    try:
        rows = _parse(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}{hint}", source=file, row=error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}{hint}", source=file) from None
    if not isinstance(rows, list):
        raise InputError(f"found one JSON value, no array{hint}", source=file)
    yield from enumerate(rows, start=1)


def _parse(text: str) -> Any:
    """Parse JSON, but refuse an object that names a key twice instead of taking the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} occurs twice in an object")
        return row

    return json.loads(text, object_pairs_hook=unique)


def _csv(file: File, check: CheckColumns) -> Rows:
    text = _decoded(file)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        columns = next((cells for cells in lines if cells), None)
        if columns is None:
            return
        columns = [name.strip() for name in columns]
        needs = check(columns, file)
        start = lines.line_num + 1
        for cells in lines:
            number, start = start, lines.line_num + 1
            if not cells:
                continue
            if len(cells) != len(columns):
                reason = f"{len(cells)} cells, but the header names {len(columns)} columns"
                yield number, Unreadable(reason=reason, text=",".join(cells))
                continue
            # An empty cell is how CSV writes that there is no value.
            row = {n: c for n, c in zip(columns, cells, strict=True) if c or n in needs}
            yield number, _with_structure(row)
    except csv.Error as error:
        raise InputError(f"not CSV: {error}", source=file, row=lines.line_num) from None
    finally:
        csv.field_size_limit(limit)


def _parquet(file: File, check: CheckColumns) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open() as content, pq.ParquetFile(content) as table:
            check(table.schema_arrow.names, file)
            number = 0
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, _with_structure(row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"not a readable Parquet file: {error}", source=file) from None


def check_layout(columns: list[str], file: File) -> tuple[str, ...]:
    """Check that the table has the columns of its layout; returns those it needs."""
    found = f"columns found: {', '.join(columns) or 'none'}"
    for name in columns:
        if columns.count(name) > 1:
            raise InputError(f"the column {name!r} occurs twice; {found}", source=file, field=name)
    try:
        layout = layout_of(columns)
    except InputError as error:
        raise InputError(error.message, source=file) from None
    for name in layout.needs:
        if name not in columns:
            raise InputError(
                f"no column {name!r} ({layout.name} layout needs {', '.join(layout.needs)}); "
                + found,
                source=file,
                field=name,
            )
    return layout.needs


_LISTS_BESIDE = tuple(name for name in EVALUATION_ONLY if name != "relation_id")
_TEXT_WILL_DO = ("generation_prompts", "references")
"""Where one text is a list of one."""


def _with_structure(row: dict[str, Any]) -> dict[str, Any] | Unreadable:
    """The row with cells that hold lists or objects as JSON text parsed."""
    try:
        nested = layout_of([name for name, value in row.items() if value is not None]).nested
    except InputError:
        return row  # which is refused later, with its place
    for name in (*nested, *_LISTS_BESIDE):
        if isinstance(row.get(name), str):
            if name in _TEXT_WILL_DO and not row[name].lstrip().startswith("["):
                continue
            try:
                row[name] = _parse(row[name])
            except (ValueError, RecursionError) as error:
                return Unreadable(
                    reason=f"must hold a list or an object written as JSON: {error}",
                    text=json.dumps(row, ensure_ascii=False, default=str),
                    field=name,
                )
    return row


def _decoded(file: File) -> str:
    content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(_not_utf8(error), source=file, row=line) from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x}: {error.reason}); save the file as UTF-8"


READERS: dict[str, Callable[[File, CheckColumns], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".parquet": _parquet,
    ".csv": _csv,
}
