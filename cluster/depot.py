"""An `s3://` prefix behind a cache folder: what one machine has finished is there for the next.

Names in it are those in the folder, and what is under a name never changes: it is the digest of all
that made it. Knows objects and paths; does not know what is in them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
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
        return cls(Place.of(location, storage))

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

    def fetch(self, name: str, path: Path) -> None:
        """Write the content of an object to `path`.

        Raises:
            InputError: There is no such object.
        """
        File(S3Files(self.place), name).fetch(path)

    def each_small(self, names: Iterable[str], take: Callable[[str, bytes], None]) -> None:
        """Hand on the content of those small objects that are there; from several threads."""

        def fetch(name: str) -> None:
            if (found := self.place.get(name)) is not None:
                take(name, found[0])

        done_all(threads().map(fetch, names))

    def read(self, name: str) -> bytes:
        """A small object, whole.

        Raises:
            InputError: There is no such object.
        """
        found = self.place.get(name)
        if found is None:
            raise InputError("there is no such object", source=self.place.at(name))
        return found[0]

    def write(self, name: str, content: bytes) -> None:
        """Put a small object in place of what was there."""
        self.place.put(name, content)

    def names(self, folder: str) -> list[str]:
        """The objects in a folder."""
        return list(self.place.listing(folder, deep=False)[0])

    def keep(self, folder: Path, name: str) -> None:
        """Send a file; a large one only where there is no such object yet."""
        path = folder / name
        if path.stat().st_size <= _SMALL_BYTES:
            self.place.put(name, path.read_bytes())
            return
        with suppress(LockError):  # somebody else was quicker with the same
            S3Sink(self.place).copy(File(LocalFiles(folder), name), None)

    def drop(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there do not matter."""
        self.place.delete(list(names))

    def lock(self, name: str) -> Lease:
        """A lock between machines."""
        return Lease(self.place, name)
