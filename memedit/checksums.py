"""What is known of a file's content, several files at once, remembered from run to run.

Knows that a 41 GB base must not be hashed every night. Does not know what the files are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from memedit.files import File, file_of

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """The identity of a file's content; sha256 in hexadecimal.

    `sha256` is None for an object that was composed on the storage's side, of which nobody has
    seen every byte; `checksum` is then the storage's own of the whole object, as `CRC64NVME:…` in
    base64, where it has one.
    """

    size_bytes: int
    sha256: str | None
    checksum: str | None = None


def record_of(file: File | Path, *, cache: Path | None = None) -> FileRecord:
    """Size and sha256 of a file, from `cache` where the file is known there and unchanged.

    Args:
        file: The file; read in chunks.
        cache: See `remembered`.
    """
    file = file_of(file) if isinstance(file, Path) else file

    def hashed() -> dict[str, Any]:
        with file.open() as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
            return {"size_bytes": content.seek(0, os.SEEK_END), "sha256": sha256}

    found = remembered("checksums", file, hashed, cache=cache)
    return FileRecord(size_bytes=int(found["size_bytes"]), sha256=str(found["sha256"]))


def records_of(
    files: Mapping[str, File | Path], *, cache: Path | None = None
) -> dict[str, FileRecord]:
    """`record_of` for many files, several at once."""
    return at_once(lambda file: record_of(file, cache=cache), files)


def crc32_of(file: File) -> str:
    """CRC32 of a file's content, written as storages do: `CRC32:` and base64."""
    crc32 = 0
    with file.open() as content:
        while piece := content.read(1 << 24):
            crc32 = zlib.crc32(piece, crc32)
    return f"CRC32:{b64encode(crc32.to_bytes(4, 'big')).decode()}"


def at_once(find: Callable[[Any], T], items: Mapping[str, Any]) -> dict[str, T]:
    """`find` of many items by name; hashlib and torch let other threads run."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(items, threads.map(find, items.values()), strict=True))


def remembered(
    kind: str, file: File, find: Callable[[], dict[str, Any]], *, cache: Path | None
) -> dict[str, Any]:
    """What `find` finds out about a file's content, from `cache` where it is known there.

    Args:
        kind: What is found out; a folder of `cache`.
        file: The file; what was found holds while its fingerprint stays as it is.
        find: Reads the file; gives what JSON has.
        cache: A folder that holds one small JSON file per known file, so that processes cannot
            disturb each other. A cache that cannot be read or written is done without.
    """
    if cache is None:
        return find()
    before = file.files.fingerprint(file.name)
    entry = cache / kind / f"{hashlib.sha256(os.fsencode(before[0])).hexdigest()}.json"
    try:
        known = json.loads(entry.read_bytes())
        if known["identity"] == before and isinstance(known["found"], dict):
            return dict(known["found"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = find()
    if file.files.fingerprint(file.name) == before and file.files.settled(file.name):
        _keep(entry, {"identity": before, "found": found})
    return found


def _keep(entry: Path, value: Mapping[str, Any]) -> None:
    temporary = entry.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(entry)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
