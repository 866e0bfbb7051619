"""Files and small objects in S3, behind the same protocols as folders.

Knows how to read one version of every object and no other, and how a lock is kept where there is no
kernel. Requests are made in `cluster.s3`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from cluster.lease import Lease
from cluster.s3 import Entry, Place
from cluster.s3_requests import NotAsExpected
from cluster.storage import StorageSettings
from cluster.store import ABSENT, LOCK_NAME, Store
from memedit.errors import InputError, LockError
from memedit.files import Files

_READ_AHEAD_BYTES = 8 << 20
_LARGEST_SIDE_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class S3Files(Files):
    """The objects under a prefix, each in the version (ETag) in which it was first seen here.

    Sent to another process, it reads the same versions there, with that process's own keys.
    """

    place: Place
    cache: Path | None = None
    """Folder for copies of small files, which libraries read from a disk only."""
    _seen: dict[str, Entry] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def at(cls, location: str, *, cache: Path | None = None) -> S3Files:
        """The objects at `s3://bucket/prefix`.

        Raises:
            InputError: Not such a location.
        """
        return cls(Place.of(location), cache)

    @property
    def location(self) -> str:
        """See `Files`."""
        return str(self.place)

    @property
    def here(self) -> None:
        """See `Files`."""
        return None

    def sizes(self, folder: str = "", *, deep: bool = False) -> dict[str, int]:
        """See `Files`."""
        found, _ = self.place.listing(folder, deep=deep)
        return {name: self._seen.setdefault(name, now).size_bytes for name, now in found.items()}

    def size(self, name: str) -> int | None:
        """See `Files`."""
        entry = self._entry(name)
        return None if entry is None else entry.size_bytes

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See `Files`; ranged GETs, several at once."""
        entry = self._entry(name)
        if entry is None:
            raise InputError("there is no such object", source=self.place.at(name))
        if start + len(buffer) > entry.size_bytes:
            raise InputError("is shorter than it should be", source=self.place.at(name))
        self.place.read_into(name, start, buffer, etag=entry.etag)

    def open(self, name: str) -> BinaryIO:
        """See `Files`."""
        size = self.size(name)
        if size is None:
            raise InputError("there is no such object", source=self.place.at(name))
        raw = cast(io.RawIOBase, _RangeReader(self, name, size))
        return cast(BinaryIO, io.BufferedReader(raw, _READ_AHEAD_BYTES))

    def fingerprint(self, name: str) -> list[Any]:
        """See `Files`; location, size and ETag."""
        entry = self.entry(name)
        return [self.place.at(name), entry.size_bytes, entry.etag]

    def settled(self, name: str) -> bool:
        """See `Files`: an ETag follows the content, not the clock."""
        return True

    def checksum(self, name: str) -> str | None:
        """See `Files`."""
        found = self.place.head(name)
        return None if found is None else found.checksum

    def folder(self, names: Iterable[str]) -> Path:
        """See `Files`; fetched once per version of the files."""
        names = sorted(names)
        known = {name: self.entry(name) for name in names}
        for name, entry in known.items():
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
                raise InputError("is not the name of a file", source=self.place.at(name))
            if entry.size_bytes > _LARGEST_SIDE_FILE_BYTES:
                raise InputError(
                    f"{entry.size_bytes} bytes, too many for a file beside the weights",
                    source=self.place.at(name),
                )
        identity = repr([str(self.place), sorted((n, e.etag) for n, e in known.items())])
        name = hashlib.sha256(identity.encode()).hexdigest()
        for parent in (self.cache, _temporary_folder(os.getpid())):
            if parent is None:
                continue
            try:
                return self._fetched(parent / "side-files" / name, names)
            except OSError:  # not writable here; this may be another machine
                continue
        raise InputError(
            "no folder for temporary files can be written to", source=tempfile.gettempdir()
        )

    def _fetched(self, target: Path, names: Iterable[str]) -> Path:
        if not target.is_dir():
            partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
            try:
                for name in names:
                    path = partial / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(self.read(name))
                partial.mkdir(parents=True, exist_ok=True)
                try:
                    partial.rename(target)
                except OSError:  # another process was quicker
                    if not target.is_dir():
                        raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return target

    def entry(self, name: str) -> Entry:
        """Size and ETag of an object, as they were when it was first seen.

        Raises:
            InputError: There is no such object.
        """
        entry = self._entry(name)
        if entry is None:
            raise InputError("there is no such object", source=self.place.at(name))
        return entry

    def _entry(self, name: str) -> Entry | None:
        if name not in self._seen:
            found = self.place.head(name)
            if found is None:
                return None
            self._seen[name] = found
        return self._seen[name]


class _RangeReader(io.RawIOBase):
    """An object as a file that can be read from any position."""

    def __init__(self, files: S3Files, name: str, size: int) -> None:
        self._files, self._name, self._size, self._position = files, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        if count:
            self._files.read_into(self._name, self._position, memoryview(buffer)[:count])
            self._position += count
        return count


@dataclass(frozen=True)
class S3Store(Store):
    """Small objects under a prefix; the version of one is its ETag."""

    place: Place

    @classmethod
    def at(cls, location: str, storage: StorageSettings | None = None) -> S3Store:
        """The objects at `s3://bucket/prefix`.

        Raises:
            InputError: Not such a location.
        """
        return cls(Place.of(location, storage.of_notes if storage else None))

    @property
    def location(self) -> str:
        """See `Store`."""
        return str(self.place)

    def get(self, name: str) -> tuple[bytes, str] | None:
        """See `Store`."""
        return self.place.get(name)

    def put(self, name: str, content: bytes, *, expected: str) -> str:
        """See `Store`; a conditional PUT."""
        try:
            return self.place.put(name, content, etag=expected or None, absent=expected == ABSENT)
        except NotAsExpected as error:
            raise LockError(
                f"{self.place.at(name)}: was changed by another run meanwhile"
            ) from error

    def sizes(self, folder: str = "", *, deep: bool = False) -> dict[str, int]:
        """See `Store`."""
        found, _ = self.place.listing(folder, deep=deep)
        return {name: entry.size_bytes for name, entry in found.items()}

    def folders(self, folder: str = "") -> list[str]:
        """See `Store`."""
        return self.place.listing(folder, deep=False)[1]

    def delete(self, names: Iterable[str]) -> None:
        """See `Store`."""
        self.place.delete(list(names))

    def files(self, folder: str = "") -> Files:
        """See `Store`."""
        place = Place.of(self.place.at(folder)) if folder else self.place
        return S3Files(place)

    def lock(self) -> AbstractContextManager[Any]:
        """See `Store`; a lease that is renewed as long as this process lives."""
        return Lease(self.place, LOCK_NAME)

    def uploads(self, folder: str = "") -> list[str]:
        """See `Store`."""
        return sorted({name for name, _ in self.place.uploads(folder)})

    def abort_uploads(self, folder: str = "") -> None:
        """See `Store`."""
        for name, upload_id in self.place.uploads(folder):
            self.place.resume(name, upload_id).abort()


@functools.cache
def _temporary_folder(process: int) -> Path:
    """A folder of this process's own, removed when it ends."""
    import atexit

    folder = tempfile.mkdtemp(prefix="memedit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
