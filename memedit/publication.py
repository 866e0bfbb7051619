"""Making a finished folder visible: all of it at once, or nothing.

Knows staging folders, locks, and the order of writes that survives a kill at any moment. Does not
know what is in the folder beyond its manifest.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from memedit.checksums import records_of
from memedit.errors import InputError
from memedit.files import Files, LocalFiles
from memedit.lock import exclusive_lock
from memedit.manifest import MANIFEST_NAME, Manifest, write_manifest
from memedit.patching import LocalSink, Sink
from memedit.writing import writing


class Publication:
    """A version in the making: a hidden folder beside `out` that becomes `out` at the end.

    Enter it before the work begins: a second run to the same place then stops at once. What dead
    runs left is removed. Leaving the block without `publish` removes the staging folder, so that
    a failure, a gate or a key press leaves nothing behind.

    Args:
        out: The folder to publish to; absent or empty. Its parents are made.
        run_id: Letters, digits, `_` and `-`.

    Example:
        with Publication(out, run_id=run_id) as publication:
            patched = write_patched(base, publication.sink, patches)
            publication.publish(Manifest(..., files=patched.files, tensors=patched.tensors))
    """

    def __init__(self, out: Path, *, run_id: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", run_id):
            raise InputError(f"{run_id!r} is not made of letters, digits, _ and -", field="run_id")
        self.out = Path(out).resolve()
        if not self.out.name:
            raise InputError("not a folder to publish to", source=out)
        self._prefix = f".{self.out.name}.partial-"
        self.staging = self.out.with_name(self._prefix + run_id)
        """The folder to write into."""
        self.published = False
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        check_out(self.out)
        parent = self.out.parent
        self._made = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._lock = exclusive_lock(parent / f".{self.out.name}.lock")
            self._lock.__enter__()
        except OSError as error:
            raise InputError(
                f"cannot be written to: {error.strerror}", source=parent, field="out"
            ) from error
        try:
            check_out(self.out)
            # Nobody else can be alive here: this run holds the lock.
            for stale in parent.iterdir():
                if re.fullmatch(re.escape(self._prefix) + r"[A-Za-z0-9_-]+", stale.name):
                    shutil.rmtree(stale)
            self.staging.mkdir()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    @property
    def location(self) -> str:
        """Where the version will be."""
        return str(self.out)

    @contextmanager
    def probe(self) -> Iterator[str]:
        """The name of a file in `files`, as long as the block runs: who sees it sees the rest."""
        token = self.staging / "probe"
        with writing(token):
            token.touch()
        try:
            yield token.name
        finally:
            token.unlink()

    @property
    def sink(self) -> Sink:
        """Takes the files of a patched checkpoint."""
        return LocalSink(self.staging)

    @property
    def files(self) -> Files:
        """What was written so far."""
        return LocalFiles(self.staging.absolute())

    def publish(self, manifest: Manifest) -> Manifest:
        """Write the manifest, wait for the disk, and let the folder appear as `out`.

        Args:
            manifest: Its `files` may lack files that were written beside the checkpoint (a
                report, rejected rows): they are hashed and added.

        Returns:
            The manifest as written.

        Raises:
            InputError: `out` is no longer empty.
        """
        found = {p.relative_to(self.staging).as_posix(): p for p in self._files()}
        if lost := manifest.files.keys() - found.keys():
            raise FileNotFoundError(f"{self.staging}: {', '.join(sorted(lost))}")
        unlisted = {name: path for name, path in found.items() if name not in manifest.files}
        manifest = replace(manifest, files={**manifest.files, **records_of(unlisted)})
        write_manifest(self.staging, manifest)
        self.appear()
        return manifest

    def appear(self) -> None:
        """Wait for the disk, and let the folder appear as `out`, as it is.

        Raises:
            InputError: `out` is no longer empty.
        """
        with writing(self.staging):
            for path in (*self._files(), *self.staging.glob(MANIFEST_NAME)):
                _sync(path)
            for folder in (*(p for p in self.staging.rglob("*") if p.is_dir()), self.staging):
                _sync(folder)
        try:
            # An empty folder in the way is replaced; one with a file in it is not.
            self.staging.rename(self.out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                check_out(self.out)
            raise
        self.published = True
        _sync(self.out.parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self.published:
                shutil.rmtree(self.staging, ignore_errors=True)
        finally:
            self._lock.__exit__(None, None, None)
            if not self.published:
                for folder in self._made:
                    with suppress(OSError):
                        folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(p for p in self.staging.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)


def check_out(out: Path) -> None:
    """Check that `out` can be published to: absent, or an empty folder.

    Raises:
        InputError: It is something else; it is left as it is.
    """
    if out.is_dir():
        if any(out.iterdir()):
            raise InputError("is not empty; name a new folder", source=out, field="out")
    elif out.exists():
        raise InputError("is a file; name a new folder", source=out, field="out")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
