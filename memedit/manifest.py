"""The manifest of a published version, `memedit.json`: what it is made of and how.

Knows the manifest's fields and how to read it without trusting it. Does not know how a checkpoint
is written (`memedit.patching`, `memedit.publication`) or compared with it (`memedit.verify`).
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import memedit
from memedit.checksums import FileRecord
from memedit.errors import InputError
from memedit.files import File, Files, files_of, read_object
from memedit.writing import writing

MANIFEST_NAME = "memedit.json"
UNFINISHED_NAME = ".memedit.unfinished"
"""Lies in a place whose files are already, or still, there but are no version."""
FORMATS = ("full", "delta", "lora")
FORMAT_VERSION = 2
"""Format 1 had neither `format` nor `ranks`, and a sha256 of every file."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One edited tensor as stored: sha256 over its bytes, and Frobenius norms.

    `rounding_error` is ‖stored - (W + Δ)‖ / ‖Δ‖: what the checkpoint's dtype took from the update.
    """

    sha256: str
    delta_norm: float
    weight_norm: float
    rounding_error: float


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """One update as a product of two thin matrices.

    `truncation_error` is ‖Δ - B·A‖ / ‖Δ‖ in the Frobenius norm, of the factors as stored.
    """

    rank: int
    truncation_error: float


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """The base model: the name it was asked for by, and `Checkpoint.digest`."""

    name: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class FactsIdentity:
    """The facts that were written: `EditBatch.digest`, the file they came from, how many."""

    digest: str
    file: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that made one version. The mappings hold values that JSON has."""

    run_id: str
    method: str
    model: ModelIdentity
    layers: tuple[int, ...]
    facts: FactsIdentity
    settings: Mapping[str, Any] = field(default_factory=dict)
    moments: Mapping[str, str] = field(default_factory=dict)
    """Digest of the second moment by layer (a decimal string, as JSON keys are)."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """By path in the version's folder, with `/`; every file but the manifest itself."""
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    format: str = "full"
    """`full`: a checkpoint; `delta` or `lora`: what `memedit apply` or PEFT add to the base."""
    ranks: Mapping[str, RankRecord] = field(default_factory=dict)
    """Of format `lora`: what became of each update, by checkpoint key."""
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """`before` and `after`, each by the keys of `memedit.outcome.METRIC_KEYS`."""
    versions: Mapping[str, str] = field(default_factory=lambda: code_versions())
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format_version: int = FORMAT_VERSION


def code_versions() -> dict[str, str]:
    """The versions of memedit, Python, torch and transformers that are running."""
    versions = {"memedit": memedit.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of `memedit.json`, UTF-8.

    Numbers that are not finite become null: JSON has none.
    """
    values = _plain(asdict(manifest))
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write `memedit.json` into `folder` and wait until it is on the disk."""
    path = folder / MANIFEST_NAME
    with writing(path), path.open("xb") as file:
        file.write(manifest_bytes(manifest))
        file.flush()
        os.fsync(file.fileno())
    return path


def read_manifest(place: Files | Path) -> Manifest:
    """Read and check the manifest of a published version.

    Raises:
        InputError: No manifest, one that is damaged or of a newer format, or one that names a
            file outside its place.
    """
    file = File(files_of(place), MANIFEST_NAME)
    if file.files.size(MANIFEST_NAME) is None:
        raise InputError(
            f"not a version of memedit: no {MANIFEST_NAME}", source=file.files.location
        )
    return _Reader(file).manifest(read_object(file, "a version has its manifest"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Reader:
    """Builds a `Manifest` from JSON values; each complaint names the field."""

    def __init__(self, file: File) -> None:
        self.file = file

    def manifest(self, values: Any) -> Manifest:
        self.need(isinstance(values, dict), "", "an object")
        found = self.take(values, "format_version", int)
        if not 1 <= found <= FORMAT_VERSION:
            raise InputError(
                f"format {found}; this memedit reads formats 1 to {FORMAT_VERSION}: update memedit",
                source=self.file,
                field="format_version",
            )
        layers = self.take(values, "layers", list)
        self.need(all(type(n) is int for n in layers), "layers", "a list of numbers")
        kind = values.get("format", "full")
        self.need(kind in FORMATS, "format", f"one of {', '.join(FORMATS)}")
        metrics = self.take(values, "metrics", dict)
        for when, measured in metrics.items():
            self.mapping(measured, f"metrics.{when}", self.number_or_none)
        texts = {n: self.take(values, n, str) for n in ("run_id", "created_at", "method")}
        return Manifest(
            **texts,
            model=self.record(ModelIdentity, values.get("model"), "model"),
            layers=tuple(layers),
            facts=self.record(FactsIdentity, values.get("facts"), "facts"),
            settings=self.take(values, "settings", dict),
            moments=self.mapping(values.get("moments"), "moments", self.text),
            files={
                self.inside(name): record
                for name, record in self.mapping(
                    values.get("files"), "files", lambda v, n: self.record(FileRecord, v, n)
                ).items()
            },
            tensors=self.mapping(
                values.get("tensors"), "tensors", lambda v, n: self.record(TensorRecord, v, n)
            ),
            format=kind,
            ranks=self.mapping(
                values.get("ranks", {}), "ranks", lambda v, n: self.record(RankRecord, v, n)
            ),
            metrics=metrics,
            versions=self.mapping(values.get("versions"), "versions", self.text),
            format_version=found,
        )

    def need(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise InputError(
                f"damaged manifest: {wanted} is wanted", source=self.file, field=name or None
            )

    def take(self, values: Mapping[str, Any], name: str, kind: type) -> Any:
        self.need(type(values.get(name)) is kind, name, f"a value of type {kind.__name__}")
        return values[name]

    def text(self, value: Any, name: str) -> str:
        self.need(isinstance(value, str), name, "a text")
        return str(value)

    def number_or_none(self, value: Any, name: str) -> None:
        self.need(value is None or type(value) in (int, float), name, "a number or null")

    def mapping(self, value: Any, name: str, convert: Callable[[Any, str], Any]) -> dict[str, Any]:
        self.need(isinstance(value, dict), name, "an object")
        return {key: convert(entry, f"{name}.{key}") for key, entry in value.items()}

    def record(self, kind: type[Any], value: Any, name: str) -> Any:
        self.need(isinstance(value, dict), name, "an object")
        types: dict[str, tuple[type, ...]] = {
            "str": (str,),
            "str | None": (str, type(None)),
            "int": (int,),
            "float": (int, float),
        }
        for part in fields(kind):
            given = part.name in value or part.default is not MISSING
            fits = given and type(value.get(part.name)) in types[str(part.type)]
            self.need(fits, f"{name}.{part.name}", f"{part.type}")
        return kind(**{part.name: value.get(part.name) for part in fields(kind)})

    def inside(self, name: str) -> str:
        parts = name.split("/")
        if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise InputError(
                f"damaged manifest: {name!r} does not stay inside the folder", source=self.file
            )
        return name
