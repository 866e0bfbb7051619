"""A lock by the kernel of this machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memedit.errors import LockError


@contextmanager
def exclusive_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; the kernel frees it when the process dies, however it dies.

    Raises:
        LockError: Another process holds it, and `wait` is false.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            os.close(handle)
            raise LockError(f"{path}: another run holds this lock; wait until it ends") from error
        # The holder before may have removed the file between our open and our lock.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)
    try:
        yield
    finally:
        # Removed while it is held, so that nobody can hold a file that is about to go.
        path.unlink(missing_ok=True)
        os.close(handle)
