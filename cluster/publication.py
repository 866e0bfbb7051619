"""Publishing to a folder or to an `s3://` prefix: all of it becomes visible at once, or nothing.

Under a prefix, objects lie at their final names from the beginning, and a version is what has a
manifest: it is written last, and only if there is none. Knows the order of requests that survives a
kill at any moment; how a folder does the same is in `memedit.publication`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from cluster.lease import Lease
from cluster.s3 import Place
from cluster.s3_files import S3Files
from cluster.s3_requests import NotAsExpected
from cluster.s3_sink import S3Sink
from cluster.storage import StorageSettings
from cluster.store import Guard, is_remote
from memedit.checksums import FileRecord
from memedit.errors import InputError, LockError, MemeditError
from memedit.files import File, Files, LocalFiles
from memedit.manifest import MANIFEST_NAME, UNFINISHED_NAME, Manifest, manifest_bytes
from memedit.patching import Sink
from memedit.publication import Publication as LocalPublication

LOCK_NAME = ".memedit.publication.lock"
"""Says that a publication began here while nothing else was here; so no other lock has its name."""
RESULTS_NAME = "results.json"
"""What a comparison, a search and their like end with."""
_NOTES = {LOCK_NAME, UNFINISHED_NAME}
_ENDS = {MANIFEST_NAME, "stats.json", RESULTS_NAME}
"""What is written last; a place that has one of them is finished."""


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
            left = self._names() - _NOTES
            if left & _ENDS:  # beside a version, of a run that was killed at its very end
                self.place.delete([UNFINISHED_NAME])
            if left & _ENDS or (left and not dead):
                raise self._not_empty()
            if dead:
                self._guard.check()
                self._clear()
            # After hours of work it would be too late to learn that they may not be listed.
            self.place.uploads("")
            self.staging = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="memedit-")))
            # Whoever reads here from now on is told that this is no version yet.
            self.place.put(UNFINISHED_NAME, b"")
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
        """See `Publication`: what says that the place is finished appears last."""
        found = (p for p in self.staging.rglob("*") if p.is_file())
        *files, last = sorted(found, key=lambda p: (p.name in _ENDS, p))
        self._upload_staging(files)
        self._commit(last.relative_to(self.staging).as_posix(), last.read_bytes())

    def _commit(self, name: str, content: bytes) -> None:
        """Make sure that all is as it was written, then write what makes it a version."""
        found, _ = self.place.listing("", deep=True)
        for note in _NOTES:
            found.pop(note, None)
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
            etag = self.place.put(name, content, absent=True)
        except NotAsExpected as error:
            self._sink.begun.discard(name)
            raise LockError(f"{self.place.at(name)}: another run has published here") from error
        try:
            self._guard.check()
        except LockError:
            # This run stood still since the last look; what lies here is another's by now.
            with suppress(NotAsExpected, MemeditError):
                self.place.delete([name], etag=etag)
            raise
        self.published = True
        with suppress(MemeditError):  # beside a manifest it says nothing
            self.place.delete([UNFINISHED_NAME])

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
                self.place.delete([UNFINISHED_NAME])
            except MemeditError:
                # Out of reach: the lock stays, so that the next run cleans up.
                if self._own is not None:
                    self._own.abandon()

    def _clear(self, only: set[str] | None = None) -> None:
        """Remove what lies here without being a version, and uploads that did not end."""
        with suppress(MemeditError):  # the objects matter more
            self._end_uploads(only)
        names = self._names() - _NOTES
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
