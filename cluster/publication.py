"""Publishing to a folder or to an `s3://` prefix: all of it becomes visible at once, or nothing.

Under a prefix, objects lie at their final names from the beginning, and a version is what has a
manifest: it is written last, and only if there is none. Knows the order of requests that survives a
kill at any moment; how a folder does the same is in `memedit.publication`.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from cluster.compose import MAX_COPY_BYTES, Part, plan_parts
from cluster.lease import Lease
from cluster.s3 import Entry, Place, Upload
from cluster.s3_files import S3Files
from cluster.s3_requests import NotAsExpected, threads
from cluster.storage import StorageSettings
from cluster.store import Guard, is_remote
from memedit.checksums import FileRecord
from memedit.errors import InputError, LockError, MemeditError
from memedit.files import File, Files, LocalFiles
from memedit.manifest import MANIFEST_NAME, Manifest, manifest_bytes
from memedit.patching import Sink
from memedit.publication import Publication as LocalPublication

LOCK_NAME = ".memedit.publication.lock"
"""Says that a publication began here while nothing else was here; so no other lock has its name."""
_ENDS = {MANIFEST_NAME, "stats.json"}
"""What is written last; a place that has one of them is finished."""
_PARTS_AT_ONCE = 8
"""Uploaded parts in memory, of all files together."""
_memory = threading.BoundedSemaphore(_PARTS_AT_ONCE)


class Publication(Protocol):
    """A version in the making; see `memedit.publication.Publication`."""

    staging: Path
    """A folder of this machine; what is put there is published too."""

    @property
    def location(self) -> str:
        """Where the version will be."""

    @property
    def sink(self) -> Sink:
        """Takes the files of a patched checkpoint."""

    @property
    def files(self) -> Files:
        """What was written through `sink` so far, for workers to load."""

    def probe(self) -> AbstractContextManager[str]:
        """The name of a file in `files`, as long as the block runs: who sees it sees the rest."""

    def publish(self, manifest: Manifest) -> Manifest:
        """Let the version appear; the manifest as written, with every file."""

    def appear(self) -> None:
        """Let what is in `staging` appear as it is, without a manifest."""

    def __enter__(self) -> Self:
        """Begin: a second run to the same place now stops at once."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End: what was not published is removed."""


def open_publication(
    out: str, *, run_id: str, storage: StorageSettings | None = None, guard: Guard | None = None
) -> Publication:
    """A publication to a folder or an `s3://` prefix, to be entered.

    Args:
        out: The location; absent or empty.
        run_id: Letters, digits, `_` and `-`.
        storage: How objects are stored.
        guard: A lock that the caller holds and that keeps all others from this place.
    """
    if is_remote(out):
        return S3Publication(Place.of(out, storage), guard=guard)
    return LocalPublication(Path(out).expanduser(), run_id=run_id)


class S3Publication(Publication):
    """A version in the making under a prefix of an object storage.

    Args:
        place: The prefix; nothing lies there, or what a dead run has left.
        guard: See `open_publication`.
    """

    def __init__(self, place: Place, *, guard: Guard | None = None) -> None:
        if not place.prefix:
            raise InputError("a whole bucket; name a prefix in it", source=place, field="out")
        self.place = place
        self._own: Lease | None = None
        if guard is None:
            guard = self._own = Lease(place, LOCK_NAME)
        self._guard = guard
        self._sink = S3Sink(place, check=self._guard.check_known)
        self.published = False

    @property
    def location(self) -> str:
        """See `Publication`."""
        return str(self.place)

    @property
    def sink(self) -> Sink:
        """See `Publication`."""
        return self._sink

    @property
    def files(self) -> Files:
        """See `Publication`."""
        return S3Files(self.place, _seen=dict(self._sink.written))

    def __enter__(self) -> Self:
        found = self._names()
        if found and self._own is not None and LOCK_NAME not in found:
            raise self._not_empty()
        with ExitStack() as undo:
            if self._own is not None:
                undo.enter_context(self._own)
            # What a dead run has left may go: nobody else can be alive here.
            dead = self._own is None or self._own.taken_over
            left = self._names() - {LOCK_NAME}
            if left & _ENDS or (left and not dead):
                raise self._not_empty()
            if dead:
                self._clear()
            self.staging = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="memedit-")))
            self._undo = undo.pop_all()
        return self

    @contextmanager
    def probe(self) -> Iterator[str]:
        """See `Publication`."""
        self._sink.begun.add("probe")
        self.place.put("probe", b"", absent=True)
        try:
            yield "probe"
        finally:
            self.place.delete(["probe"])

    def publish(self, manifest: Manifest) -> Manifest:
        """See `Publication`.

        Raises:
            LockError: Another run has taken this place over.
            MemeditError: Somebody else writes here.
        """
        records = self._upload_staging()
        manifest = replace(manifest, files={**manifest.files, **records})
        if lost := manifest.files.keys() - self._sink.written.keys():
            raise FileNotFoundError(f"{self.place}: {', '.join(sorted(lost))}")
        self._commit(MANIFEST_NAME, manifest_bytes(manifest))
        return manifest

    def appear(self) -> None:
        """See `Publication`: the last file by name appears last."""
        *files, last = sorted(p for p in self.staging.rglob("*") if p.is_file())
        self._upload_staging(files)
        self._commit(last.relative_to(self.staging).as_posix(), last.read_bytes())

    def _commit(self, name: str, content: bytes) -> None:
        """Make sure that all is as it was written, then write what makes it a version."""
        found, _ = self.place.listing("", deep=True)
        found.pop(LOCK_NAME, None)
        mine = {n: (e.size_bytes, e.etag) for n, e in self._sink.written.items()}
        if {n: (e.size_bytes, e.etag) for n, e in found.items()} != mine:
            self._guard.check()
            raise MemeditError(
                f"{self.place}: is not what this run wrote; another program writes to this place"
            )
        # Of one that was begun twice, because nobody heard the first answer.
        self._end_uploads(self._sink.begun)
        self._guard.check()
        self._sink.begun.add(name)
        try:
            self.place.put(name, content, absent=True)
        except NotAsExpected as error:
            self._sink.begun.discard(name)
            raise LockError(f"{self.place.at(name)}: another run has published here") from error
        self._guard.check()  # whoever took over meanwhile removes what it finds
        self.published = True

    def _upload_staging(self, paths: Sequence[Path] | None = None) -> dict[str, FileRecord]:
        if paths is None:
            paths = sorted(p for p in self.staging.rglob("*") if p.is_file())
        records = {}
        for path in paths:
            name = path.relative_to(self.staging).as_posix()
            records[name] = self._sink.copy(File(LocalFiles(self.staging), name), None)
        return records

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._undo:
            if self.published:
                return
            try:
                self._guard.check()  # what lies here may be another's by now
                # The run that was taken for dead may have written something since.
                self._clear(None if self._guard.taken_over else self._sink.begun)
            except MemeditError:
                # Out of reach: the lock stays, so that the next run cleans up.
                if self._own is not None:
                    self._own.abandon()

    def _clear(self, only: set[str] | None = None) -> None:
        """Remove what lies here without being a version, and uploads that did not end."""
        self._end_uploads(only)
        names = self._names() - {LOCK_NAME}
        # The manifest first, should it be there: never is there one of what is not whole.
        names = names if only is None else names & only
        self.place.delete(sorted(names, key=lambda name: (name not in _ENDS, name)))

    def _end_uploads(self, only: set[str] | None) -> None:
        for name, upload_id in self.place.uploads(""):
            if only is None or name in only:
                self.place.resume(name, upload_id).abort()

    def _names(self) -> set[str]:
        return set(self.place.listing("", deep=True)[0])

    def _not_empty(self) -> InputError:
        return InputError("is not empty; name a new prefix", source=self.place, field="out")


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
            return self._upload(source, (), iter(()))
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
