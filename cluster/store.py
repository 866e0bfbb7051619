"""One door to folders and `s3://` prefixes: files to read, and small objects to change.

Knows which of the two a location names. Requests to S3 are made in `cluster.s3`, folders are read
by `memedit.files`; what is stored is nobody's business here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.storage import StorageSettings
from memedit.errors import InputError, LockError
from memedit.files import File, Files, LocalFiles, file_of
from memedit.lock import exclusive_lock
from memedit.writing import whole_file

ABSENT = ""
"""The version of an object that is not there."""
LOCK_NAME = ".memedit.lock"


class Guard(Protocol):
    """A lock that is held, unless it was taken over."""

    @property
    def taken_over(self) -> bool:
        """Whether the holder before has died without letting go."""

    def check(self) -> None:
        """Ask whether the lock is still held.

        Raises:
            LockError: It is not.
        """

    def check_known(self) -> None:
        """As `check`, but by what is known already; no request is made."""

    def abandon(self) -> None:
        """Leave the lock behind, for the next run to find."""


class Store(Protocol):
    """Small objects under one place, each replaced as a whole and only if it is as expected."""

    @property
    def location(self) -> str:
        """The place as a person writes it."""

    def get(self, name: str) -> tuple[bytes, str] | None:
        """An object and its version, or None where there is none."""

    def put(self, name: str, content: bytes, *, expected: str) -> str:
        """Write an object if its version is still `expected` (`ABSENT`: there is none).

        Returns:
            The new version.

        Raises:
            LockError: It is another one by now; nothing was written.
            InputError: The place cannot be written to.
        """

    def sizes(self, folder: str = "", *, deep: bool = False) -> dict[str, int]:
        """See `memedit.files.Files.sizes`."""

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly in `folder`, sorted, without their path."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects, in their order; those that are not there do not matter."""

    def files(self, folder: str = "") -> Files:
        """The files in a folder of this place."""

    def lock(self) -> AbstractContextManager[Guard | None]:
        """Keep every other run that asks for it out of this place, until the block ends.

        Whoever dies with it, however, does not keep it. What it gives tells whether it is still
        held; None where nothing but death can take it away.

        Raises:
            LockError: Another run holds it.
        """

    def uploads(self, folder: str = "") -> list[str]:
        """Names of objects in `folder` whose upload began and did not end; sorted."""

    def abort_uploads(self, folder: str = "") -> None:
        """Free what uploads that did not end hold; those of a living run fail then."""


def is_remote(location: str) -> bool:
    """Whether a location names an object storage."""
    return location.startswith("s3://")


def join(location: str, name: str) -> str:
    """The location of `name` in `location`."""
    return f"{location.rstrip('/')}/{name}" if is_remote(location) else str(Path(location, name))


def open_files(location: str, *, cache: Path | None = None) -> Files:
    """The files at a folder or `s3://` prefix; nothing is read yet.

    Args:
        location: A path, or `s3://bucket/prefix`.
        cache: Folder for copies of small files that libraries read from disk only.

    Raises:
        InputError: Not such a location.
    """
    if is_remote(location):
        from cluster.s3_files import S3Files  # imports boto3, which takes a moment

        return S3Files.at(location, cache=cache)
    return LocalFiles(Path(location).expanduser())


def open_file(location: str | os.PathLike[str]) -> File:
    """One file at a path or `s3://bucket/key`; nothing is read yet.

    Raises:
        InputError: Not such a location.
    """
    location = os.fspath(location)
    if is_remote(location):
        folder, _, name = location.rstrip("/").rpartition("/")
        return File(open_files(folder), name)
    return file_of(Path(location).expanduser())


def open_store(location: str, *, storage: StorageSettings | None = None) -> Store:
    """The small objects at a folder or `s3://` prefix; new ones are stored by `storage`.

    Raises:
        InputError: Not such a location.
    """
    if is_remote(location):
        from cluster.s3_files import S3Store

        return S3Store.at(location, storage)
    return LocalStore(Path(location).expanduser())


@dataclass(frozen=True)
class LocalStore(Store):
    """A folder of this machine; writers of one object take turns by a lock of the kernel's."""

    root: Path

    @property
    def location(self) -> str:
        """See `Store`."""
        return str(self.root)

    def get(self, name: str) -> tuple[bytes, str] | None:
        """See `Store`; the version is a digest of the content."""
        path = self.root / name
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", source=path) from error
        return content, hashlib.sha256(content).hexdigest()

    def put(self, name: str, content: bytes, *, expected: str) -> str:
        """See `Store`."""
        path = self.root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive_lock(path.with_name(f".{path.name}.lock"), wait=True):
                found = self.get(name)
                if (found[1] if found else ABSENT) != expected:
                    raise LockError(f"{path}: was changed by another run meanwhile")
                with whole_file(path) as partial:
                    partial.write_bytes(content)
        except OSError as error:
            raise InputError(f"cannot be written to: {error.strerror}", source=path) from error
        return hashlib.sha256(content).hexdigest()

    def sizes(self, folder: str = "", *, deep: bool = False) -> dict[str, int]:
        """See `Store`."""
        return LocalFiles(self.root).sizes(folder, deep=deep)

    def folders(self, folder: str = "") -> list[str]:
        """See `Store`."""
        top = self.root / folder
        return sorted(p.name for p in top.iterdir() if p.is_dir()) if top.is_dir() else []

    def delete(self, names: Iterable[str]) -> None:
        """See `Store`; folders that become empty go too."""
        for name in names:
            path = self.root / name
            path.unlink(missing_ok=True)
            for parent in path.relative_to(self.root).parents:
                with suppress(OSError):
                    # Those at the top stay: another run may be about to write into one.
                    if len(parent.parts) > 1:
                        (self.root / parent).rmdir()

    def files(self, folder: str = "") -> Files:
        """See `Store`."""
        return LocalFiles(self.root / folder if folder else self.root)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Store`; by the kernel."""
        with ExitStack() as held:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive_lock(self.root / LOCK_NAME))
            except OSError as error:
                raise InputError(
                    f"cannot be written to: {error.strerror}", source=self.root
                ) from error
            yield

    def uploads(self, folder: str = "") -> list[str]:
        """See `Store`; a folder has none."""
        return []

    def abort_uploads(self, folder: str = "") -> None:
        """See `Store`."""
