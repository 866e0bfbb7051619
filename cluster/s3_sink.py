"""The files of a patched copy under an `s3://` prefix, composed by the storage where it can be.

Knows which bytes are copied on the storage's side and which are sent. Does not know when a version
is one (`cluster.publication`).
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field

from cluster.compose import MAX_COPY_BYTES, Part, plan_parts
from cluster.s3 import Entry, Place, Upload
from cluster.s3_files import S3Files
from cluster.s3_requests import NotAsExpected, threads
from memedit.checksums import FileRecord
from memedit.errors import InputError, LockError, MemeditError
from memedit.files import File
from memedit.patching import Sink

_PARTS_AT_ONCE = 8
"""Uploaded parts in memory, of all files together."""
_memory = threading.BoundedSemaphore(_PARTS_AT_ONCE)


@dataclass
class S3Sink(Sink):
    """A prefix of an object storage, without objects of the names that come.

    From the same storage, unchanged bytes are copied on its side: whole objects, or the parts of
    one that lie between the edited tensors. From a folder, everything is uploaded.
    """

    place: Place
    written: dict[str, Entry] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    """Names of what may lie there because of this run."""
    check: Callable[[], None] = lambda: None
    """Raises when nothing may be written any more."""

    def copy(self, source: File, known: FileRecord | None) -> FileRecord:
        """See `Sink`."""
        if not isinstance(source.files, S3Files):
            found = self._upload(source, (), iter(()))
            if known is not None and known.sha256 not in (None, found.sha256):
                raise InputError("has changed since this run began to read it", source=source)
            return found
        there = source.files.entry(source.name)
        entry = None
        if there.size_bytes <= MAX_COPY_BYTES:
            entry = self._copied(source, there)
            if entry.checksum is None and known is None:
                # Nobody could say later whether it has changed. Parts get a checksum everywhere.
                self.place.delete([source.name])
                entry = None
        if entry is None:
            entry = self._compose(source, (), iter(()), can_copy=True)
        self.written[source.name] = entry
        sha256 = None if known is None else known.sha256
        return FileRecord(size_bytes=entry.size_bytes, sha256=sha256, checksum=entry.checksum)

    def _copied(self, source: File, there: Entry) -> Entry:
        assert isinstance(source.files, S3Files)
        self.check()
        # Not every storage copies on a condition.
        if self.place.head(source.name) is not None:
            raise self._taken(source.name)
        self.begun.add(source.name)
        etag = self.place.copy(source.name, source.files.place, source.name, etag=there.etag)
        entry = self.place.head(source.name)
        if entry is None or (entry.size_bytes, entry.etag) != (there.size_bytes, etag):
            raise MemeditError(f"{self.place.at(source.name)}: is not what was copied there")
        return entry

    def patch(
        self,
        source: File,
        ranges: Sequence[tuple[int, int]],
        edits: Iterator[tuple[int, memoryview]],
    ) -> FileRecord:
        """See `Sink`."""
        if not isinstance(source.files, S3Files):
            return self._upload(source, ranges, edits)
        entry = self.written[source.name] = self._compose(source, ranges, edits, can_copy=True)
        return FileRecord(size_bytes=entry.size_bytes, sha256=None, checksum=entry.checksum)

    def _upload(
        self,
        source: File,
        ranges: Sequence[tuple[int, int]],
        edits: Iterator[tuple[int, memoryview]],
    ) -> FileRecord:
        seen = _Seen()
        entry = self._compose(source, ranges, edits, can_copy=False, seen=seen)
        if (entry.checksum or "").startswith("CRC32:") and entry.checksum != seen.crc32:
            raise MemeditError(
                f"{self.place.at(source.name)}: arrived damaged: the storage has"
                f" {entry.checksum}, sent was {seen.crc32}"
            )
        self.written[source.name] = entry
        sha256 = seen.sha256.hexdigest()
        return FileRecord(size_bytes=entry.size_bytes, sha256=sha256, checksum=entry.checksum)

    def _compose(
        self,
        source: File,
        ranges: Sequence[tuple[int, int]],
        edits: Iterator[tuple[int, memoryview]],
        *,
        can_copy: bool,
        seen: _Seen | None = None,
    ) -> Entry:
        size = source.files.size(source.name)
        if size is None:
            raise InputError("no such file", source=source)
        parts = plan_parts(size, ranges, can_copy=can_copy)
        content = _Content(source, ranges, edits)
        self.check()
        self.begun.add(source.name)

        def filled(start: int, end: int) -> bytearray:
            buffer = bytearray(end - start)
            content.fill(start, memoryview(buffer))
            if seen is not None:
                seen.add(buffer)
            return buffer

        if len(parts) <= 1 and not any(part.copied for part in parts):
            whole = filled(0, size)
            try:
                self.place.put(source.name, whole, absent=True)
            except NotAsExpected as error:
                raise self._taken(source.name) from error
            entry = self.place.head(source.name)
            if entry is None or entry.size_bytes != size:
                raise MemeditError(f"{self.place.at(source.name)}: is not what was just written")
            return entry

        upload = self.place.begin(source.name)
        pending: set[Future[None]] = set()
        try:
            for number, part in enumerate(parts, start=1):
                while len(pending) >= _PARTS_AT_ONCE:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for each in done:
                        each.result()
                if part.copied:
                    assert isinstance(source.files, S3Files)
                    there = source.files.entry(source.name)
                    pending.add(
                        threads().submit(
                            upload.copy,
                            number,
                            source.files.place,
                            source.name,
                            part.start,
                            part.end,
                            etag=there.etag,
                        )
                    )
                else:
                    self.check()
                    pending.add(self._sent(upload, number, part, filled))
            for each in pending:
                each.result()
            return upload.complete(size)
        except BaseException as error:
            wait(pending)
            with suppress(MemeditError):
                upload.abort()
            if isinstance(error, NotAsExpected):
                raise self._taken(source.name) from error
            raise

    def _sent(
        self, upload: Upload, number: int, part: Part, filled: Callable[[int, int], bytearray]
    ) -> Future[None]:
        """Send a part, as soon as there is memory for it."""
        _memory.acquire()
        try:
            buffer = filled(part.start, part.end)
            sent = threads().submit(upload.put, number, buffer)
        except BaseException:
            _memory.release()
            raise
        sent.add_done_callback(lambda _: _memory.release())
        return sent

    def _taken(self, name: str) -> LockError:
        self.begun.discard(name)
        return LockError(f"{self.place.at(name)}: another run writes here")


class _Seen:
    """Checksums of bytes that pass by in their order."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self._crc32 = 0

    def add(self, raw: bytearray) -> None:
        self.sha256.update(raw)
        self._crc32 = zlib.crc32(raw, self._crc32)

    @property
    def crc32(self) -> str:
        return f"CRC32:{b64encode(self._crc32.to_bytes(4, 'big')).decode()}"


class _Content:
    """A file with some bytes replaced, to be read from its beginning on, in pieces with gaps."""

    def __init__(
        self,
        source: File,
        ranges: Sequence[tuple[int, int]],
        edits: Iterator[tuple[int, memoryview]],
    ) -> None:
        self._source, self._edits = source, edits
        self._ranges = [(offset, offset + size) for offset, size in ranges if size]
        self._left, self._offset = memoryview(b""), 0

    def fill(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on."""
        position, end = start, start + len(buffer)
        for first, last in (*self._ranges, (end, end)):
            if first > position:
                stop = min(first, end)
                part = buffer[position - start : stop - start]
                self._source.files.read_into(self._source.name, position, part)
                position = stop
            if position < min(last, end) and first <= position:
                stop = min(last, end)
                self._take(position, buffer[position - start : stop - start])
                position = stop
            if position >= end:
                return

    def _take(self, position: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            if not self._left:
                self._offset, self._left = next(self._edits)
            if self._offset != position + done:
                raise ValueError(f"edited bytes of {self._source} come out of their order")
            count = min(len(self._left), len(buffer) - done)
            buffer[done : done + count] = self._left[:count]
            self._left, self._offset = self._left[count:], self._offset + count
            done += count
