"""A copy of a checkpoint with some tensors patched: same layout, same offsets, same dtypes.

Only the bytes of the edited tensors are new. They are made a block of rows at a time, so that the
largest weight of a 20B model takes no more memory than a small one. Where the bytes go is behind
`Sink`; a folder of this machine is here. Does not know how a copy becomes visible
(`memedit.publication`).
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from memedit.checkpoint import Checkpoint, is_finite
from memedit.checksums import FileRecord, at_once, record_of
from memedit.errors import InputError, NumericalError
from memedit.files import File
from memedit.manifest import TensorRecord
from memedit.progress import Progress, Silent
from memedit.writing import writing

Patch = Callable[[Tensor, int], Tensor]
"""Some rows of the stored tensor (its own dtype, on the CPU) and the number of the first of them ->
the rows that take their place."""

BLOCK_ELEMENTS = 1 << 22
"""Elements that are upcast to float64 at once. Part of what an edit is: the same blocks give the
same bytes, whoever makes them."""
_READ_BYTES = 1 << 23
_READS_AHEAD = 4


class Sink(Protocol):
    """Where a patched copy is written to, file by file."""

    def copy(self, source: File, known: FileRecord | None) -> FileRecord:
        """Let a file be there as it is; `known` is its record, if anybody has it already."""

    def patch(
        self,
        source: File,
        ranges: Sequence[tuple[int, int]],
        edits: Iterator[tuple[int, memoryview]],
    ) -> FileRecord:
        """Let a file be there with some bytes replaced.

        Args:
            source: The file to start from.
            ranges: (offset, size in bytes) of what is replaced, ascending, without overlap.
            edits: The new bytes with their offsets, ascending; they fill the ranges exactly. Made
                as they are asked for.
        """


@dataclass(frozen=True, kw_only=True)
class PatchedFiles:
    """What `write_patched` wrote: every file of the copy, and the edited tensors by key."""

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    rewritten: tuple[str, ...]
    """The shards that hold edited tensors."""


def write_patched(
    base: Checkpoint,
    sink: Sink,
    patches: Mapping[str, Patch],
    *,
    progress: Progress | None = None,
) -> PatchedFiles:
    """Write a copy of `base` with some tensors replaced; shards without one are passed on.

    Args:
        base: The checkpoint to start from.
        sink: A place without files of these names.
        patches: By checkpoint key, what becomes of its rows; the same shape, any float dtype.
        progress: Told of each finished file, as the stage "publish".

    Raises:
        InputError: A tensor is missing, is quantised, or holds NaN in the base.
        NumericalError: A patched tensor is not finite, or not after the cast to its dtype.
    """
    progress = progress or Silent()
    base.check_editable(patches)
    edited = {s: [n for n in patches if base.shard_of(n) == s] for s in base.shards}
    unchanged = [*(s for s, names in edited.items() if not names), *base.side_files]
    tensors: dict[str, TensorRecord] = {}
    files: dict[str, FileRecord] = {}
    progress.start("publish", total=len(base.shards) + len(base.side_files), unit="files")

    for shard, names in edited.items():
        if names:
            patched = [PatchedTensor(base, name, patches[name]) for name in names]
            patched.sort(key=lambda tensor: tensor.info.offset)
            files[shard] = sink.patch(
                File(base.files, shard),
                [(t.info.offset, t.info.size_bytes) for t in patched],
                (edit for tensor in patched for edit in tensor),
            )
            tensors |= {tensor.name: tensor.record for tensor in patched}
            progress.advance("publish")

    def copy(name: str) -> FileRecord:
        return sink.copy(File(base.files, name), base.known_record(name))

    files |= at_once(copy, {name: name for name in unchanged})
    progress.advance("publish", len(unchanged))
    progress.finish("publish")
    return PatchedFiles(
        files=files, tensors=tensors, rewritten=tuple(s for s, names in edited.items() if names)
    )


def records_of_patches(base: Checkpoint, patches: Mapping[str, Patch]) -> dict[str, TensorRecord]:
    """What `write_patched` would note of the edited tensors; writes nothing.

    Raises:
        InputError, NumericalError: As `write_patched`.
    """
    base.check_editable(patches)
    patched = {name: PatchedTensor(base, name, patch) for name, patch in patches.items()}
    for tensor in patched.values():
        for _ in tensor:
            pass
    return {name: tensor.record for name, tensor in patched.items()}


class PatchedTensor:
    """The bytes of one edited tensor, block by block; afterwards, what is to be noted of it."""

    def __init__(self, base: Checkpoint, name: str, patch: Patch) -> None:
        self.base, self.name, self.patch = base, name, patch
        self.info = base.info(name)
        self._sha256 = hashlib.sha256()
        self._squares = torch.zeros(3, dtype=torch.float64)
        """‖Δ‖², ‖W‖², ‖stored - (W + Δ)‖²."""

    @property
    def record(self) -> TensorRecord:
        """sha256 and norms of what was iterated over."""
        delta, weight, rounding = self._squares.sqrt().tolist()
        return TensorRecord(
            sha256=self._sha256.hexdigest(),
            delta_norm=delta,
            weight_norm=weight,
            rounding_error=rounding / delta if delta else 0.0,
        )

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        """(offset in the shard, bytes) of each block."""
        offset = self.info.offset
        for start, stop in row_blocks(self.info.shape):
            raw = self._block(start, stop)
            self._sha256.update(raw)
            yield offset, raw
            offset += len(raw)

    def _block(self, start: int, stop: int) -> memoryview:
        scalar = not self.info.shape
        before = (
            self.base.read(self.name) if scalar else self.base.read_rows(self.name, start, stop)
        )
        # A patch may work in place on the rows that it is given.
        exact = self.patch(before.clone(), start).detach().cpu()
        if exact.shape != before.shape:
            raise ValueError(
                f"the patch of {self.name} has shape {tuple(exact.shape)}, not"
                f" {tuple(before.shape)}"
            )
        if not is_finite(before):
            raise InputError(
                "the weights hold NaN or an infinity",
                source=File(self.base.files, self.info.shard),
                field=self.name,
            )
        stored = exact.to(self.info.dtype).contiguous()
        if not (is_finite(exact) and is_finite(stored)):
            raise NumericalError(
                f"the edited tensor {self.name} holds NaN or a number beyond {self.info.dtype};"
                " nothing was published. A larger λ or a smaller clamp_norm_factor makes the"
                " update smaller"
            )
        exact, before = exact.double(), before.double()
        distances = ((exact - before), before, (stored.double() - exact))
        self._squares += torch.stack([part.square().sum() for part in distances])
        flat: Any = stored.reshape(-1).view(torch.uint8).numpy()
        return memoryview(flat)


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in blocks of about `BLOCK_ELEMENTS`: (first, behind the last)."""
    rows = shape[0] if shape else 1
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


@dataclass(frozen=True)
class LocalSink(Sink):
    """A folder of this machine, without files of the names that come.

    From a folder, a shard that changes is copied (sharing blocks where the file system can) and
    its edited bytes are overwritten; others are hard-linked, shared with the base, and so must
    never be changed in place. From anywhere else, files are downloaded.
    """

    root: Path

    def copy(self, source: File, known: FileRecord | None) -> FileRecord:
        """See `Sink`."""
        target = self._target(source.name)
        here = source.files.here
        with writing(target):
            if here is None:
                found = _write_hashed(pieces(source), target)
            elif source.suffix == ".safetensors":
                _link(here / source.name, target)
            else:
                _copy(here / source.name, target)
        if here is not None:
            return known or record_of(target)
        if known is not None and known.sha256 not in (None, found.sha256):
            raise InputError("arrived damaged, or has changed meanwhile", source=source)
        return found

    def patch(
        self,
        source: File,
        ranges: Sequence[tuple[int, int]],
        edits: Iterator[tuple[int, memoryview]],
    ) -> FileRecord:
        """See `Sink`."""
        target = self._target(source.name)
        here = source.files.here
        with writing(target):
            if here is None:
                return _write_hashed(pieces(source, ranges, edits), target)
            _copy(here / source.name, target)
            with target.open("r+b") as file:
                for offset, raw in edits:
                    file.seek(offset)
                    file.write(raw)
        return record_of(target)

    def _target(self, name: str) -> Path:
        target = self.root / name
        with writing(target):
            target.parent.mkdir(exist_ok=True)
        return target


def pieces(
    source: File,
    ranges: Sequence[tuple[int, int]] = (),
    edits: Iterable[tuple[int, memoryview]] = (),
    *,
    at_most: int = _READ_BYTES,
) -> Iterator[bytearray | memoryview]:
    """The bytes of a file in their order, with `edits` where `ranges` (offset, size) were.

    What is replaced is not read; what is read comes in pieces of `at_most` bytes, the next
    `_READS_AHEAD` of them on their way while one is used.
    """
    size = source.files.size(source.name)
    assert size is not None, "an open checkpoint's file has a size"
    kept = zip(
        (0, *(offset + length for offset, length in ranges)),
        (*(offset for offset, _ in ranges), size),
        strict=True,
    )
    old = [(at, min(at_most, end - at)) for start, end in kept for at in range(start, end, at_most)]
    new, position = iter(edits), 0
    with ThreadPoolExecutor(max_workers=_READS_AHEAD) as threads:

        def read(at: int, length: int) -> Future[bytearray]:
            return threads.submit(source.files.read, source.name, at, length)

        coming = deque(read(*part) for part in old[:_READS_AHEAD])
        try:
            for number, (at, length) in enumerate(old):
                while position < at:
                    position += len(raw := _next_edit(new, position))
                    yield raw
                if number + _READS_AHEAD < len(old):
                    coming.append(read(*old[number + _READS_AHEAD]))
                yield coming.popleft().result()
                position = at + length
            while position < size:
                position += len(raw := _next_edit(new, position))
                yield raw
        finally:
            for waiting in coming:
                waiting.cancel()


def _next_edit(edits: Iterator[tuple[int, memoryview]], position: int) -> memoryview:
    start, raw = next(edits)
    assert start == position, "edits fill their ranges in order"
    return raw


def _write_hashed(content: Iterable[bytearray | memoryview], target: Path) -> FileRecord:
    """Write a new file and hash it on the way."""
    sha256 = hashlib.sha256()
    with target.open("xb", buffering=0) as file:
        for piece in content:
            sha256.update(piece)
            left = memoryview(piece)
            while left:
                left = left[file.write(left) :]
        return FileRecord(size_bytes=file.tell(), sha256=sha256.hexdigest())


def _link(source: Path, target: Path) -> None:
    try:
        # Resolved first: hub caches hold symbolic links, and a hard link to one moves badly.
        os.link(source.resolve(), target)
    except OSError:
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Copy the content, sharing blocks where the file system can (reflink)."""
    # Buffered: a raw file may write less than it is given, and say nothing.
    with source.open("rb") as reader, target.open("xb") as writer:
        left = os.fstat(reader.fileno()).st_size
        try:
            while left and (
                count := os.copy_file_range(reader.fileno(), writer.fileno(), min(left, 1 << 30))
            ):
                left -= count
        except (OSError, AttributeError):
            pass
        if left:
            # Some file systems and kernels cannot; whatever else is wrong comes up again here.
            reader.seek(0)
            writer.seek(0)
            shutil.copyfileobj(reader, writer, 1 << 20)
