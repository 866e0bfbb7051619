"""Finished work that a later run can use: second moments and z vectors, by what made them.

The name of a file is the digest of every input that changes its content, so nothing stale is ever
read. Files appear whole, by renaming; one that is damaged all the same counts as not kept. Knows a
folder and the depot behind it; does not know how its content is made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cluster.storage import StorageSettings
from cluster.store import is_remote
from memedit.config import MomentSettings, TargetSettings, digest_of
from memedit.errors import InputError
from memedit.files import File
from memedit.moments import SecondMoment, check_moment, load_moment, save_moment
from memedit.requests import EditRequest
from memedit.targets import Target
from memedit.writing import whole_file, writing

if TYPE_CHECKING:
    from cluster.depot import Depot

T = TypeVar("T")

# Rises when the same inputs begin to give other numbers.
_MOMENTS_VERSION = 2
_TARGETS_VERSION = 1

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
    """A folder of finished work, shared by all runs; safe to use from several processes.

    Args:
        folder: The folder.
        depot: Where it is kept for other machines; what is there counts as kept, and is fetched
            when it is needed.
    """

    def __init__(self, folder: Path, depot: Depot | None = None) -> None:
        self.folder, self.depot = folder, depot

    @property
    def location(self) -> str:
        """The place as a person writes it."""
        return str(self.depot.place if self.depot else self.folder)

    def moment(self, digest: str) -> SecondMoment | None:
        """A second moment, if it was kept."""
        return self.read(_name("moments", digest), _finite_moment)

    def has_moment(self, digest: str) -> bool:
        """Whether a second moment was kept; does not read its matrix."""
        return self.read(_name("moments", digest), check_moment) is not None

    def forget_moment(self, digest: str) -> None:
        """Remove a second moment that turned out not to be sound."""
        name = _name("moments", digest)
        (self.folder / name).unlink(missing_ok=True)
        if self.depot is not None:
            self.depot.drop([name])

    def keep_moment(self, digest: str, moment: SecondMoment) -> None:
        """Keep a second moment under its digest."""
        with self.kept(_name("moments", digest)) as path:
            save_moment(path, moment, metadata={"digest": digest})

    def fetched_moment(self, digest: str, file: File) -> Path:
        """The path of a file that `save_moment` wrote; from another place it is fetched once.

        Raises:
            InputError: There is no such file, or it cannot be read.
        """
        if file.files.here is not None:
            return file.files.here / file.name
        path = self.folder / _name("moments", digest)
        try:
            check_moment(path)
        except InputError:
            with _appearing(path) as partial:
                file.fetch(partial)
                try:
                    check_moment(partial)
                except InputError as error:
                    raise InputError(error.message, source=file) from error
        return path

    def targets(self, digests: Mapping[str, str]) -> dict[str, Target]:
        """Those z vectors that were kept, by the fact's name in this run.

        Args:
            digests: Of each fact, by that name.
        """
        if self.depot is not None:
            names = {_name("targets", digest) for digest in digests.values()}
            there = self.depot.names({name.rpartition("/")[0] for name in names})
            here = {name for name in names if (self.folder / name).exists()}
            self.depot.each_small((names & there) - here, self._put)
            # From a run that did not know the depot, or was killed.
            self.depot.keep_small(self.folder, here - there)
        kept = {case_id: self.target(digest, case_id) for case_id, digest in digests.items()}
        return {case_id: target for case_id, target in kept.items() if target is not None}

    def kept_targets(self, digests: Iterable[str]) -> set[str]:
        """Which z vectors were kept, by their digests; none is read."""
        names = {_name("targets", digest): digest for digest in digests}
        there = {name for name in names if (self.folder / name).exists()}
        if self.depot is not None:
            there |= self.depot.names({name.rpartition("/")[0] for name in names}) & names.keys()
        return {names[name] for name in there}

    def target(self, digest: str, case_id: str) -> Target | None:
        """A z vector, if it is in the folder; `case_id` is the fact's name in this run."""

        def read(path: Path) -> Target:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["target"])
                z_O = file.get_tensor("z_O")
            losses = tuple(facts.pop("losses"))
            if not bool(z_O.isfinite().all()):
                raise ValueError("NaN")
            return Target(case_id=case_id, z_O=z_O, losses=losses, **facts)

        return _sound(self.folder / _name("targets", digest), read)

    def keep_target(self, digest: str, target: Target) -> None:
        """Keep a z vector under its digest."""
        facts = {
            "h_norm": target.h_norm,
            "delta_norm": target.delta_norm,
            "losses": target.losses,
            "converged": target.converged,
        }
        metadata = {"target": json.dumps(facts)}
        with self.kept(_name("targets", digest)) as path:
            save_file({"z_O": target.z_O.contiguous()}, path, metadata=metadata)

    def windows(self, digest: str) -> list[list[int]] | None:
        """Windows of token ids, if they were kept."""

        def read(path: Path) -> list[list[int]]:
            with safe_open(path, framework="pt") as file:
                ids: list[list[int]] = file.get_tensor("ids_BT").tolist()
            return ids

        return self.read(_name("windows", digest), read)

    def keep_windows(self, digest: str, windows: Sequence[Sequence[int]]) -> None:
        """Keep windows of one length under their digest."""
        ids_BT = torch.tensor(windows)
        with self.kept(_name("windows", digest)) as path:
            save_file({"ids_BT": ids_BT}, path)

    def read(self, name: str, read: Callable[[Path], T]) -> T | None:
        """What is made of a file, if it is sound; fetched where there is none that is."""
        path = self.folder / name
        found = _sound(path, read)
        if self.depot is None:
            return found
        if found is None:
            if self.depot.has(name):
                with _appearing(path) as partial:
                    if not self.depot.fetch(name, partial):
                        partial.touch()  # gone meanwhile: not sound, so not kept
                found = _sound(path, read)
        elif not self.depot.has(name):  # from a run that did not know the depot, or was killed
            self.depot.keep(self.folder, name)
        return found

    def _put(self, name: str, content: bytes) -> None:
        with _appearing(self.folder / name) as partial:
            partial.write_bytes(content)

    @contextmanager
    def kept(self, name: str) -> Iterator[Path]:
        """A file to write that appears under its name when the block ends."""
        with _appearing(self.folder / name) as partial:
            yield partial
        if self.depot is not None:
            self.depot.keep(self.folder, name)


def open_artifacts(
    location: str | None, *, cache: Path, storage: StorageSettings | None = None
) -> Artifacts:
    """The finished work at a folder or `s3://` prefix; by default in the cache folder.

    Raises:
        InputError: The prefix cannot be written to.
    """
    if location is None:
        return Artifacts(cache)
    if not is_remote(location):
        return Artifacts(Path(location).expanduser())
    from cluster.depot import Depot  # imports boto3, which takes a moment

    depot = Depot.at(location, storage)
    depot.check()
    return Artifacts(cache, depot)


def _name(kind: str, digest: str) -> str:
    return f"{kind}/{digest[:2]}/{digest}.safetensors"


def _finite_moment(path: Path) -> SecondMoment:
    moment = load_moment(path)
    if not bool(moment.sum_II.diagonal().isfinite().all()):
        raise ValueError("NaN")
    return moment


def _sound(path: Path, read: Callable[[Path], T]) -> T | None:
    """What is made of a file; None where there is none, or it is damaged."""
    try:
        return read(path) if path.exists() else None
    except (SafetensorError, InputError, OSError, KeyError, ValueError, TypeError):
        return None


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file to write that appears when the block ends, in a folder that is made for it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent)
    with whole_file(path) as partial:
        yield partial


def _remove_stale(folder: Path) -> None:
    """Remove what killed runs have left."""
    with suppress(OSError):  # another process may be quicker
        for partial in folder.glob("*.partial"):
            if time.time() - partial.stat().st_mtime > _STALE_S:
                partial.unlink()
