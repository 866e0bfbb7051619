"""Files that appear whole or not at all, and errors that name the file a disk has no room for."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from memedit.errors import InputError


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Name the file that cannot be written, whatever library writes it.

    Raises:
        InputError: The disk is full, the folder is read-only, and the like.
    """
    try:
        yield
    except OSError as error:
        where = target if error.filename is None else error.filename
        reason = error.strerror or error
        raise InputError(f"cannot be written or read: {reason}", source=where) from error
    except SafetensorError as error:  # the library's own form of an OSError
        raise InputError(f"cannot be written or read: {error}", source=target) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that appears at `path`, in place of what was there, when the block ends.

    It is on the disk then, and whoever may enter its folder may read it (mode 0644; libraries and
    `tempfile` make files that nobody else can read). After an error nothing has changed.

    Raises:
        InputError: See `writing`.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with writing(path):
        try:
            yield partial
            partial.chmod(0o644)
            handle = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
