"""Finished work that a later run can use: second moments and z vectors, by what made them.

The name of a file is the digest of every input that changes its content, so nothing stale is ever
read. Files appear whole, by renaming; one that is damaged all the same counts as not kept. Knows a
local folder; does not know how its content is made.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memedit.collect import Kept
from memedit.config import MomentSettings, TargetSettings, digest_of
from memedit.errors import InputError, LockError
from memedit.files import File
from memedit.lock import exclusive_lock
from memedit.moments import SecondMoment, check_moment, load_moment, save_moment
from memedit.requests import EditRequest
from memedit.targets import Target
from memedit.writing import whole_file, writing

# Rises when the same inputs begin to give other numbers.
_MOMENTS_VERSION = 2
_TARGETS_VERSION = 1

_UNITS_NAME = "units.json"
_STALE_S = 86_400
"""What a killed run has left is removed after a day; nothing takes so long to write."""


def moment_digest(
    *,
    model: str,
    corpus: str,
    settings: MomentSettings,
    layer: int,
    weight_name: str,
    layers: Sequence[int],
    dtype: str,
) -> str:
    """Identity of one layer's second moment.

    The module whose inputs are counted has a name, which a job may set for unknown families.
    The other layers of the run matter only where the collection stops by their common error.
    """
    together = tuple(layers) if settings.tolerance > 0 else None
    place = (layer, weight_name, together)
    return digest_of(_MOMENTS_VERSION, model, corpus, asdict(settings), place, dtype)


def target_digest(
    request: EditRequest,
    *,
    model: str,
    contexts: Sequence[str],
    settings: TargetSettings,
    layer: int,
    dtype: str,
    architecture: Mapping[str, str],
) -> str:
    """Identity of one fact's z vector; the size of a batch is not part of it.

    `architecture` is what the job sets of where the model keeps things.
    """
    chosen = asdict(replace(settings, tokens_per_batch=None))
    return digest_of(
        _TARGETS_VERSION,
        model,
        request.digest,
        list(contexts),
        chosen,
        layer,
        dtype,
        dict(architecture),
    )


class Artifacts:
    """A folder of finished work, shared by all runs; safe to use from several processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def moment(self, digest: str) -> SecondMoment | None:
        """A second moment, if it was kept."""
        path = self._path("moments", digest)
        try:
            return load_moment(path) if path.exists() else None
        except InputError:
            return None

    def has_moment(self, digest: str) -> bool:
        """Whether a second moment was kept; does not read its matrix."""
        try:
            check_moment(self._path("moments", digest))
        except InputError:
            return False
        return True

    def keep_moment(self, digest: str, moment: SecondMoment) -> None:
        """Keep a second moment under its digest."""
        with _kept(self._path("moments", digest)) as path:
            save_moment(path, moment, metadata={"digest": digest})

    def fetched_moment(self, digest: str, file: File) -> Path:
        """The path of a file that `save_moment` wrote; from another place it is fetched once.

        Raises:
            InputError: There is no such file, or it cannot be read.
        """
        if file.files.here is not None:
            return file.files.here / file.name
        if not self.has_moment(digest):
            with _kept(self._path("moments", digest)) as path:
                _fetch(file, path)
                try:
                    check_moment(path)
                except InputError as error:
                    raise InputError(error.message, source=file) from error
        return self._path("moments", digest)

    def target(self, digest: str, case_id: str) -> Target | None:
        """A z vector, if it was kept; `case_id` is the fact's name in this run."""
        path = self._path("targets", digest)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["target"])
                z_O = file.get_tensor("z_O")
            losses = tuple(facts.pop("losses"))
            return Target(case_id=case_id, z_O=z_O, losses=losses, **facts)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return None

    def keep_target(self, digest: str, target: Target) -> None:
        """Keep a z vector under its digest."""
        facts = {
            "h_norm": target.h_norm,
            "delta_norm": target.delta_norm,
            "losses": target.losses,
            "converged": target.converged,
        }
        metadata = {"target": json.dumps(facts)}
        with _kept(self._path("targets", digest)) as path:
            save_file({"z_O": target.z_O.contiguous()}, path, metadata=metadata)

    def windows(self, digest: str) -> list[list[int]] | None:
        """Windows of token ids, if they were kept."""
        path = self._path("windows", digest)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                ids: list[list[int]] = file.get_tensor("ids_BT").tolist()
        except (SafetensorError, OSError):
            return None
        return ids

    def keep_windows(self, digest: str, windows: Sequence[Sequence[int]]) -> None:
        """Keep windows of one length under their digest."""
        ids_BT = torch.tensor(windows)
        with _kept(self._path("windows", digest)) as path:
            save_file({"ids_BT": ids_BT}, path)

    def _path(self, kind: str, digest: str) -> Path:
        return self.folder / kind / digest[:2] / f"{digest}.safetensors"


class KeptMoments(Kept):
    """Second moments that are being counted, in the folder of `artifacts`.

    A small file names the units and is written last; it is what makes the others count. It belongs
    to one run at a time: to the one inside `held`.

    Args:
        artifacts: The folder.
        digest: Identity of the collection: settings, layers, and the windows themselves.
    """

    def __init__(self, artifacts: Artifacts, digest: str) -> None:
        self.folder = artifacts.folder / "moments" / "unfinished" / digest
        self._lock = self.folder.with_name(f"{digest}.lock")

    @contextmanager
    def held(self) -> Iterator[Self | None]:
        """This, while the block runs; None where another run has it."""
        with writing(self._lock):
            self._lock.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive_lock(self._lock))
            except LockError:
                yield None
            else:
                yield self

    def load(self) -> tuple[frozenset[int], Mapping[int, SecondMoment]]:
        """See `Kept`; what is damaged counts as not kept."""
        try:
            found = json.loads((self.folder / _UNITS_NAME).read_bytes())
            paths = {int(layer): self.folder / name for layer, name in found["layers"]}
            for path in paths.values():
                check_moment(path)
            return frozenset(found["units"]), _MomentFiles(paths)
        except (OSError, ValueError, KeyError, TypeError, InputError):
            return frozenset(), {}

    def save(self, units: Iterable[int], moments: Iterable[SecondMoment]) -> None:
        """See `Kept`."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        turn, names = secrets.token_hex(4), {}
        for moment in moments:
            names[moment.layer] = f"{turn}-{moment.layer}.safetensors"
            save_moment(self.folder / names[moment.layer], moment, metadata={})
        content = {"units": sorted(units), "layers": list(names.items())}
        with whole_file(self.folder / _UNITS_NAME) as partial:
            partial.write_text(json.dumps(content))
        for path in self.folder.glob("*.safetensors"):
            if path.name not in names.values():
                path.unlink(missing_ok=True)

    def forget(self) -> None:
        """See `Kept`."""
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


@contextmanager
def _kept(path: Path) -> Iterator[Path]:
    """A file to write that appears under its digest when the block ends."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent)
    with whole_file(path) as partial:
        yield partial


def _fetch(file: File, path: Path) -> None:
    with file.open() as reader, path.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 26)


def _remove_stale(folder: Path) -> None:
    """Remove what killed runs have left."""
    with suppress(OSError):  # another process may be quicker
        for partial in folder.glob("*.partial"):
            if time.time() - partial.stat().st_mtime > _STALE_S:
                partial.unlink()
