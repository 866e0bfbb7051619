"""Second moments that are being counted, kept so that a killed run goes on where it was.

Knows a folder of finished work and the depot behind it; does not know how tokens are counted.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cluster.artifacts import Artifacts
from cluster.store import Guard
from memedit.collect import Kept
from memedit.errors import LockError, MemeditError
from memedit.lock import exclusive_lock
from memedit.moments import SecondMoment, check_moment, load_moment, save_moment
from memedit.writing import whole_file, writing

_UNITS_NAME = "units.json"
_LEFT_S = 14 * 86_400
"""What nobody has gone on with for so long is removed from the folder."""


class KeptMoments(Kept):
    """Second moments that are being counted, in the folder of `artifacts` and its depot.

    A small file names the units and is written last; it is what makes the others count, which it
    names too. It belongs to one run at a time: to the one inside `held`.

    Args:
        artifacts: Where finished work is.
        digest: Identity of the collection: settings, layers, and the windows themselves.
    """

    def __init__(self, artifacts: Artifacts, digest: str) -> None:
        self._artifacts, self._depot = artifacts, artifacts.depot
        self._name = f"moments/unfinished/{digest}"
        self.folder = artifacts.folder / self._name
        self._lock = f"{self._name}.lock"
        self._lease: Guard | None = None

    @contextmanager
    def held(self) -> Iterator[Self | None]:
        """This, while the block runs; None where another run has it."""
        path = self._artifacts.folder / self._lock
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive_lock(path))
                if self._depot is not None:
                    self._lease = stack.enter_context(self._depot.lock(self._lock))
            except LockError:
                stack.close()
                yield None
            else:
                self._sweep()
                yield self

    def _sweep(self) -> None:
        """Remove what runs have left here that nobody went on with."""
        for folder in self.folder.parent.iterdir():
            lock = folder.with_name(f"{folder.name}.lock")
            with suppress(OSError, LockError):
                if folder.is_dir() and time.time() - folder.stat().st_mtime > _LEFT_S:
                    with exclusive_lock(lock):
                        shutil.rmtree(folder, ignore_errors=True)

    def load(self) -> tuple[frozenset[int], Mapping[int, SecondMoment]]:
        """See `Kept`; what is damaged counts as not kept."""
        raw = self._units()
        if raw is None:
            return frozenset(), {}
        try:
            found = json.loads(raw)
            units = frozenset(map(int, found["units"]))
            names = {int(layer): f"{self._name}/{name}" for layer, name in found["layers"]}
        except (ValueError, KeyError, TypeError):
            return frozenset(), {}
        if any(self._artifacts.read(name, check_moment) is None for name in names.values()):
            return frozenset(), {}
        paths = {layer: self._artifacts.folder / name for layer, name in names.items()}
        return units, _MomentFiles(paths)

    def _units(self) -> bytes | None:
        if self._depot is not None:
            return self._depot.read(f"{self._name}/{_UNITS_NAME}")
        path = self.folder / _UNITS_NAME
        return path.read_bytes() if path.exists() else None

    def save(self, units: Iterable[int], moments: Iterable[SecondMoment]) -> None:
        """See `Kept`."""
        turn = secrets.token_hex(4)
        try:
            names = self._write(turn, units, moments)
        except BaseException:  # the next try would need as much room again
            for path in self.folder.glob(f"{turn}-*.safetensors"):
                path.unlink(missing_ok=True)
            raise
        for path in self.folder.glob("*.safetensors"):
            if path.name not in names:
                path.unlink(missing_ok=True)
        with suppress(MemeditError):  # it is kept by now; the rest is only room
            self._drop(but=[_UNITS_NAME, *names])

    def _write(self, turn: str, units: Iterable[int], moments: Iterable[SecondMoment]) -> list[str]:
        """The names of the files of the moments, which begin with `turn`."""
        names: dict[int, str] = {}
        for moment in moments:
            name = names[moment.layer] = f"{turn}-{moment.layer}.safetensors"
            with self._artifacts.kept(f"{self._name}/{name}") as path:
                save_moment(path, moment, metadata={})
        if self._lease is not None:
            self._lease.check()
        units_json = json.dumps({"units": sorted(units), "layers": list(names.items())})
        if self._depot is not None:
            self._depot.write(f"{self._name}/{_UNITS_NAME}", units_json.encode())
        with whole_file(self.folder / _UNITS_NAME) as partial:
            partial.write_text(units_json)
        return list(names.values())

    def _drop(self, *, but: Sequence[str] = ()) -> None:
        if self._depot is not None:
            kept = {f"{self._name}/{name}" for name in but}
            self._depot.drop(sorted(self._depot.names([self._name]) - kept))

    def forget(self) -> None:
        """See `Kept`; what another run has taken over is its own."""
        with suppress(LockError):
            if self._lease is not None:
                self._lease.check()
            self._drop()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _MomentFiles(Mapping[int, SecondMoment]):
    """Second moments by layer, read when they are asked for."""

    paths: Mapping[int, Path]

    def __getitem__(self, layer: int) -> SecondMoment:
        return load_moment(self.paths[layer])

    def __iter__(self) -> Iterator[int]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def windows_digest(windows: Sequence[Sequence[int]]) -> str:
    """Identity of windows of token ids, in their order."""
    sha256 = hashlib.sha256()
    for window in windows:
        sha256.update(array("q", [len(window), *window]).tobytes())
    return sha256.hexdigest()
