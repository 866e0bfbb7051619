"""A checkpoint: its files checked first, its tensors read lazily, by name and by row.

Knows the Hugging Face layout (config, one safetensors file or an index and shards, side files),
in a folder or anywhere else that `memedit.files` reaches. Works by checkpoint key, never by module
name. Does not know models or facts, nor how a patched copy is written (`memedit.patching`).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memedit.checksums import FileRecord, at_once, records_of, remembered
from memedit.config import digest_of
from memedit.errors import InputError
from memedit.files import File, Files, files_of, read_object
from memedit.manifest import MANIFEST_NAME, read_manifest
from memedit.shards import TensorInfo, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
EDITABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What an earlier version of memedit left in a folder says nothing about the next one.
_OWN_FILES = (MANIFEST_NAME, "facts.jsonl", "facts.parquet", "report.html", "rejects.jsonl")
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
_PIECE_BYTES = 1 << 25
"""What is read and looked at at once of a shard; a multiple of every dtype's size."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose headers and index were found sound; its tensors stay where they are."""

    files: Files
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    """File names, sorted."""
    has_index: bool
    cache: Path | None = None
    """Folder in which what was found out about files is kept from run to run."""
    published: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the edited tensors of a published version, by its manifest."""
    pinned: bool = False
    """Whether tensors are read into memory that a GPU can fetch from by itself."""

    @classmethod
    def open(
        cls, place: Files | Path, *, cache: Path | None = None, pinned: bool = False
    ) -> Checkpoint:
        """Read the config, the index and the header of every shard, and check them.

        Raises:
            InputError: There is no safetensors checkpoint, or it (or the manifest of a published
                version) is damaged; names the file.
        """
        files = files_of(place)
        present = files.sizes()
        if not present:
            raise InputError(_nothing(files), source=files.location)
        config = read_object(
            File(files, "config.json"), "a checkpoint has its config.json beside its weights"
        )
        if SINGLE_NAME in present:
            tensors, has_index = read_header(File(files, SINGLE_NAME)), False
            shards = {SINGLE_NAME}
        elif INDEX_NAME in present:
            tensors, has_index = _indexed(files, present), True
            shards = {info.shard for info in tensors.values()}
        else:
            raise InputError(_without_safetensors(present), source=files.location)
        if not tensors:
            raise InputError("holds no tensor", source=files.location)
        return cls(
            files=files,
            config=config,
            tensors=tensors,
            shards=tuple(sorted(shards)),
            has_index=has_index,
            cache=cache,
            published=_published(files) if MANIFEST_NAME in present else {},
            pinned=pinned,
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
            raise InputError(f"holds no tensor {name!r}", source=self.files.location)
        return self.tensors[name]

    def shard_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self.info(name).shard

    def read(self, name: str, *, check_finite: bool = False) -> Tensor:
        """Read one tensor, in its stored dtype, on the CPU; the caller owns it.

        Raises:
            InputError: No such tensor, the file has changed, the tensor is not the one that was
                published, or with `check_finite` it holds NaN or an infinity.
        """
        info = self.info(name)
        flat = self._flat(info, info.offset, info.size_bytes)
        expected = self.published.get(name)
        if expected and hashlib.sha256(_bytes_of(flat.view(torch.uint8))).hexdigest() != expected:
            raise InputError(
                "an edited tensor that is not the one that was published; if that is meant, remove"
                f" {MANIFEST_NAME}",
                source=File(self.files, info.shard),
                field=name,
            )
        tensor = flat.reshape(info.shape)
        if check_finite and not is_finite(tensor):
            raise self._not_finite(name)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor along its first axis, in its stored dtype.

        Raises:
            InputError: No such tensor, or the file has changed.
        """
        info = self.info(name)
        row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
        flat = self._flat(info, info.offset + start * row_bytes, (stop - start) * row_bytes)
        return flat.reshape(stop - start, *info.shape[1:])

    def _flat(self, info: TensorInfo, offset: int, size_bytes: int) -> Tensor:
        """Bytes of a shard as elements of one of its tensors."""
        raw = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self.pinned)
        self.files.read_into(info.shard, offset, _bytes_of(raw))
        return raw.view(info.dtype)

    def check_published(self) -> None:
        """Check the edited tensors of a published version; a base has none.

        Raises:
            InputError: Names the first that is not the one that was published.
        """
        for name in self.published:
            self.read(name)

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Look for NaN and infinities in some tensors, or in all: then every byte is read once.

        Raises:
            InputError: Names the first tensor that holds one.
        """
        if names is not None:
            for name in names:
                self.read(name, check_finite=True)
            return
        for found in self._examined.values():
            if found["not_finite"] is not None:
                raise self._not_finite(str(found["not_finite"]))

    def check_editable(self, names: Iterable[str]) -> None:
        """Check that tensors are there and hold plain floats, no quantised codes.

        Raises:
            InputError: Names the first tensor that cannot be edited, and why.
        """
        for name in names:
            info = self.info(name)
            if info.dtype not in EDITABLE_DTYPES:
                raise InputError(
                    f"stored as {info.dtype}, which holds quantised codes; edit a checkpoint in"
                    " float32, bfloat16 or float16",
                    source=File(self.files, info.shard),
                    field=name,
                )

    @cached_property
    def side_files(self) -> tuple[str, ...]:
        """Config, index, tokenizer, licence …: names of the files that go along with the shards."""
        names = side_files_of(self.files)
        return tuple(names if not self.has_index else sorted([*names, INDEX_NAME]))

    @cached_property
    def file_records(self) -> Mapping[str, FileRecord]:
        """Size and sha256 of the config, the shards, the index and the tokenizer's files."""
        names = {"config.json", *([INDEX_NAME] if self.has_index else [])}
        names |= {n for n in self.side_files if any(fnmatch(n, p) for p in _TOKENIZER_FILES)}
        records = records_of({n: File(self.files, n) for n in names}, cache=self.cache)
        for shard, found in self._examined.items():
            records[shard] = FileRecord(size_bytes=found["size_bytes"], sha256=found["sha256"])
        return {name: records[name] for name in sorted(records)}

    def known_record(self, name: str) -> FileRecord | None:
        """The record of a file, if every byte of it was read already; reads nothing."""
        return self.file_records.get(name) if "file_records" in vars(self) else None

    @property
    def digest(self) -> str:
        """sha256 over all that decides what the model says: config, weights, tokenizer.

        Equal for a copy in another place. Reads every byte once, then remembers in `cache`.
        """
        return digest_of({name: record.sha256 for name, record in self.file_records.items()})

    @cached_property
    def _examined(self) -> dict[str, dict[str, Any]]:
        """Of each shard its size, its sha256 and the first tensor that is not finite."""

        def known(shard: str) -> dict[str, Any]:
            file = File(self.files, shard)
            return remembered("weights", file, lambda: self._examine(shard), cache=self.cache)

        return at_once(known, {shard: shard for shard in self.shards})

    def _examine(self, shard: str) -> dict[str, Any]:
        """One pass over a shard, which is the header and then one tensor after the other."""
        infos = {name: info for name, info in self.tensors.items() if info.shard == shard}
        position = min((info.offset for info in infos.values()), default=0)
        sha256 = hashlib.sha256(self.files.read(shard, 0, position))
        not_finite = None
        for name, info in infos.items():
            for start in range(0, info.size_bytes, _PIECE_BYTES):
                size = min(_PIECE_BYTES, info.size_bytes - start)
                piece = self._flat(info, info.offset + start, size)
                sha256.update(_bytes_of(piece.view(torch.uint8)))
                if not_finite is None and not is_finite(piece):
                    not_finite = name
            position += info.size_bytes
        return {"size_bytes": position, "sha256": sha256.hexdigest(), "not_finite": not_finite}

    def _not_finite(self, name: str) -> InputError:
        return InputError(
            "the weights hold NaN or an infinity",
            source=File(self.files, self.shard_of(name)),
            field=name,
        )


def _published(files: Files) -> dict[str, str]:
    manifest = read_manifest(files)
    if manifest.format != "full":
        return {}
    return {name: record.sha256 for name, record in manifest.tensors.items()}


def side_files_of(files: Files) -> list[str]:
    """Names of the files of a checkpoint that hold neither weights nor their index."""
    return [
        name
        for folder in ("", *_SIDE_FOLDERS)
        for name in files.sizes(folder)
        if not (base := os.path.basename(name)).startswith(".")
        and base not in _OWN_FILES
        and not any(fnmatch(base, pattern) for pattern in _OTHER_WEIGHTS)
    ]


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor an infinity; codes and whole numbers never do."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    wide = tensor if tensor.dtype in EDITABLE_DTYPES else tensor.float()
    # Minimum and maximum carry a NaN through and, unlike isfinite, need no copy.
    return all(bool(torch.isfinite(end)) for end in wide.aminmax())


def _bytes_of(raw: Tensor) -> memoryview:
    """The memory of a flat tensor of bytes."""
    array: Any = raw.numpy()
    return memoryview(array)


def _indexed(files: Files, present: Mapping[str, int]) -> dict[str, TensorInfo]:
    index = File(files, INDEX_NAME)
    weight_map = read_object(index, "an index is a JSON object").get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError("no weight_map from tensors to files", source=index, field="weight_map")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard == os.path.basename(shard)
        if not plain or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise InputError(
                f"{shard!r} is not the name of a .safetensors file in the folder itself",
                source=index,
                field=name,
            )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard not in present:
            raise InputError(f"the shard {shard} is missing", source=index)
    headers = at_once(read_header, {shard: File(files, shard) for shard in shards})
    return dict(_agreeing(files, weight_map, headers))


def _agreeing(
    files: Files, weight_map: Mapping[str, str], headers: Mapping[str, dict[str, TensorInfo]]
) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors of all shards, once each and where the index places them."""
    seen = set()
    for shard, header in headers.items():
        for name, info in header.items():
            if weight_map.get(name) != shard:
                expected = weight_map.get(name, "no file")
                raise InputError(
                    f"disagrees with {INDEX_NAME}, which places this tensor in {expected}",
                    source=File(files, shard),
                    field=name,
                )
            seen.add(name)
            yield name, info
    for name in weight_map.keys() - seen:
        raise InputError(
            f"{INDEX_NAME} places this tensor here, but the file lacks it",
            source=File(files, weight_map[name]),
            field=name,
        )


def _nothing(files: Files) -> str:
    if files.here is None:
        return "nothing lies here"
    if files.here.is_dir():
        return "the folder is empty"
    return "not a folder" if files.here.exists() else "no such folder"


def _without_safetensors(present: Mapping[str, int]) -> str:
    wanted = f"neither {SINGLE_NAME} nor {INDEX_NAME}"
    if any(fnmatch(name, "pytorch_model*.bin*") for name in present):
        return (
            f"{wanted}: memedit reads safetensors only, and this model has pickled weights."
            ' If you trust them, convert once: python -c "from transformers import'
            " AutoModelForCausalLM, AutoTokenizer; s, d = 'SOURCE', 'TARGET';"
            " AutoModelForCausalLM.from_pretrained(s, dtype='auto').save_pretrained(d);"
            ' AutoTokenizer.from_pretrained(s).save_pretrained(d)"'
        )
    others = sorted(n for n in present if n.endswith((".safetensors", ".gguf")))
    return wanted + (f"; found {', '.join(others[:3])}" if others else "")
