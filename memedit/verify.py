"""Whether a published version is as it was published, byte by byte.

Knows the manifest and the layout of a checkpoint; changes nothing. Everything that is found is
told, not the first only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memedit.checkpoint import Checkpoint
from memedit.checksums import FileRecord, at_once, crc32_of, record_of
from memedit.errors import InputError
from memedit.files import File, Files
from memedit.manifest import MANIFEST_NAME, Manifest, read_manifest
from memedit.model import check_loadable
from memedit.patching import row_blocks
from memedit.shards import read_header

_SMALL_BYTES = 64 << 20
"""Files that are looked at whenever a version is loaded."""

Kind = Literal["missing", "size", "checksum", "unlisted", "outside", "damaged", "tensor", "base"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One way in which a version differs from its manifest, or from its base."""

    file: str
    kind: Kind
    message: str


def verify(files: Files, *, base: Checkpoint | None = None, quick: bool = False) -> list[Problem]:
    """Compare a version with its manifest; empty when all is as published.

    Sizes, checksums, edited tensors; of a full checkpoint also its headers and index, that
    transformers would load it, and that every tensor that was not edited is the base's. Hidden
    files are left aside.

    Args:
        files: The version.
        base: Its base model, which then is read too.
        quick: Read no file whole: sizes and the storage's own checksums stand for the content.

    Raises:
        InputError: The manifest is missing or damaged, or the place cannot be read.
    """
    manifest = read_manifest(files)
    present = files.sizes(deep=True)
    listed = {name: (name, record) for name, record in sorted(manifest.files.items())}
    checked = at_once(lambda each: _check(files, present, *each, quick=quick), listed)
    problems = [problem for problem in checked.values() if problem is not None]
    for name in sorted(present.keys() - manifest.files.keys() - {MANIFEST_NAME}):
        if not any(part.startswith(".") for part in name.split("/")):
            problems.append(
                Problem(file=name, kind="unlisted", message="is not part of this version")
            )
    # What is missing or of another size would only be found once more.
    whole = not any(p.kind in ("missing", "size", "outside") for p in problems)
    if whole and manifest.format == "full" and manifest.tensors:
        problems += _check_model(files, manifest, base)
    elif whole:
        problems += _check_headers(files, manifest)
    return problems


def check_listed(files: Files, manifest: Manifest) -> None:
    """Check the files of a version but its weights, whose edited tensors are checked when read.

    Raises:
        InputError: One is missing, of another size, or was changed.
    """
    present = files.sizes(deep=True)
    small = {
        name: (name, listed)
        for name, listed in manifest.files.items()
        if not name.endswith(".safetensors") and listed.size_bytes <= _SMALL_BYTES
    }
    for problem in at_once(lambda each: _check(files, present, *each, quick=False), small).values():
        if problem is not None:
            raise InputError(
                f"{problem.message}; if that is meant, remove {MANIFEST_NAME}",
                source=File(files, problem.file),
            )


def _check(
    files: Files, present: dict[str, int], name: str, listed: FileRecord, *, quick: bool
) -> Problem | None:
    here = files.here
    if here is not None and not (here / name).resolve().is_relative_to(here.resolve()):
        return Problem(file=name, kind="outside", message="is a link that leaves the folder")
    if name not in present:
        return Problem(file=name, kind="missing", message="is missing")
    if present[name] != listed.size_bytes:
        message = f"has {present[name]} bytes, published with {listed.size_bytes}"
        return Problem(file=name, kind="size", message=message)
    changed = Problem(file=name, kind="checksum", message="was changed since it was published")
    kind = (listed.checksum or "").partition(":")[0]
    now = files.checksum(name) if kind else None
    if now is not None and now.startswith(f"{kind}:") and now != listed.checksum:
        return changed  # one of another kind says nothing
    if quick:
        return None
    if listed.sha256 is not None:
        return None if record_of(File(files, name)).sha256 == listed.sha256 else changed
    # Composed by a storage, whose word alone is not enough here.
    known = kind == "CRC32"
    return changed if known and crc32_of(File(files, name)) != listed.checksum else None


def _check_headers(files: Files, manifest: Manifest) -> Iterator[Problem]:
    """What a delta or an adapter can be checked for without the model that it belongs to."""
    for name in manifest.files:
        if name.endswith(".safetensors"):
            try:
                read_header(File(files, name))
            except InputError as error:
                yield Problem(file=name, kind="damaged", message=error.message)


def _check_model(files: Files, manifest: Manifest, base: Checkpoint | None) -> Iterator[Problem]:
    try:
        checkpoint = Checkpoint.open(files)
        check_loadable(files)
    except InputError as error:
        place = error.source
        name = place.name if isinstance(place, File) else "config.json"
        yield Problem(file=name, kind="damaged", message=error.message)
        return
    yield from _check_tensors(checkpoint, manifest)
    if base is not None:
        yield from _check_unedited(checkpoint, base, manifest.tensors)


def _check_tensors(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[Problem]:
    for name, listed in sorted(manifest.tensors.items()):
        if name not in checkpoint.tensors:
            yield Problem(file=MANIFEST_NAME, kind="tensor", message=f"lacks the tensor {name}")
            continue
        sha256 = hashlib.sha256()
        for rows in _rows(checkpoint, name):
            sha256.update(_raw(rows))
        if sha256.hexdigest() != listed.sha256:
            yield Problem(
                file=checkpoint.shard_of(name),
                kind="tensor",
                message=f"the edited tensor {name} is not the one that was published",
            )


def _check_unedited(
    checkpoint: Checkpoint, base: Checkpoint, edited: Iterable[str]
) -> Iterator[Problem]:
    for name in sorted((checkpoint.tensors.keys() | base.tensors.keys()) - set(edited)):
        mine, theirs = checkpoint.tensors.get(name), base.tensors.get(name)
        if mine is None or theirs is None:
            where = "this version" if mine is None else "the base"
            shard = (mine or theirs).shard if mine or theirs else ""  # type: ignore[union-attr]
            yield Problem(file=shard, kind="base", message=f"{where} lacks the tensor {name}")
        elif (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape) or any(
            not torch.equal(_bits(a), _bits(b))
            for a, b in zip(_rows(checkpoint, name), _rows(base, name), strict=True)
        ):
            yield Problem(
                file=mine.shard, kind="base", message=f"the tensor {name} is not the base's"
            )


def _rows(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    shape = checkpoint.info(name).shape
    if not shape:
        yield checkpoint.read(name).reshape(1)
        return
    for start, stop in row_blocks(shape):
        yield checkpoint.read_rows(name, start, stop)


def _bits(rows: Tensor) -> Tensor:
    return rows.reshape(-1).view(torch.uint8)


def _raw(rows: Tensor) -> memoryview:
    array: Any = _bits(rows).numpy()
    return memoryview(array)
