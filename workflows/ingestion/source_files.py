"""Facts in files: a folder or a glob, here or under an `s3://` prefix.

Each file has a fingerprint in the mark, how many of its rows were read, and a digest of its bytes.
A new file, or one that has changed, is read; where it still begins as it was, the rows of that
part were read before. Knows files and their columns; does not know what makes a row a fact
(`workflows.ingestion.rows`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import os
import posixpath
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from cluster.store import is_remote, join, open_files, open_store
from memedit.config import digest_of
from memedit.errors import InputError
from memedit.files import File, Files
from workflows.facts import READERS, Unreadable, check_layout, rows_of
from workflows.ingestion.source import Mark, Reading, SourceRow
from workflows.ingestion.source_settings import FilesSettings
from workflows.ingestion.where import numbers
from workflows.wording import did_you_mean

PORTION = 10_000
ARCHIVE = "archive"
_PATTERN = set("*?[")
_OF_LINES = (".jsonl", ".ndjson", ".csv")
_WRITING = (".tmp", ".partial", ".crdownload", ".part", ".inprogress")
"""Ends of names that programs give to files that they have not finished."""


@dataclass(frozen=True, kw_only=True)
class FilesSource:
    """Files with rows of facts; see `FilesSettings`."""

    settings: FilesSettings
    templates: Any = None
    """Those that are in use; when they change, all is read again."""
    on_bad_file: str = "reject"
    """`fail`: a file that cannot be read ends the reading."""
    _place: tuple[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_place", _split(self.settings.path))

    @property
    def name(self) -> str:
        """See `Source`."""
        return self.settings.name or "files"

    def read(self, since: Mark | None) -> Reading | None:
        """See `Source`."""
        files = open_files(self._place[0])
        found = self._found(files, since)
        before: dict[str, Any] = dict(since["files"]) if since else {}
        reader = digest_of(
            dict(self.settings.columns), self.settings.where, self.templates, self.settings.complete
        )
        same_reader = since is not None and since.get("reader") == reader
        prints = _fingerprints(files, found)
        found = list(prints)
        known = {n: before[n] for n in found if n in before}
        to_read = [
            n for n in found if not (same_reader and n in known and known[n][0] == prints[n])
        ]
        if self.settings.complete:
            if not to_read and same_reader and known.keys() == before.keys():
                return None
            to_read = found
        elif not to_read:
            return None
        # Of a file that was put away the name alone is left, which another one may have now.
        appends = self.settings.after == "keep" and not self.settings.complete
        before_now = {n: known[n] for n in known} if appends else {}
        done = {n: known[n] for n in found if n in known and n not in to_read}
        if appends:  # one that is away for a while is not new when it comes back
            away = {n: before[n] for n in before if n not in prints}
            done |= {n: [e[0] if same_reader else None, *e[1:]] for n, e in away.items()}
        return Reading(
            rows=self._rows(files, to_read, prints, before_now, done),
            mark={"reader": reader, "files": done},
            snapshot=_named(to_read),
            complete=self.settings.complete,
        )

    def settle(self, mark: Mark) -> None:
        """Move or remove the files that could be read and have not changed since."""
        if self.settings.after == "keep":
            return
        folder = self._place[0]
        files = open_files(folder)
        for name, (fingerprint, _, _, readable) in mark["files"].items():
            there = readable and files.size(name) is not None
            if not there or files.fingerprint(name) != fingerprint:
                continue
            if self.settings.after == "archive":
                _archive(folder, files, name)
            else:
                open_store(folder).delete([name])

    def _found(self, files: Files, since: Mark | None) -> list[str]:
        """The files that are meant, the oldest name first."""
        pattern = self._place[1]
        if not pattern:
            raise InputError("names nothing", source=self.settings.path, field="source.path")
        # Only as deep as the pattern goes: a bucket can be large.
        deep = "/" in pattern or "**" in pattern
        names = [n for n in files.sizes("", deep=deep) if _matches(n, pattern) and not _hidden(n)]
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"a file whose name is not UTF-8: {_written(name)!r}; rename it",
                    source=self.settings.path,
                ) from error
        if files.here is not None and not files.here.is_dir():
            raise InputError("no such folder", source=files.location, field="source.path")
        if not names and not self._may_be_empty(files, since):
            raise InputError("no such file or folder", source=self.settings.path)
        if pattern == "**":  # a folder: what is in it that is no table is not meant
            return [n for n in names if os.path.splitext(n)[1].lower() in READERS]
        return names

    def _may_be_empty(self, files: Files, since: Mark | None) -> bool:
        """Whether it is no mistake that there is no file."""
        if _PATTERN & set(self.settings.path):
            return True
        if self._place[1] == "**" and files.here is not None:  # a folder that is there
            return True
        # What was read may have been put away since; a prefix without objects is not there.
        return since is not None and (self._place[1] == "**" or self.settings.after != "keep")

    def _rows(
        self,
        files: Files,
        names: Iterable[str],
        prints: dict[str, Any],
        before: dict[str, Any],
        done: dict[str, Any],
    ) -> Iterator[list[SourceRow]]:
        columns = dict.fromkeys(self.settings.columns.values())
        for name in names:
            last, before_last, readable = 0, 0, True
            file = File(files, name)
            seen = self._seen(file, before.get(name))
            # Then the next row was there already, as far as it went, and may be the same still.
            cut = seen is not None and name in before and not _ends(file, before[name][2][0])
            size = files.size(name)
            rows = self._file_rows(file, rewritten=seen is None)
            while portion := list(itertools.islice(rows, PORTION)):
                for row in portion:
                    if row.row > last:
                        last, before_last = row.row, last
                readable = readable and portion[-1].row > 0
                if seen:
                    portion = [_seen_before(r) if r.row <= seen else r for r in portion]
                if cut and last > (seen or 0):
                    cut, portion = False, _first_rewritten(portion, seen or 0)
                yield self._matching(portion, columns)
            # What has changed meanwhile is read again the next time.
            there = files.size(name) is not None
            same = there and files.fingerprint(name) == prints[name]
            content = _content(file, size) if there and not self.settings.complete else None
            # Whoever writes the file may be in the middle of its last line.
            cut = there and readable and not _ends(file, size)
            count = before_last if cut else last
            done[name] = [prints[name] if same else None, count, content, readable]

    def _seen(self, file: File, before: Any) -> int | None:
        """How many of a file's first rows were read before; None if it was written anew since."""
        if before is None:
            return 0
        if before[2] is None:
            return None
        size, _ = before[2]
        if (file.files.size(file.name) or 0) < size:
            return None
        return int(before[1]) if _content(file, size) == before[2] else None

    def _file_rows(self, file: File, *, rewritten: bool) -> Iterator[SourceRow]:
        partition = _partition(file.name)
        place = str(file)
        try:
            for row, raw in rows_of(file, self._check_columns):
                if partition and isinstance(raw, dict):
                    raw = {**partition, **raw}
                yield SourceRow(raw=raw, place=place, row=row, rewritten=rewritten)
        except InputError as error:
            if self.on_bad_file == "fail" or self.settings.complete:
                raise
            # Not a row of the file: it is read anew once it is mended.
            reason = f"the file cannot be read: {error.message}"
            wrong = Unreadable(reason=reason, text="", field=error.field)
            yield SourceRow(raw=wrong, place=place, row=0)

    def _check_columns(self, columns: list[str], file: File) -> Collection[str]:
        partition = _partition(file.name)
        for name in columns:
            if columns.count(name) > 1:
                raise InputError(f"the column {name!r} occurs twice", source=file, field=name)
        for role, column in self.settings.columns.items():
            if column not in columns and column not in partition:
                raise InputError(
                    f"no column {column!r}, which source.columns gives for {role}"
                    f"{did_you_mean(column, columns)}; columns found: {', '.join(columns)}",
                    source=file,
                    field=column,
                )
        if self.settings.columns or {"relation", "retracted"} & {*columns, *partition}:
            return ()
        return check_layout(columns, file)

    def _matching(self, rows: list[SourceRow], columns: dict[str, None]) -> list[SourceRow]:
        """Those that the condition allows; what cannot be read cannot be left out by it.

        Args:
            rows: Of one file.
            columns: Those that were seen so far; what a row does not have is NULL.
        """
        if self.settings.where is None:
            return rows
        tables = [r for r in rows if isinstance(r.raw, dict)]
        if not tables:
            return rows
        own = dict.fromkeys(n for r in tables for n in r.raw)
        taken = {n.casefold() for n in own}  # SQL knows no case
        names = [*own, *(n for n in columns if n.casefold() not in taken)]
        if not names:
            return rows
        columns |= own
        table = _table([r.raw for r in tables], names)
        kept = {tables[i].row for i in numbers(table, self.settings.where)}
        return [r for r in rows if not isinstance(r.raw, dict) or r.row in kept]


_CHUNK = 1 << 20


def _fingerprints(files: Files, names: list[str]) -> dict[str, Any]:
    """Of the files that are still there."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = files.fingerprint(name)
        except (InputError, OSError):
            if files.size(name) is not None:
                raise
    return found


def _seen_before(row: SourceRow) -> SourceRow:
    return replace(row, again=row.row > 0)


def _first_rewritten(rows: list[SourceRow], seen: int) -> list[SourceRow]:
    """The same rows; the first after `seen` ones may say what it said before it was whole."""
    first = next(i for i, row in enumerate(rows) if row.row > seen)
    return [*rows[:first], replace(rows[first], rewritten=True), *rows[first + 1 :]]


def _ends(file: File, size: int | None) -> bool:
    """Whether the first bytes of a file end with a line, if its format is one of lines."""
    if not size or file.suffix not in _OF_LINES:
        return True
    return bytes(file.files.read(file.name, size - 1, 1)) in (b"\n", b"\r")


def _content(file: File, size: int | None = None) -> list[Any]:
    """Size and digest of the first bytes of a file; without `size`, of all."""
    found, read = hashlib.sha256(), 0
    with file.open() as content:
        while chunk := content.read(_CHUNK if size is None else min(_CHUNK, size - read)):
            found.update(chunk)
            read += len(chunk)
    return [read, found.hexdigest()]


def _table(rows: list[dict[str, Any]], names: Iterable[str]) -> pa.Table:
    """Rows of any shape as a table: lists and objects as JSON, mixed columns as texts."""
    columns: dict[str, Any] = {}
    for name in names:
        values = [_cell(row.get(name)) for row in rows]
        try:
            column = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeError):
            column = pa.array([None if v is None else _written(v) for v in values], pa.string())
        columns[_written(name)] = column
    return pa.table(columns)


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


def _written(value: Any) -> str:
    """A value as a text that can be stored: half a character is written out."""
    return str(value).encode(errors="backslashreplace").decode()


def _split(path: str) -> tuple[str, str]:
    """The folder that is looked through, and the pattern of names in it."""
    remote = is_remote(path)
    parts = path.removeprefix("s3://").rstrip("/").split("/") if remote else path.split("/")
    fixed = list(itertools.takewhile(lambda part: not _PATTERN & set(part), parts))
    pattern = "/".join(parts[len(fixed) :])
    folder = "/".join(fixed)
    if pattern:
        return (f"s3://{folder}" if remote else folder or ("/" if path[0] == "/" else ".")), pattern
    suffix = posixpath.splitext(folder)[1].lower()
    if suffix in READERS and (remote or not os.path.isdir(folder)):
        parent, _, name = folder.rpartition("/")
        return (f"s3://{parent}" if remote else parent or "."), name
    return (f"s3://{folder}" if remote else folder), "**"


def _matches(name: str, pattern: str) -> bool:
    """Whether a name fits a glob; `*` stays within a folder, `**` does not."""
    return _fits(name.split("/"), pattern.split("/"))


def _fits(parts: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        if len(wanted) == 1:
            return bool(parts)
        return any(_fits(parts[i:], wanted[1:]) for i in range(len(parts)))
    if not parts or not fnmatch.fnmatchcase(parts[0], wanted[0]):
        return False
    return _fits(parts[1:], wanted[1:])


def _hidden(name: str) -> bool:
    parts = name.split("/")
    if any(part.startswith((".", "_")) for part in parts) or ARCHIVE in parts[:-1]:
        return True
    return name.lower().endswith(_WRITING)


def _partition(name: str) -> dict[str, str]:
    """The columns that stand in the folders' names (`day=2026-11-27/`)."""
    folders = name.split("/")[:-1]
    pairs = (folder.partition("=") for folder in folders if "=" in folder)
    return {unquote(key): unquote(value) for key, _, value in pairs}


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "no file"


def _archive(folder: str, files: Files, name: str) -> None:
    parent, _, last = name.rpartition("/")
    target = posixpath.join(parent, ARCHIVE, last)
    if files.here is None:
        raise InputError(
            "moving files is for folders of this machine; under s3:// let a lifecycle rule do it",
            source=join(folder, name),
            field="source.after",
        )
    (files.here / target).parent.mkdir(exist_ok=True)
    stem, suffix = os.path.splitext(target)
    numbered = (f"{stem}.{n}{suffix}" for n in itertools.count(1))
    free = next(t for t in itertools.chain([target], numbered) if not (files.here / t).exists())
    os.replace(files.here / name, files.here / free)


__all__ = ["ARCHIVE", "PORTION", "FilesSource"]
