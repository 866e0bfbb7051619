"""Places with named files: a folder here, or anything else that reads by name and byte range.

`Files` is the seam behind which object storage stands (`cluster.store`); the folder of this machine
is here. Knows names, sizes and bytes; does not know what is in a file.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from memedit.errors import InputError


class Files(Protocol):
    """Files under one place, by names relative to it, with `/` between their parts.

    Small enough to be sent to another process, which then reads the same files. A place whose
    files can be told apart by version (an ETag) reads, from the first look on, that version or
    raises.
    """

    @property
    def location(self) -> str:
        """The place as a person writes it."""

    @property
    def here(self) -> Path | None:
        """The folder, where the place is one of this machine."""

    def sizes(self, folder: str = "", *, deep: bool = False) -> dict[str, int]:
        """Sizes in bytes by name of the files in `folder` (and, if `deep`, below it), sorted.

        Empty where there is no such folder.

        Raises:
            InputError: The place cannot be read.
        """

    def size(self, name: str) -> int | None:
        """Size in bytes of a file, or None where there is none."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer`, wherever its memory lies, with the bytes of a file from `start` on.

        Raises:
            InputError: No such file, it cannot be read, is shorter, or has changed.
        """

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytearray:
        """Bytes `start` to `start + size` (or to the end) of a file; the caller owns them.

        Raises:
            InputError: As `read_into`.
        """
        if size is None:
            whole = self.size(name)
            if whole is None:
                raise InputError("no such file", source=place_of(self, name))
            size = max(0, whole - start)
        buffer = bytearray(size)
        self.read_into(name, start, memoryview(buffer))
        return buffer

    def open(self, name: str) -> BinaryIO:
        """A file for reading from any position, in pieces.

        Raises:
            InputError: As `read`.
        """

    def fingerprint(self, name: str) -> list[Any]:
        """What stays equal only while a file's content does; has its place in it."""

    def settled(self, name: str) -> bool:
        """Whether a change from now on would show in the fingerprint."""

    def checksum(self, name: str) -> str | None:
        """The place's own checksum of a file's content, as `CRC32:…`, where it has one."""
        return None

    def folder(self, names: Iterable[str]) -> Path:
        """A folder of this machine that holds these (small) files."""


@dataclass(frozen=True)
class File:
    """One file of a place; as a text, where it lies."""

    files: Files
    name: str

    def __str__(self) -> str:
        return place_of(self.files, self.name)

    @property
    def suffix(self) -> str:
        """The end of the name with its dot, in lower case."""
        return os.path.splitext(self.name)[1].lower()

    def open(self) -> BinaryIO:
        """See `Files.open`."""
        return self.files.open(self.name)

    def read(self) -> bytes:
        """All its bytes."""
        return bytes(self.files.read(self.name))

    def fetch(self, path: Path) -> None:
        """Write its content to a file of this machine."""
        with self.open() as reader, path.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 26)


def place_of(files: Files, name: str) -> str:
    """Where a file lies, as a person writes it."""
    return f"{files.location.rstrip('/')}/{name}" if files.location != "." else name


SETTLED_S = 2.0
"""A file changed a moment ago may change again within one tick of the file system's clock."""


@dataclass(frozen=True)
class LocalFiles(Files):
    """A folder of this machine."""

    root: Path

    @property
    def location(self) -> str:
        """See `Files`."""
        return str(self.root)

    @property
    def here(self) -> Path | None:
        """See `Files`."""
        return self.root

    def sizes(self, folder: str = "", *, deep: bool = False) -> dict[str, int]:
        """See `Files`; what comes or goes while we look counts as there or not."""
        found = {}
        for parent, folders, names in os.walk(self.root / folder, onerror=_unless_gone):
            if not deep:
                folders.clear()
            for name in names:
                path = Path(parent, name)
                if (size := _size(path)) is not None:
                    found[path.relative_to(self.root).as_posix()] = size
        return dict(sorted(found.items()))

    def size(self, name: str) -> int | None:
        """See `Files`."""
        return _size(self.root / name)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See `Files`."""
        path, done = self.root / name, 0
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                # The kernel returns at most 2 GiB a call.
                while done < len(buffer) and (count := file.readinto(buffer[done:])):
                    done += count
        except FileNotFoundError as error:
            raise InputError("no such file", source=path) from error
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", source=path) from error
        if done < len(buffer):
            raise InputError("has become shorter since it was opened", source=path)

    def open(self, name: str) -> BinaryIO:
        """See `Files`."""
        path = self.root / name
        try:
            return path.open("rb")
        except FileNotFoundError as error:
            raise InputError("no such file", source=path) from error
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", source=path) from error

    def fingerprint(self, name: str) -> list[Any]:
        """See `Files`; real path, size, time of change and inode."""
        real = (self.root / name).resolve()
        status = real.stat()
        return [os.fspath(real), status.st_size, status.st_mtime_ns, status.st_ino]

    def settled(self, name: str) -> bool:
        """See `Files`."""
        return time.time() - (self.root / name).stat().st_mtime > SETTLED_S

    def folder(self, names: Iterable[str]) -> Path:
        """See `Files`: the folder itself."""
        return self.root


def _size(path: Path) -> int | None:
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # gone, or a link to nowhere
            return None
        raise InputError(f"cannot be read: {error.strerror}", source=path) from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise InputError(f"cannot be read: {error.strerror}", source=error.filename) from error


def files_of(place: Files | Path) -> Files:
    """`place` as files: a path becomes the folder of this machine."""
    return LocalFiles(place) if isinstance(place, Path) else place


def file_of(path: Path) -> File:
    """A file of this machine."""
    return File(LocalFiles(path.parent), path.name)


def read_object(file: File, wanted: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        file: The file.
        wanted: What should be there, for the error when it is not.

    Raises:
        InputError: No such file, it cannot be read, or holds no JSON object.
    """
    if file.files.size(file.name) is None:
        raise InputError(f"no {file.name}: {wanted}", source=file.files.location)
    try:
        value = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", source=file) from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", source=file)
    return value
