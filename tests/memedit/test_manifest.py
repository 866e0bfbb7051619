"""The manifest: a round trip, damage, and the comparison of a folder with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memedit.checksums import record_of
from memedit.errors import InputError
from memedit.files import LocalFiles
from memedit.manifest import (
    MANIFEST_NAME,
    FactsIdentity,
    Manifest,
    ModelIdentity,
    TensorRecord,
    read_manifest,
    write_manifest,
)
from memedit.verify import verify


def manifest_of(**changes: Any) -> Manifest:
    return replace(
        Manifest(
            run_id="20260101-abc",
            method="memit",
            model=ModelIdentity(name="smollm2", digest="d" * 64),
            layers=(5, 6),
            facts=FactsIdentity(digest="f" * 64, file="facts.jsonl", count=3),
            settings={"targets": {"lr": 0.5, "templates": ("{}",)}},
            moments={"5": "a", "6": "b"},
            tensors={
                "w": TensorRecord(sha256="e", delta_norm=1.5, weight_norm=2.0, rounding_error=0.0)
            },
            metrics={"before": {"score": 37.0}, "after": {"score": 84.5, "perplexity": None}},
        ),
        **changes,
    )


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """A folder with two files, one of them nested, and their manifest."""
    folder = tmp_path / "version"
    (folder / "sub").mkdir(parents=True)
    for name, text in (("config.json", "{}"), ("sub/é.txt", "text")):
        (folder / name).write_text(text)
    names = ("config.json", "sub/é.txt")
    write_manifest(folder, manifest_of(files={n: record_of(folder / n) for n in names}))
    return folder


def test_reads_what_it_wrote(version: Path) -> None:
    found = read_manifest(version)
    written = manifest_of(files=found.files, created_at=found.created_at)
    assert replace(found, settings={}) == replace(written, settings={})
    # JSON has no tuples.
    assert found.settings == {"targets": {"lr": 0.5, "templates": ["{}"]}}
    assert found.versions.keys() == {"memedit", "python", "torch", "transformers"}
    assert found.created_at.endswith("+00:00")


def test_a_measure_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest_of(metrics={"after": {"score": float("nan")}}))
    assert read_manifest(tmp_path).metrics == {"after": {"score": None}}


def test_an_existing_manifest_is_not_overwritten(version: Path) -> None:
    with pytest.raises(InputError, match="exists"):
        write_manifest(version, manifest_of())


def change(path: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("format_version",), 3, r"format_version\]: format 3; .* update memedit"),
        (("format",), "zip", r"\[format\]"),
        (("ranks",), {"w": {"rank": 1}}, r"\[ranks\.w\.truncation_error\]"),
        (("format_version",), None, "format_version"),
        (("run_id",), 7, r"\[run_id\]"),
        (("layers",), [1, "2"], r"\[layers\]"),
        (("layers",), None, r"\[layers\]"),
        (("model",), "smollm2", r"\[model\]"),
        (("model", "digest"), None, r"\[model\.digest\]"),
        (("facts", "count"), "3", r"\[facts\.count\]"),
        (("facts", "count"), True, r"\[facts\.count\]"),
        (("settings",), [], r"\[settings\]"),
        (("moments",), {"5": 5}, r"\[moments\.5\]"),
        (("metrics",), {"after": {"score": "84"}}, r"\[metrics\.after\.score\]"),
        (("metrics",), {"after": 3}, r"\[metrics\.after\]"),
        (("files",), None, r"\[files\]"),
        (("files", "config.json"), {"size_bytes": 1}, r"\[files\.config\.json\.sha256\]"),
        (("tensors", "w", "delta_norm"), "1", r"\[tensors\.w\.delta_norm\]"),
        (("versions",), {"torch": 2}, r"\[versions\.torch\]"),
    ],
)
def test_a_damaged_field_is_named(
    version: Path, path: tuple[str, ...], value: Any, match: str
) -> None:
    values = json.loads((version / MANIFEST_NAME).read_text())
    change(path, value)(values)
    (version / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(InputError, match=rf"memedit\.json.*{match}"):
        read_manifest(version)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff", "[" * 100_000])
def test_not_a_manifest(version: Path, text: str) -> None:
    (version / MANIFEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"memedit\.json"):
        read_manifest(version)


def test_no_manifest(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"not a version of memedit: no memedit\.json"):
            verify(LocalFiles(folder))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a\\..\\b", "", "..", "a\0b"]
)
def test_a_name_that_leaves_the_folder_is_refused(version: Path, name: str) -> None:
    values = json.loads((version / MANIFEST_NAME).read_text())
    values["files"][name] = {"size_bytes": 1, "sha256": "0"}
    (version / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(InputError, match="does not stay inside the folder"):
        verify(LocalFiles(version))


class TestVerify:
    """Of what is no checkpoint; `test_verify.py` has the others."""

    @pytest.fixture
    def version(self, version: Path) -> Path:
        manifest = replace(read_manifest(version), tensors={})
        (version / MANIFEST_NAME).unlink()
        write_manifest(version, manifest)
        return version

    def kinds(self, folder: Path) -> dict[str, str]:
        return {problem.file: problem.kind for problem in verify(LocalFiles(folder))}

    def test_as_published(self, version: Path) -> None:
        assert verify(LocalFiles(version)) == []

    def test_missing(self, version: Path) -> None:
        (version / "sub" / "é.txt").unlink()
        assert self.kinds(version) == {"sub/é.txt": "missing"}

    def test_another_size(self, version: Path) -> None:
        (version / "config.json").write_text("{ }")
        assert verify(LocalFiles(version))[0].message == "has 3 bytes, published with 2"
        assert self.kinds(version) == {"config.json": "size"}

    def test_one_bit_changed(self, version: Path) -> None:
        (version / "sub" / "é.txt").write_text("tezt")
        assert self.kinds(version) == {"sub/é.txt": "checksum"}

    def test_a_file_too_many(self, version: Path) -> None:
        (version / "model.safetensors").write_text("hides the index")
        (version / ".gitattributes").write_text("")
        assert self.kinds(version) == {"model.safetensors": "unlisted"}

    def test_a_link_that_leaves_the_folder(self, version: Path) -> None:
        outside = version.parent / "outside"
        outside.write_text("{}")
        (version / "config.json").unlink()
        (version / "config.json").symlink_to(outside)
        assert self.kinds(version) == {"config.json": "outside"}
