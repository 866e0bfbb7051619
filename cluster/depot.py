"""An `s3://` prefix behind a cache folder: what one machine has finished is there for the next.

Names in it are those in the folder, and what is under a name never changes: it is the digest of all
that made it. Knows objects and paths; does not know what is in them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.lease import Lease
from cluster.s3 import Place, done_all
from cluster.s3_files import S3Files
from cluster.s3_requests import threads
from cluster.s3_sink import S3Sink
from cluster.storage import StorageSettings
from memedit.errors import InputError, LockError
from memedit.files import File, LocalFiles

_SMALL_BYTES = 8 << 20
"""What fits in one request."""


@dataclass(frozen=True)
class Depot:
    """Objects under a prefix, each the copy of a file of the same name under a folder."""

    place: Place

    @classmethod
    def at(cls, location: str, storage: StorageSettings | None = None) -> Depot:
        """The objects at `s3://bucket/prefix`.

        Raises:
            InputError: Not such a location.
        """
        # Of the class of notes: z vectors are small, and read again the next night.
        return cls(Place.of(location, storage.of_notes if storage else None))

    def check(self) -> None:
        """Find out now, not after hours, whether objects can be written there.

        Raises:
            InputError: They cannot.
        """
        name = f".probe-{secrets.token_hex(8)}"
        self.place.put(name, b"")
        self.place.delete([name])

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        return self.place.head(name) is not None

    def fetch(self, name: str, path: Path) -> bool:
        """Write the content of an object to `path`; False where there is none (any more).

        Raises:
            InputError: It has changed meanwhile, or `path` cannot be written.
        """
        files = S3Files(self.place)
        if files.size(name) is None:
            return False
        try:
            File(files, name).fetch(path)
        except InputError:
            if self.has(name):
                raise
            return False
        return True

    def each_small(self, names: Iterable[str], take: Callable[[str, bytes], None]) -> None:
        """Hand on the content of those small objects that are there; from several threads."""

        def fetch(name: str) -> None:
            if (content := self.read(name)) is not None:
                take(name, content)

        done_all(threads().map(fetch, names))

    def read(self, name: str) -> bytes | None:
        """A small object, whole; None where there is none."""
        found = self.place.get(name)
        return None if found is None else found[0]

    def write(self, name: str, content: bytes) -> None:
        """Put a small object in place of what was there."""
        self.place.put(name, content)

    def names(self, folders: Iterable[str]) -> set[str]:
        """The objects directly in some folders."""
        listed = threads().map(lambda folder: self.place.listing(folder, deep=False)[0], folders)
        return {name for found in listed for name in found}

    def keep_small(self, folder: Path, names: Iterable[str]) -> None:
        """Send many small files, several at a time."""
        done_all(threads().map(lambda name: self.write(name, (folder / name).read_bytes()), names))

    def keep(self, folder: Path, name: str) -> None:
        """Send a file, in place of what was there."""
        path = folder / name
        if path.stat().st_size <= _SMALL_BYTES:
            self.write(name, path.read_bytes())
            return
        if self.has(name):  # whoever makes it again found it unsound
            self.drop([name])
        try:
            S3Sink(self.place).copy(File(LocalFiles(folder), name), None)
        except LockError:  # somebody else was quicker with the same
            if not self.has(name):
                raise

    def drop(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there do not matter."""
        self.place.delete(list(names))

    def lock(self, name: str) -> Lease:
        """A lock between machines."""
        return Lease(self.place, name)
