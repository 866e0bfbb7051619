"""One safetensors file: its header, checked before a single tensor is read.

Knows the file format (8-byte length, JSON header, raw little-endian tensors) and what a damaged
file looks like. Does not know models, folders or indexes (`memedit.checkpoint`).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from memedit.errors import InputError
from memedit.files import File

HEADER_LIMIT_BYTES = 100_000_000
"""The limit of the format's own library; a longer header is taken for damage."""

_FIRST_BYTES = 1 << 16
"""How much of a file is read at first; holds most headers."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "U16": torch.uint16,
        "I16": torch.int16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "C64": torch.complex64,
    }
)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies: `offset` and `size_bytes` count from the beginning of `shard`."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def read_header(file: File) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file; reads no tensor.

    Args:
        file: The file. Its name becomes `TensorInfo.shard`.

    Returns:
        The tensors by name, in the order in which they lie in the file.

    Raises:
        InputError: The file is missing, truncated, too long or not a safetensors file, or the
            header names an unknown dtype or bytes that overlap, leave a gap or lie outside.
    """
    size_bytes = file.files.size(file.name)
    if size_bytes is None:
        raise InputError("no such file", source=file)
    if size_bytes < 8:
        raise InputError(
            f"not a safetensors file: {size_bytes} bytes long, truncated?", source=file
        )
    # Far away, a second request takes longer than some bytes too many.
    first = bytes(file.files.read(file.name, 0, min(size_bytes, _FIRST_BYTES)))
    (header_bytes,) = struct.unpack("<Q", first[:8])
    if header_bytes > min(HEADER_LIMIT_BYTES, size_bytes - 8):
        raise InputError(
            f"not a safetensors file, or truncated: the header claims {header_bytes} bytes"
            f" and the file has {size_bytes}; fetch it again",
            source=file,
        )
    end = 8 + header_bytes
    if end > len(first):
        first += file.files.read(file.name, len(first), end - len(first))
    return _tensors_of(file, first[8:end], size_bytes)


def _tensors_of(file: File, raw: bytes, size_bytes: int) -> dict[str, TensorInfo]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the safetensors header is not JSON: {error}", source=file) from error
    if not isinstance(header, dict):
        raise InputError("the safetensors header is not a JSON object", source=file)
    header.pop("__metadata__", None)

    data_start = 8 + len(raw)
    tensors = {name: _tensor(file, name, entry, data_start) for name, entry in header.items()}
    in_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size_bytes))
    end = data_start
    for name, info in in_order:
        if info.offset != end:
            fault = "overlap those of another tensor" if info.offset < end else "follow a gap"
            raise InputError(f"damaged header: the bytes {fault}", source=file, field=name)
        end += info.size_bytes
    if end > size_bytes:
        raise InputError(
            f"truncated: {size_bytes} bytes, the header asks for {end}; fetch it again", source=file
        )
    if end < size_bytes:
        raise InputError(f"damaged: {size_bytes} bytes, but the tensors end at {end}", source=file)
    return dict(in_order)


def _tensor(file: File, name: str, entry: object, data_start: int) -> TensorInfo:
    def refuse(reason: str) -> InputError:
        return InputError(f"damaged header: {reason}", source=file, field=name)

    if not isinstance(entry, dict):
        raise refuse("not an object with dtype, shape and data_offsets")
    dtype_name = entry.get("dtype")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise InputError(
            f"unknown dtype {dtype_name!r}; known are {', '.join(DTYPES)}", source=file, field=name
        )
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if shape is None:
        raise refuse("the shape is not a list of sizes")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("data_offsets is not a pair [begin, end]")
    dtype = DTYPES[dtype_name]
    size_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * dtype.itemsize != size_bytes:
        raise refuse(f"{size_bytes} bytes do not hold a {dtype_name} tensor of shape {shape}")
    return TensorInfo(
        shard=file.name,
        dtype=dtype,
        shape=tuple(shape),
        offset=data_start + offsets[0],
        size_bytes=size_bytes,
    )


def _counts(value: object) -> list[int] | None:
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value):
        return value
    return None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key occurs twice")
    return entries
