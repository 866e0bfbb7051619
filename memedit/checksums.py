"""sha256 of files, several at once, remembered from run to run.

Knows that a 41 GB base must not be hashed every night. Does not know what the files are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTLED_NS = 2_000_000_000
"""A file changed a moment ago may change again within one tick of the file system's clock, so its
checksum is not remembered yet."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """The identity of a file's content; sha256 in hexadecimal."""

    size_bytes: int
    sha256: str


def record_of(path: Path, *, cache: Path | None = None) -> FileRecord:
    """Size and sha256 of a file, from `cache` where the file is known there and unchanged.

    Args:
        path: The file; read in chunks.
        cache: A folder that holds one small JSON file per known path, so that processes cannot
            disturb each other. A cache that cannot be read or written is done without.
    """
    if cache is None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileRecord(size_bytes=os.fstat(file.fileno()).st_size, sha256=digest)
    real = path.resolve()
    entry = cache / "checksums" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    before = _identity(real)
    try:
        known = json.loads(entry.read_bytes())
        if known["identity"] == before and isinstance(known["sha256"], str):
            return FileRecord(size_bytes=real.stat().st_size, sha256=known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    record = record_of(real)
    if _identity(real) == before and time.time_ns() - real.stat().st_mtime_ns > SETTLED_NS:
        _keep(entry, {"identity": before, "sha256": record.sha256})
    return record


def records_of(paths: Mapping[str, Path], *, cache: Path | None = None) -> dict[str, FileRecord]:
    """`record_of` for many files; hashlib lets other threads run, so several at once."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        records = threads.map(lambda path: record_of(path, cache=cache), paths.values())
        return dict(zip(paths, records, strict=True))


def _identity(real: Path) -> list[Any]:
    status = real.stat()
    return [os.fspath(real), status.st_size, status.st_mtime_ns, status.st_ino]


def _keep(entry: Path, value: Mapping[str, Any]) -> None:
    temporary = entry.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(entry)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
