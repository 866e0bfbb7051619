"""A checkpoint folder: read lazily, checked first, and copied with some tensors patched.

Knows the Hugging Face layout (config, one safetensors file or an index and shards, side files).
Works by checkpoint key, never by module name, and holds one tensor in memory at a time. Does not
know models or facts, nor how a finished folder becomes visible (`memedit.publication`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memedit.checksums import FileRecord, records_of
from memedit.config import digest_of
from memedit.errors import InputError, NumericalError
from memedit.manifest import MANIFEST_NAME, TensorRecord
from memedit.progress import Progress, Silent
from memedit.shards import TensorInfo, read_bytes, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
EDITABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What an earlier version of memedit left in a folder says nothing about the next one.
_OWN_FILES = (MANIFEST_NAME, "facts.jsonl", "report.html", "rejects.jsonl")
# Other copies of the weights would still hold the unedited model.
_OTHER_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
    *("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ckpt", "*.ot", "*.npz"),
)
_SIDE_FOLDERS = ("additional_chat_templates",)
# Files that decide how text becomes tokens, and so belong to the identity of a model.
_TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json"),
    "special_tokens_map.json",
)
_CHUNK = 1 << 22
"""Elements that are upcast to float64 at once."""

Patch = Callable[[Tensor], Tensor]
"""The stored tensor (its own dtype, on the CPU) -> the tensor that takes its place."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose headers and index were found sound; its tensors stay there."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    """File names, sorted."""
    has_index: bool
    cache: Path | None = None
    """Folder in which the checksums of files are kept from run to run."""

    @classmethod
    def open(cls, folder: Path, *, cache: Path | None = None) -> Checkpoint:
        """Read the config, the index and the header of every shard, and check them.

        Raises:
            InputError: The folder is no safetensors checkpoint, or is damaged; names the file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(
                "no such folder" if not folder.exists() else "not a folder", source=folder
            )
        config = _read_object(folder / "config.json", "a checkpoint folder has a config.json")
        if (folder / SINGLE_NAME).exists():
            tensors, has_index = read_header(folder / SINGLE_NAME), False
            shards = {SINGLE_NAME}
        elif (folder / INDEX_NAME).exists():
            tensors, has_index = _indexed(folder), True
            shards = {info.shard for info in tensors.values()}
        else:
            raise InputError(_without_safetensors(folder), source=folder)
        if not tensors:
            raise InputError("holds no tensor", source=folder)
        return cls(
            folder=folder,
            config=config,
            tensors=tensors,
            shards=tuple(sorted(shards)),
            has_index=has_index,
            cache=cache,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint keys, shard by shard in the order of their bytes."""
        return tuple(self.tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.size_bytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor.

        Raises:
            InputError: No such tensor.
        """
        if name not in self.tensors:
            raise InputError(f"holds no tensor {name!r}", source=self.folder)
        return self.tensors[name]

    def shard_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self.info(name).shard

    def read(self, name: str, *, check_finite: bool = False) -> Tensor:
        """Read one tensor, in its stored dtype, on the CPU; the caller owns it.

        Raises:
            InputError: No such tensor, the file has changed, or with `check_finite` the tensor
                holds NaN or an infinity.
        """
        info = self.info(name)
        path = self.folder / info.shard
        buffer = read_bytes(path, info)
        # torch.frombuffer refuses an empty buffer.
        flat = torch.frombuffer(buffer, dtype=info.dtype) if buffer else torch.empty(0)
        tensor = flat.to(info.dtype).reshape(info.shape)
        if check_finite and not _is_finite(tensor):
            raise InputError("the weights hold NaN or an infinity", source=path, field=name)
        return tensor

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read tensors (all of them by default), one at a time, and look for NaN and infinities.

        Raises:
            InputError: Names the first tensor that holds one.
        """
        for name in self.tensors if names is None else names:
            self.read(name, check_finite=True)

    def check_editable(self, names: Iterable[str]) -> None:
        """Check that tensors are there, hold plain floats (no quantised codes) and are finite.

        Raises:
            InputError: Names the first tensor that cannot be edited, and why.
        """
        names = tuple(names)
        for name in names:
            info = self.info(name)
            if info.dtype not in EDITABLE_DTYPES:
                raise InputError(
                    f"stored as {info.dtype}, which holds quantised codes; edit a checkpoint in"
                    " float32, bfloat16 or float16",
                    source=self.folder / info.shard,
                    field=name,
                )
        self.check_finite(names)

    @cached_property
    def file_records(self) -> Mapping[str, FileRecord]:
        """Size and sha256 of the config, the shards, the index and the tokenizer's files."""
        names = ["config.json", *self.shards, *([INDEX_NAME] if self.has_index else [])]
        names += [n for n in _side_files(self) if any(fnmatch(n, p) for p in _TOKENIZER_FILES)]
        return records_of({n: self.folder / n for n in sorted(set(names))}, cache=self.cache)

    @property
    def digest(self) -> str:
        """sha256 over all that decides what the model says: config, weights, tokenizer.

        Equal for a copy in another folder. Reads every byte once, then keeps the checksums in
        `cache`, by real path, size and time of change.
        """
        return digest_of({name: record.sha256 for name, record in self.file_records.items()})


@dataclass(frozen=True, kw_only=True)
class PatchedFiles:
    """What `write_patched` wrote: every file of the copy, and the edited tensors by key."""

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    rewritten: tuple[str, ...]
    """The shards that hold edited tensors."""


def write_patched(
    base: Checkpoint,
    staging: Path,
    patches: Mapping[str, Patch],
    *,
    progress: Progress | None = None,
) -> PatchedFiles:
    """Write a copy of `base` into the folder `staging`, with some tensors replaced.

    A shard with an edited tensor is copied and the bytes of that tensor are overwritten: same
    header, same offsets, same dtype. Other shards are hard-linked (shared with the base, so they
    must never be changed in place) or else copied; side files are copied.

    Args:
        base: The checkpoint to start from.
        staging: A folder without files of these names.
        patches: By checkpoint key, a function from the stored tensor to its replacement, of the
            same shape and any float dtype; called once each, shard by shard.
        progress: Told of each finished file, as the stage "publish".

    Raises:
        InputError: A tensor is missing, is quantised, or holds NaN in the base.
        NumericalError: A patched tensor is not finite, or not after the cast to its dtype.
    """
    progress = progress or Silent()
    base.check_editable(patches)
    tensors: dict[str, TensorRecord] = {}
    side_files = _side_files(base)
    progress.start("publish", total=len(base.shards) + len(side_files), unit="files")

    edited = {shard: [n for n in patches if base.shard_of(n) == shard] for shard in base.shards}
    for shard, names in edited.items():
        source, target = base.folder / shard, staging / shard
        if names:
            _copy(source, target)
            with target.open("r+b") as file:
                for name in sorted(names, key=lambda n: base.info(n).offset):
                    tensors[name] = _overwrite(base, name, patches[name], file)
        else:
            _link(source, target)
        progress.advance("publish")
    for name in side_files:
        (staging / name).parent.mkdir(exist_ok=True)
        _copy(base.folder / name, staging / name)
        progress.advance("publish")

    # A linked shard is the base's own file, whose checksum may be known already.
    rewritten = tuple(shard for shard, names in edited.items() if names)
    linked = {shard: base.folder / shard for shard in base.shards if shard not in rewritten}
    written = {name: staging / name for name in (*rewritten, *side_files)}
    files = {**records_of(linked, cache=base.cache), **records_of(written)}
    progress.finish("publish")
    return PatchedFiles(files=files, tensors=tensors, rewritten=rewritten)


def _overwrite(base: Checkpoint, name: str, patch: Patch, file: Any) -> TensorRecord:
    info = base.info(name)
    exact = patch(base.read(name)).detach().cpu()
    if exact.shape != info.shape:
        raise ValueError(f"the patch of {name} has shape {tuple(exact.shape)}, not {info.shape}")
    stored = exact.to(info.dtype).contiguous()
    # Read again: a patch may have worked in place on the tensor that it was given.
    before = base.read(name)
    if not (_is_finite(exact) and _is_finite(stored)):
        raise NumericalError(
            f"the edited tensor {name} holds NaN or a number beyond {info.dtype}; nothing was"
            " published. A larger λ or a smaller clamp_norm_factor makes the update smaller"
        )
    delta_norm = _distance(exact, before)
    raw = memoryview(stored.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    file.seek(info.offset)
    file.write(raw)
    return TensorRecord(
        sha256=hashlib.sha256(raw).hexdigest(),
        delta_norm=delta_norm,
        weight_norm=_distance(before, None),
        rounding_error=_distance(stored, exact) / delta_norm if delta_norm else 0.0,
    )


def _distance(left: Tensor, right: Tensor | None) -> float:
    """‖left - right‖ in float64, a chunk at a time."""
    total = torch.zeros((), dtype=torch.float64)
    left, right = left.reshape(-1), None if right is None else right.reshape(-1)
    for start in range(0, left.numel(), _CHUNK):
        part = left[start : start + _CHUNK].double()
        if right is not None:
            part = part - right[start : start + _CHUNK].double()
        total += part.square().sum()
    return float(total.sqrt())


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    wide = tensor if tensor.dtype in EDITABLE_DTYPES else tensor.float()
    # Minimum and maximum carry a NaN through and, unlike isfinite, need no copy.
    return all(bool(torch.isfinite(end)) for end in wide.aminmax())


def _indexed(folder: Path) -> dict[str, TensorInfo]:
    path = folder / INDEX_NAME
    weight_map = _read_object(path, "an index is a JSON object").get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError("no weight_map from tensors to files", source=path, field="weight_map")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard == os.path.basename(shard)
        if not plain or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise InputError(
                f"{shard!r} is not the name of a .safetensors file in the folder itself",
                source=path,
                field=name,
            )
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise InputError(f"the shard {shard} is missing", source=path)
        for name, info in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                expected = weight_map.get(name, "no file")
                raise InputError(
                    f"disagrees with {INDEX_NAME}, which places this tensor in {expected}",
                    source=folder / shard,
                    field=name,
                )
            tensors[name] = info
    for name in weight_map.keys() - tensors.keys():
        raise InputError(
            f"{INDEX_NAME} places this tensor here, but the file lacks it",
            source=folder / weight_map[name],
            field=name,
        )
    return tensors


def _read_object(path: Path, wanted: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"no {path.name}: {wanted}", source=path.parent) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", source=path) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", source=path) from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", source=path)
    return value


def _without_safetensors(folder: Path) -> str:
    wanted = f"neither {SINGLE_NAME} nor {INDEX_NAME}"
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            f"{wanted}: memedit reads safetensors only, and this model has pickled weights."
            ' If you trust them, convert once: python -c "from transformers import'
            " AutoModelForCausalLM, AutoTokenizer; s, d = 'SOURCE', 'TARGET';"
            " AutoModelForCausalLM.from_pretrained(s, dtype='auto').save_pretrained(d);"
            ' AutoTokenizer.from_pretrained(s).save_pretrained(d)"'
        )
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".gguf"))
    return wanted + (f"; found {', '.join(others[:3])}" if others else "")


def _side_files(base: Checkpoint) -> list[str]:
    """Config, tokenizer, licence …: what goes along, as paths relative to the folder."""
    folders = [base.folder, *(base.folder / name for name in _SIDE_FOLDERS)]
    found = [p for folder in folders if folder.is_dir() for p in sorted(folder.iterdir())]
    return [
        p.relative_to(base.folder).as_posix()
        for p in found
        if p.is_file()
        and not p.name.startswith(".")
        and p.name not in _OWN_FILES
        and (
            (p.name == INDEX_NAME and base.has_index)
            or not any(fnmatch(p.name, pattern) for pattern in _OTHER_WEIGHTS)
        )
    ]


def _link(source: Path, target: Path) -> None:
    try:
        # Resolved first: hub caches hold symbolic links, and a hard link to one moves badly.
        os.link(source.resolve(), target)
    except OSError:
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Copy the content, sharing blocks where the file system can (reflink)."""
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        left = os.fstat(reader.fileno()).st_size
        try:
            while left and (
                count := os.copy_file_range(reader.fileno(), writer.fileno(), min(left, 1 << 30))
            ):
                left -= count
        except (OSError, AttributeError):
            # Some file systems and kernels cannot; whatever else is wrong comes up again here.
            reader.seek(0)
            writer.seek(0)
            shutil.copyfileobj(reader, writer, 1 << 20)
