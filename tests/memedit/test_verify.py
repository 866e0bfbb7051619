"""What `verify` finds in a published model; `test_manifest.py` has what it finds in any folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memedit import shards
from memedit.checkpoint import INDEX_NAME, Checkpoint
from memedit.checksums import FileRecord, crc32_of, record_of
from memedit.files import Files, LocalFiles, file_of
from memedit.manifest import MANIFEST_NAME, Manifest, manifest_bytes, read_manifest, write_manifest
from memedit.patching import LocalSink, write_patched
from memedit.verify import Problem, verify
from tests.elsewhere import Elsewhere, Noted
from tests.memedit.test_manifest import manifest_of
from tests.patches import each_row
from tests.tiny import save_tiny

EDITED = ("model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight")
BESIDE = "model.layers.1.mlp.up_proj.weight"
"""Was not edited, and lies in a shard with one that was."""
APART = "lm_head.weight"
"""Lies in a shard that was not rewritten."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base") / "model"
    return Checkpoint.open(save_tiny(folder, max_shard_size="100KB"))


@pytest.fixture(scope="module")
def published(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    patches = {name: each_row(torch.neg) for name in EDITED}
    patched = write_patched(base, LocalSink(folder), patches)
    (folder / "report.html").write_text("<html>")
    files = {**patched.files, "report.html": record_of(folder / "report.html")}
    write_manifest(folder, manifest_of(files=files, tensors=patched.tensors))
    shared = {base.shard_of(name) for name in EDITED}
    assert shared == {base.shard_of(BESIDE)} and base.shard_of(APART) not in shared
    return folder


@pytest.fixture
def version(published: Path, tmp_path: Path) -> Path:
    """A copy of its own, without links to the base."""
    return shutil.copytree(published, tmp_path / "version")


def found(version: Path, base: Checkpoint | None = None, **options: Any) -> list[tuple[str, str]]:
    """(file, kind) of each problem; the same from a place that is not here."""
    here = verify(LocalFiles(version), base=base, **options)
    there = verify(Elsewhere(version), base=base, **options)
    assert [(p.kind, p.message) for p in here] == [(p.kind, p.message) for p in there]
    assert all(isinstance(problem, Problem) and problem.message for problem in here)
    return [(problem.file, problem.kind) for problem in here]


def flip(version: Path, name: str) -> str:
    """Change the lowest bit of the last element of a tensor; the name of its shard."""
    info = Checkpoint.open(version).info(name)
    with (version / info.shard).open("r+b") as file:
        file.seek(info.offset + info.size_bytes - info.dtype.itemsize)
        (low,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([low ^ 1]))
    return info.shard


def rewrite(version: Path, change: Callable[[Manifest], Manifest]) -> None:
    manifest = change(read_manifest(version))
    (version / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))


def relist(version: Path, name: str) -> None:
    """Let the manifest list a file as it is now."""
    record = record_of(version / name)
    rewrite(version, lambda manifest: replace(manifest, files={**manifest.files, name: record}))


def substitute(path: Path, old: str, new: str) -> None:
    """Replace some bytes of a file by as many others."""
    assert len(old) == len(new)
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode(), 1))


@pytest.mark.parametrize("quick", [False, True])
def test_as_published(published: Path, base: Checkpoint, quick: bool) -> None:
    assert found(published, quick=quick) == []
    assert found(published, base, quick=quick) == []


# --- Tensors ------------------------------------------------------------------------------------


def test_one_bit_of_an_edited_tensor(version: Path, base: Checkpoint) -> None:
    shard = flip(version, EDITED[0])
    assert found(version) == [(shard, "checksum"), (shard, "tensor")]
    assert found(version, base) == [(shard, "checksum"), (shard, "tensor")]
    assert found(version, quick=True) == [(shard, "tensor")]
    (tensor,) = verify(LocalFiles(version), quick=True)
    assert EDITED[0] in tensor.message


def test_every_edited_tensor_that_was_changed_is_told(version: Path) -> None:
    shard = flip(version, EDITED[0])
    flip(version, EDITED[1])
    relist(version, shard)  # as if whoever changed them knew of checksums
    assert found(version) == [(shard, "tensor"), (shard, "tensor")]


@pytest.mark.parametrize("name", [BESIDE, APART])
def test_one_bit_of_a_tensor_that_was_not_edited(
    version: Path, base: Checkpoint, name: str
) -> None:
    shard = flip(version, name)
    assert found(version, base) == [(shard, "checksum"), (shard, "base")]
    assert name in verify(LocalFiles(version), base=base)[1].message
    assert found(version) == [(shard, "checksum")]
    assert found(version, quick=True) == []
    # A copy that was wrong from the beginning has the right checksum.
    relist(version, shard)
    assert found(version) == []
    assert found(version, base) == [(shard, "base")]


def test_an_edited_tensor_need_not_be_the_base_s(version: Path, base: Checkpoint) -> None:
    theirs = replace(base, tensors={n: i for n, i in base.tensors.items() if n not in EDITED})
    assert found(version, theirs) == []


def test_a_base_that_lacks_a_tensor(version: Path, base: Checkpoint) -> None:
    less = replace(base, tensors={n: i for n, i in base.tensors.items() if n != BESIDE})
    assert found(version, less) == [(base.shard_of(BESIDE), "base")]
    (problem,) = verify(LocalFiles(version), base=less)
    assert problem.message == f"the base lacks the tensor {BESIDE}"


def test_a_base_that_has_one_more_tensor(version: Path, base: Checkpoint) -> None:
    more = replace(base, tensors={**base.tensors, "more.weight": base.info(APART)})
    (problem,) = verify(LocalFiles(version), base=more)
    assert (problem.kind, problem.message) == (
        "base",
        "this version lacks the tensor more.weight",
    )


@pytest.mark.parametrize(
    "change", [{"shape": (64, 32, 1)}, {"shape": (32, 64)}, {"dtype": torch.int32}]
)
def test_the_same_bytes_as_another_tensor(
    version: Path, base: Checkpoint, change: dict[str, Any]
) -> None:
    info = replace(base.info(BESIDE), **change)
    other = replace(base, tensors={**base.tensors, BESIDE: info})
    assert found(version, other) == [(info.shard, "base")]


def test_another_base(version: Path, tmp_path: Path) -> None:
    other = Checkpoint.open(save_tiny(tmp_path / "other", seed=1))
    problems = verify(LocalFiles(version), base=other)
    assert {problem.kind for problem in problems} == {"base"}
    # All but the edited ones; the random biases and norms are different, too.
    assert len(problems) == len(other.names) - len(EDITED)


def test_a_tensor_that_the_manifest_makes_up(version: Path) -> None:
    rewrite(
        version,
        lambda m: replace(m, tensors={**m.tensors, "ghost.weight": m.tensors[EDITED[0]]}),
    )
    for quick in (False, True):
        (problem,) = verify(LocalFiles(version), quick=quick)
        assert (problem.kind, problem.message) == ("tensor", "lacks the tensor ghost.weight")


def test_large_tensors_are_looked_at_in_blocks(
    version: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memedit.patching.BLOCK_ELEMENTS", 100)
    assert found(version, base) == []
    noted = Noted(version)
    verify(noted, base=base)
    sizes = {(start, size) for name, start, size in noted.reads if name == base.shard_of(BESIDE)}
    info = Checkpoint.open(version).info(BESIDE)
    assert (info.offset, 3 * 32 * 4) in sizes and (info.offset, info.size_bytes) not in sizes
    shard = flip(version, EDITED[0])
    assert flip(version, BESIDE) == shard
    assert found(version, base, quick=True) == [(shard, "tensor"), (shard, "base")]


# --- What makes a model of it -------------------------------------------------------------------


def test_a_damaged_header(version: Path, base: Checkpoint) -> None:
    shard = base.shard_of(APART)
    with (version / shard).open("r+b") as file:
        file.write(b"\xff" * 20)
    (checksum, damaged) = found(version, base)
    assert checksum == (shard, "checksum")
    assert damaged[0].endswith(shard) and damaged[1] == "damaged"
    assert [kind for _, kind in found(version, quick=True)] == ["damaged"]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (INDEX_NAME, '"model-00002', '"model-00009'),
        (INDEX_NAME, '"weight_map"', '"weight_mop"'),
        (INDEX_NAME, APART, APART.upper()),
        ("config.json", "{", "["),
        ("config.json", '"llama"', '"lluma"'),
        ("config.json", '"vocab_size": 384', '"vocab_size": 383'),
        # Of these, transformers itself speaks in errors of many kinds.
        ("config.json", '"hidden_size": 32', '"hidden_size": 33'),
        ("config.json", '"num_attention_heads": 4', '"num_attention_heads": 0'),
        ("config.json", '"silu"', '"sulu"'),
        ("tokenizer.json", "{", "["),
        ("tokenizer.json", '"BPE"', '"EPB"'),
        ("tokenizer_config.json", "{", "["),
    ],
)
def test_what_can_no_longer_be_loaded(
    version: Path, base: Checkpoint, name: str, old: str, new: str
) -> None:
    substitute(version / name, old, new)
    checksum, (_, kind) = found(version, base)
    assert (checksum, kind) == ((name, "checksum"), "damaged")
    relist(version, name)
    (problem,) = verify(LocalFiles(version), base=base)
    assert problem.kind == "damaged" and (version / problem.file).is_file()


def test_what_transformers_would_fill_with_random_numbers(version: Path, base: Checkpoint) -> None:
    """One layer more by the config than there is in the files."""
    substitute(version / "config.json", '"num_hidden_layers": 4', '"num_hidden_layers": 5')
    relist(version, "config.json")
    for quick in (False, True):
        (problem,) = verify(LocalFiles(version), base=base, quick=quick)
        assert problem.kind == "damaged"
        assert "lacks 9 of the model's tensors, 'model.layers.4" in problem.message


def test_what_is_missing_is_told_once(version: Path, base: Checkpoint) -> None:
    (version / base.shard_of(APART)).unlink()
    assert found(version, base) == [(base.shard_of(APART), "missing")]
    with (version / base.shard_of(BESIDE)).open("ab") as file:
        file.write(b"x")
    assert {kind for _, kind in found(version, base)} == {"missing", "size"}


def test_all_that_is_wrong_is_told(version: Path, base: Checkpoint) -> None:
    (version / "report.html").write_text("<HTML>")
    (version / "more.txt").write_text("x")
    (version / ".lock").write_text("x")  # hidden, and so nobody's business
    shard, other = flip(version, EDITED[1]), flip(version, APART)
    assert found(version, base) == [
        *((name, "checksum") for name in sorted([shard, other, "report.html"])),
        ("more.txt", "unlisted"),
        (shard, "tensor"),
        (other, "base"),
    ]


# --- Quickly, by storage's own checksums, and of other formats ----------------------------------


def test_quick_reads_no_weights_but_the_edited_ones(
    published: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_FIRST_BYTES", 8)
    far = Elsewhere(published)
    assert verify(far, quick=True) == []
    assert far.opened == []  # as is done to hash a file
    read = {
        name
        for name, info in base.tensors.items()
        for shard, start, size in far.reads
        if shard == info.shard and start < info.offset + info.size_bytes
        if start + size > info.offset
    }
    assert read == set(EDITED)
    assert "report.html" not in {name for name, _, _ in far.reads}


@dataclass(frozen=True)
class Storage(Elsewhere):
    """A place with checksums of its own."""

    checksums: dict[str, str] = field(default_factory=dict, compare=False)

    def checksum(self, name: str) -> str | None:
        return self.checksums.get(name)


@pytest.mark.parametrize("quick", [False, True])
def test_the_storage_s_own_checksums(version: Path, base: Checkpoint, quick: bool) -> None:
    """Of a shard that the storage put together, nobody has seen every byte."""
    shard = base.shard_of(EDITED[0])
    right = crc32_of(file_of(version / shard))
    known = FileRecord(size_bytes=(version / shard).stat().st_size, sha256=None, checksum=right)
    rewrite(version, lambda m: replace(m, files={**m.files, shard: known}))

    def kinds(found: str | None) -> list[tuple[str, str]]:
        place: Files = Storage(version, checksums={} if found is None else {shard: found})
        return [(problem.file, problem.kind) for problem in verify(place, quick=quick)]

    assert kinds(right) == kinds(None) == []
    assert kinds("CRC32:wrong") == [(shard, "checksum")]
    assert kinds("CRC64NVME:other") == []  # how another storage counts
    flip(version, EDITED[0])
    # A storage's word alone is not enough: it is computed.
    computed = [] if quick else [(shard, "checksum")]
    assert kinds(right) == kinds(None) == [*computed, (shard, "tensor")]


def test_a_right_checksum_of_the_storage_does_not_hide_other_bytes(version: Path) -> None:
    record = replace(record_of(version / "report.html"), checksum="CRC32:right")
    rewrite(version, lambda m: replace(m, files={**m.files, "report.html": record}))
    (version / "report.html").write_text("<HTML>")
    storage = Storage(version, checksums={"report.html": "CRC32:right"})
    assert [problem.kind for problem in verify(storage)] == ["checksum"]
    assert verify(storage, quick=True) == []


@pytest.mark.parametrize("kind", ["delta", "lora"])
def test_an_update_alone_is_no_model(version: Path, base: Checkpoint, kind: str) -> None:
    """Its tensors are those that come of it; its files are checked as any."""
    for shard in base.shards:
        (version / shard).unlink()
    rewrite(
        version,
        lambda m: replace(
            m, format=kind, files={n: r for n, r in m.files.items() if n not in base.shards}
        ),
    )
    assert found(version) == []
    (version / "report.html").write_text("<HTML>")
    assert found(version) == [("report.html", "checksum")]


def test_format_1_still_verifies(version: Path, base: Checkpoint) -> None:
    values = json.loads((version / MANIFEST_NAME).read_text())
    values["format_version"] = 1
    for name in ("format", "ranks"):
        del values[name]
    for record in values["files"].values():
        assert record.pop("checksum") is None
    assert asdict(read_manifest(version))["format_version"] == 2
    (version / MANIFEST_NAME).write_text(json.dumps(values))
    manifest = read_manifest(version)
    assert (manifest.format_version, manifest.format, manifest.ranks) == (1, "full", {})
    assert found(version, base) == []
    shard = flip(version, EDITED[0])
    assert found(version, base) == [(shard, "checksum"), (shard, "tensor")]
