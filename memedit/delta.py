"""An update in a file of its own, `delta.safetensors`, to be added to the same base model later.

By the weight's checkpoint key, float64 as the solve left it: either `<key>.left` [N, O] and
`<key>.right` [N, I], where Δ [O, I] = leftᵀ · right; or `<key>.delta` [I, O], which is Δ
transposed, as in `memedit.solve.Update`. The metadata hold, as JSON under `memedit_delta`, the
version of the format, these equations, and of each key its layer and the memory order of its
tensors. Knows this file and how to write a file whole; does not know models, or how an update is
added to a weight.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memedit.errors import InputError, NumericalError
from memedit.solve import Update
from memedit.writing import whole_file

DELTA_NAME = "delta.safetensors"
FORMAT_VERSION = 1

_METADATA = "memedit_delta"
_EQUATIONS = {
    "left, right": "delta_OI = left_NO^T @ right_NI, for a weight stored [O, I] (out, in)",
    "delta": "delta_OI transposed, [I, O]",
    "order": "of the tensor in memory: C by rows, F by columns; in this file always by rows",
}
_FORMS = ({"left", "right"}, {"delta"})
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_CHUNK_BYTES = 1 << 26
"""What is copied at once on the way to and from the disk."""


def save_delta(path: Path, updates: Mapping[str, Update]) -> None:
    """Write updates to one safetensors file, bit by bit as they are.

    Equal updates give equal bytes. No tensor is copied whole.

    Args:
        path: The file, usually named `DELTA_NAME`; it appears when it is complete.
        updates: By checkpoint key of the weight; one per layer. Dense ones (`right_NI` is None)
            stay transposed, [I, O].

    Raises:
        NumericalError: An update holds NaN or an infinity; nothing was written.
        ValueError: There is no update, two have one layer, or one has not the shapes and dtype
            (float64) of an `Update`.
    """
    layers = [update.layer for update in updates.values()]
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"one update per layer is wanted, not {layers}")
    tensors: dict[str, Tensor] = {}
    described: dict[str, object] = {}
    for key, update in updates.items():
        parts = _parts(update)
        for name, tensor in parts.items():
            if tensor.dtype != torch.float64 or tensor.ndim != 2 or not tensor.numel():
                raise ValueError(f"{key}.{name}: {tensor.dtype} {tuple(tensor.shape)}")
            if not is_finite(tensor):
                raise NumericalError(f"the update of {key} holds NaN or an infinity ({name})")
            tensors[f"{key}.{name}"] = tensor
        if len({len(tensor) for tensor in parts.values()}) > 1:
            raise ValueError(f"{key}: left and right have different numbers of rows")
        order = {name: _order(tensor) for name, tensor in parts.items()}
        described[key] = {"layer": update.layer, "order": order}
    content = {"format_version": FORMAT_VERSION, "equations": _EQUATIONS, "updates": described}
    write_safetensors(path, tensors, {_METADATA: json.dumps(content)})


def load_delta(path: Path) -> dict[str, Update]:
    """Read the updates of a file that `save_delta` wrote, by checkpoint key.

    The tensors are float64, on the CPU, owned by the caller, with the strides that they had when
    saved, so that Δ too comes out the same bit by bit (on the same machine and threads). Whether
    they fit a model is for the caller to see.

    Raises:
        InputError: The file is missing, damaged, of another format, or its tensors are not those
            that its metadata describe; names the file and the tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("not a file" if path.exists() else "no such file", source=path)
    try:
        with safe_open(path, framework="pt") as file:
            return _updates(path, file)
    except SafetensorError as error:
        raise InputError(
            f"not a safetensors file, or damaged ({error}); fetch it again", source=path
        ) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", source=path) from error


def is_finite(matrix: Tensor) -> bool:
    """Whether a matrix of floats, by rows or by columns, holds neither NaN nor an infinity."""
    # Minimum and maximum carry a NaN through. Of a matrix by columns they would copy it first.
    ends = (matrix if matrix.is_contiguous() else matrix.T).aminmax()
    return all(bool(torch.isfinite(end)) for end in ends)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file as `whole_file` does, the tensors in the order given.

    Unlike the format's own library, takes tensors of any strides and device without copying them
    whole: row by row.

    Args:
        path: The file.
        tensors: Matrices in float64, float32, float16 or bfloat16.
        metadata: Goes into the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with whole_file(path) as partial, partial.open("xb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors.values():
            for start, stop in _row_chunks(tensor):
                rows = tensor[start:stop].detach().cpu().contiguous()
                raw_rows = rows.reshape(-1).view(torch.uint8).numpy()
                file.write(memoryview(raw_rows))  # type: ignore[arg-type]


def _parts(update: Update) -> dict[str, Tensor]:
    if update.right_NI is None:
        return {"delta": update.left_NO}
    return {"left": update.left_NO, "right": update.right_NI}


def _order(tensor: Tensor) -> str:
    # BLAS sums in another order for another memory order, so the last bits of Δ depend on it; the
    # solve returns matrices by columns.
    return "F" if tensor.T.is_contiguous() and not tensor.is_contiguous() else "C"


def _row_chunks(matrix: Tensor) -> Iterator[tuple[int, int]]:
    rows, columns = matrix.shape
    step = max(1, _CHUNK_BYTES // max(1, columns * matrix.element_size()))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _updates(path: Path, file: Any) -> dict[str, Update]:
    """The updates of an open safetensors file; all is checked before a tensor is read."""
    described = _described(path, (file.metadata() or {}).get(_METADATA))
    wanted = {f"{key}.{name}" for key, (_, order) in described.items() for name in order}
    present = set(file.keys())
    if lost := sorted(wanted - present):
        raise InputError("the file lacks this tensor", source=path, field=lost[0])
    if extra := sorted(present - wanted):
        raise InputError("belongs to no update in the metadata", source=path, field=extra[0])
    slices = {name: file.get_slice(name) for name in sorted(wanted)}
    for name, part in slices.items():
        dtype, shape = part.get_dtype(), part.get_shape()
        if dtype != "F64":
            raise InputError(f"float64 (F64) is wanted, not {dtype}", source=path, field=name)
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"a matrix is wanted, not shape {shape}", source=path, field=name)
    for key, (_, order) in described.items():
        rows = {name: slices[f"{key}.{name}"].get_shape()[0] for name in order}
        if len(set(rows.values())) > 1:
            raise InputError(
                f"one row per edit is wanted in both factors, not {rows['right']} rows here and "
                f"{rows['left']} in .left",
                source=path,
                field=f"{key}.right",
            )
    updates = {}
    for key, (layer, order) in described.items():
        parts = {n: _read(path, f"{key}.{n}", slices[f"{key}.{n}"], order[n]) for n in order}
        left_NO = parts["delta"] if "delta" in parts else parts["left"]
        updates[key] = Update(layer=layer, left_NO=left_NO, right_NI=parts.get("right"))
    return updates


def _read(path: Path, name: str, part: Any, order: str) -> Tensor:
    rows, columns = part.get_shape()
    # Copied out of the mapped file: memory aligned as torch aligns it, which BLAS may heed too.
    if order == "C":
        matrix = torch.empty(rows, columns, dtype=torch.float64)
    else:
        matrix = torch.empty(columns, rows, dtype=torch.float64).T
    for start, stop in _row_chunks(matrix):
        chunk = part[start:stop]
        if not is_finite(chunk):
            raise InputError("holds NaN or an infinity", source=path, field=name)
        matrix[start:stop] = chunk
    return matrix


def _described(path: Path, text: str | None) -> dict[str, tuple[int, dict[str, str]]]:
    """Layer and memory order of the parts, by key, as the metadata have them."""

    def refuse(reason: str, field: str = "") -> InputError:
        place = f"__metadata__.{_METADATA}" + (f".{field}" if field else "")
        return InputError(reason, source=path, field=place)

    if text is None:
        raise refuse(f"not a delta file of memedit: its metadata hold no {_METADATA}")
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise refuse(f"not JSON: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise refuse(
            f"format {version!r}; this memedit reads format {FORMAT_VERSION}", "format_version"
        )
    updates = content.get("updates")
    if not isinstance(updates, dict) or not updates:
        raise refuse("an object with an entry for each weight is wanted", "updates")
    described: dict[str, tuple[int, dict[str, str]]] = {}
    for key, entry in updates.items():
        layer, order = (
            (entry.get("layer"), entry.get("order")) if isinstance(entry, dict) else (None, None)
        )
        if type(layer) is not int or not 0 <= layer < 2**31:
            raise refuse("the number of a layer is wanted", f"updates.{key}.layer")
        if any(layer == other for other, _ in described.values()):
            raise refuse(f"layer {layer} has two updates", f"updates.{key}.layer")
        if (
            not isinstance(order, dict)
            or order.keys() not in _FORMS
            or any(value not in ("C", "F") for value in order.values())
        ):
            raise refuse(
                "left and right, or delta, each with C or F, are wanted", f"updates.{key}.order"
            )
        described[key] = (layer, order)
    return described


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key occurs twice")
    return entries
