"""Reading and checking checkpoints; `test_patching.py` writes them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memedit import checkpoint as checkpoints
from memedit import checksums, shards
from memedit.checkpoint import Checkpoint
from memedit.errors import InputError
from memedit.files import LocalFiles
from memedit.manifest import MANIFEST_NAME, write_manifest
from memedit.patching import LocalSink, write_patched
from tests.elsewhere import Elsewhere
from tests.memedit.test_manifest import manifest_of
from tests.patches import each_row
from tests.tiny import save_tiny

INDEX = "model.safetensors.index.json"
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base", "llama")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return two_shards(tmp_path / "plain")


def two_shards(folder: Path) -> Path:
    """Two shards with an index, made without transformers."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    parts = {
        "a.safetensors": {"w": torch.randn(3, 4, generator=generator), "e": torch.empty(0, 2)},
        "b.safetensors": {"h": torch.randn(5, generator=generator).bfloat16()},
    }
    for shard, tensors in parts.items():
        save_file(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in parts.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index))


def write_raw(path: Path, header: object, data: bytes = b"", *, claimed: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data)


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_safetensors_library_reads(tiny_base: Path) -> None:
    checkpoint = Checkpoint.open(tiny_base)
    assert len(checkpoint.shards) > 1
    assert checkpoint.config["model_type"] == "llama"
    expected = {k: v for s in checkpoint.shards for k, v in load_file(tiny_base / s).items()}
    assert set(checkpoint.names) == expected.keys()
    for name, tensor in expected.items():
        info = checkpoint.info(name)
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(checkpoint.read(name, check_finite=True), tensor)
        with safe_open(tiny_base / checkpoint.shard_of(name), "pt") as file:
            assert name in file.keys()  # noqa: SIM118 (not a mapping)
    assert checkpoint.size_bytes == sum(t.nbytes for t in expected.values())


@pytest.mark.parametrize("dtype", sorted(set(shards.DTYPES.values()), key=str), ids=str)
def test_every_dtype_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    save_file({"t": tensor, "scalar": tensor[0, 1].clone()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for name, expected in (("t", tensor), ("scalar", tensor[0, 1])):
        found = checkpoint.read(name)
        assert found.dtype == dtype and found.shape == expected.shape
        assert found.tolist() == expected.tolist()


def test_an_empty_tensor_is_read(plain: Path) -> None:
    found = Checkpoint.open(plain).read("e", check_finite=True)
    assert found.shape == (0, 2) and found.dtype == torch.float32


def test_a_single_file_wins_over_an_index_as_in_transformers(plain: Path) -> None:
    save_file({"only": torch.ones(1)}, plain / "model.safetensors")
    assert Checkpoint.open(plain).names == ("only",)


def test_an_unknown_tensor_is_named(plain: Path) -> None:
    checkpoint = Checkpoint.open(plain)
    for read in (checkpoint.read, lambda name: checkpoint.read_rows(name, 0, 1)):
        with pytest.raises(InputError, match="no tensor 'missing'"):
            read("missing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_are_those_of_the_whole_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(30).reshape(6, 5).to(dtype),
        "vector": torch.arange(7).to(dtype),
        "experts": torch.arange(24).reshape(4, 3, 2).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for name, whole in tensors.items():
        for start, stop in ((0, len(whole)), (0, 1), (1, 3), (3, 4), (2, 2)):
            found = checkpoint.read_rows(name, start, stop)
            assert found.dtype == dtype and torch.equal(found, whole[start:stop])


def test_only_what_is_wanted_is_read(plain: Path) -> None:
    far = Elsewhere(plain)
    checkpoint = Checkpoint.open(far)
    assert checkpoint.files.location == "far://plain" and checkpoint.config == {
        "model_type": "llama"
    }
    here, info = Checkpoint.open(plain), checkpoint.info("w")
    assert checkpoint.tensors == here.tensors and checkpoint.digest == here.digest
    far.reads.clear()
    assert torch.equal(checkpoint.read("w"), here.read("w"))
    assert torch.equal(checkpoint.read_rows("w", 1, 2), here.read("w")[1:2])
    row_bytes = info.size_bytes // 3
    assert far.reads == [
        (info.shard, info.offset, info.size_bytes),
        (info.shard, info.offset + row_bytes, row_bytes),
    ]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^far://absent: nothing lies here"):
        Checkpoint.open(Elsewhere(tmp_path / "absent"))
    with pytest.raises(InputError, match=f"^{tmp_path}: the folder is empty"):
        Checkpoint.open(tmp_path)


class TestPublished:
    """A version knows its edited tensors, and gives out no others in their place."""

    @pytest.fixture
    def version(self, plain: Path, tmp_path: Path) -> Path:
        version = tmp_path / "version"
        version.mkdir()
        changes = {"w": each_row(torch.neg), "h": each_row(torch.neg)}
        patched = write_patched(Checkpoint.open(plain), LocalSink(version), changes)
        write_manifest(version, manifest_of(files=patched.files, tensors=patched.tensors))
        return version

    def change(self, version: Path, name: str) -> None:
        info = Checkpoint.open(version).info(name)
        with (version / info.shard).open("r+b") as file:
            file.seek(info.offset + info.size_bytes - 1)
            last = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([last[0] ^ 1]))

    @pytest.mark.parametrize("place", [LocalFiles, Elsewhere])
    def test_a_changed_tensor_is_refused(self, version: Path, place: type[LocalFiles]) -> None:
        Checkpoint.open(place(version)).check_published()
        self.change(version, "h")
        checkpoint = Checkpoint.open(place(version))
        for read in (lambda: checkpoint.read("h"), checkpoint.check_published):
            with pytest.raises(InputError, match="not the one that was published") as caught:
                read()
            assert caught.value.field == "h"
            assert str(caught.value.source) == f"{place(version).location}/b.safetensors"
        assert checkpoint.read("w").numel() == 12

    def test_tensors_that_were_not_edited_are_not_checked(self, version: Path) -> None:
        listed = json.loads((version / MANIFEST_NAME).read_text())
        del listed["tensors"]["h"]
        (version / MANIFEST_NAME).write_text(json.dumps(listed))
        self.change(version, "h")
        Checkpoint.open(version).check_published()

    @pytest.mark.parametrize("kind", ["delta", "lora"])
    def test_the_tensors_of_an_update_are_elsewhere(self, version: Path, kind: str) -> None:
        """Its manifest lists what the edited tensors become."""
        listed = json.loads((version / MANIFEST_NAME).read_text())
        (version / MANIFEST_NAME).write_text(json.dumps(listed | {"format": kind}))
        assert Checkpoint.open(version).published == {}

    def test_a_manifest_that_was_removed_says_nothing(self, version: Path) -> None:
        self.change(version, "h")
        (version / MANIFEST_NAME).unlink()
        assert Checkpoint.open(version).read("h").numel() == 5

    def test_a_damaged_manifest_is_refused(self, version: Path) -> None:
        (version / MANIFEST_NAME).write_text("{")
        with pytest.raises(InputError, match=r"memedit\.json: not JSON"):
            Checkpoint.open(version)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_found(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    save_file({"w": torch.tensor([1.0, bad], dtype=dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("w").numel() == 2
    # Whether a weight can be edited is told without reading it: writing the edit finds this.
    checkpoint.check_editable(["w"])
    for check in (checkpoint.check_finite, lambda: checkpoint.check_finite(["w"])):
        with pytest.raises(InputError, match=r"model\.safetensors \[w\].*NaN or an infinity"):
            check()


class TestRefused:
    """Every damaged folder is refused on opening, with the name of the file."""

    def refused(self, folder: Path, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            Checkpoint.open(folder)
        assert caught.value.source is not None

    def test_no_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "absent", "absent: no such folder")
        (tmp_path / "file").write_text("")
        self.refused(tmp_path / "file", "file: not a folder")

    def test_no_config(self, plain: Path) -> None:
        (plain / "config.json").unlink()
        self.refused(plain, r"no config\.json")

    @pytest.mark.parametrize("text", ["", "[1]", "{", "\xff" * 3, "[" * 100_000])
    def test_config_not_json(self, plain: Path, text: str) -> None:
        (plain / "config.json").write_bytes(text.encode("latin-1"))
        self.refused(plain, r"config\.json: not (a )?JSON")

    def test_pickled_weights_only(self, plain: Path) -> None:
        for path in plain.glob("*safetensors*"):
            path.unlink()
        self.refused(plain, r"neither model\.safetensors nor")
        (plain / "pytorch_model.bin").write_bytes(b"x")
        self.refused(plain, r"pickled weights.*convert once: python -c .*save_pretrained")

    def test_no_tensor(self, plain: Path) -> None:
        save_file({}, plain / "model.safetensors")
        self.refused(plain, "holds no tensor")

    @pytest.mark.parametrize(
        "name",
        ["../../x", "../x.safetensors", "/etc/x.safetensors", "sub/../../x.safetensors",
         "sub/x.safetensors", "", ".", "..", "a\\b.safetensors", "x\0.safetensors", 7, "x.bin"],
    )  # fmt: skip
    def test_index_leaves_the_folder(self, plain: Path, name: object) -> None:
        save_file({"w": torch.ones(1)}, plain.parent / "x.safetensors")
        edit_index(plain, w=name)
        self.refused(plain, r"index\.json \[w\]: .*is not the name of a \.safetensors file in the")

    def test_index_without_map(self, plain: Path) -> None:
        (plain / INDEX).write_text('{"weight_map": []}')
        self.refused(plain, "no weight_map")

    def test_index_names_a_tensor_that_is_not_there(self, plain: Path) -> None:
        edit_index(plain, ghost="b.safetensors")
        self.refused(plain, r"b\.safetensors \[ghost\].*the file lacks it")

    def test_index_lacks_a_tensor(self, plain: Path) -> None:
        edit_index(plain, w=None)
        self.refused(plain, r"a\.safetensors \[w\].*places this tensor in no file")

    def test_index_names_the_wrong_shard(self, plain: Path) -> None:
        edit_index(plain, w="b.safetensors")
        self.refused(plain, r"a\.safetensors \[w\].*in b\.safetensors")

    def test_shard_missing(self, plain: Path) -> None:
        (plain / "b.safetensors").unlink()
        self.refused(plain, r"the shard b\.safetensors is missing")

    def test_truncated_at_every_length(self, plain: Path) -> None:
        shard = plain / "b.safetensors"
        whole = shard.read_bytes()
        for length in range(len(whole)):
            shard.write_bytes(whole[:length])
            self.refused(plain, r"b\.safetensors: .*truncated")
        shard.write_bytes(whole)
        Checkpoint.open(plain)

    def test_too_long(self, plain: Path) -> None:
        with (plain / "b.safetensors").open("ab") as file:
            file.write(b"x")
        self.refused(plain, "but the tensors end at")

    def test_header_claims_2_to_the_60(self, plain: Path) -> None:
        write_raw(plain / "b.safetensors", {}, claimed=1 << 60)
        self.refused(plain, "claims 1152921504606846976 bytes")

    def test_header_over_the_limit(self, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shards, "HEADER_LIMIT_BYTES", 10)
        self.refused(plain, "the header claims")

    @pytest.mark.parametrize(
        ("header", "match"),
        [
            (b"not json", "not JSON"),
            (b"\xff\xfe", "not JSON"),
            (b"[" * 50_000, "not JSON"),
            (b'{"h": 1, "h": 1}', "occurs twice"),
            ([], "not a JSON object"),
            ({"h": 3}, "not an object"),
            ({"h": entry("F99")}, r"\[h\]: unknown dtype 'F99'"),
            ({"h": entry(dtype=None)}, "unknown dtype None"),  # type: ignore[arg-type]
            ({"h": entry(shape=[-1])}, "shape is not"),
            ({"h": entry(shape=[1.0])}, "shape is not"),
            ({"h": entry(shape=[True])}, "shape is not"),
            ({"h": {**entry(), "shape": "1"}}, "shape is not"),
            ({"h": entry(shape=[2])}, "do not hold a F32 tensor"),
            ({"h": entry(shape=[2**62, 2**62])}, "do not hold"),
            ({"h": entry(offsets=[4, 0])}, "not a pair"),
            ({"h": entry(offsets=[-4, 0])}, "not a pair"),
            ({"h": entry(offsets=[0, 4, 8])}, "not a pair"),
            ({"h": entry(offsets=[4, 8])}, r"\[h\].*follow a gap"),
            ({"h": entry(), "i": entry()}, r"\[i\].*overlap"),
            ({"h": entry(shape=[2], offsets=[0, 8]), "i": entry(offsets=[4, 8])}, "overlap"),
            ({"h": entry(shape=[100], offsets=[0, 400])}, "truncated: .*the header asks for"),
            ({"h": entry(shape=[2**58], offsets=[0, 2**60])}, "truncated"),
        ],
    )
    def test_damaged_header(self, plain: Path, header: object, match: str) -> None:
        write_raw(plain / "b.safetensors", header, b"\0" * 8)
        self.refused(plain, match)


def test_a_shard_that_shrinks_after_opening_is_an_input_error(plain: Path) -> None:
    checkpoint = Checkpoint.open(plain)
    os.truncate(plain / "a.safetensors", 100)
    with pytest.raises(InputError, match="shorter"):
        checkpoint.read("w")


class TestDigest:
    def test_is_equal_for_a_copy_and_changes_with_every_part(
        self, plain: Path, tmp_path: Path
    ) -> None:
        (plain / "tokenizer.json").write_text("{}")
        digest = Checkpoint.open(plain).digest
        plain.rename(tmp_path / "moved")
        folder = tmp_path / "moved"
        (folder / "README.md").write_text("says nothing about the numbers")
        assert Checkpoint.open(folder).digest == digest
        for name in ("a.safetensors", "config.json", "tokenizer.json"):
            path = folder / name
            before = path.read_bytes()
            path.write_bytes(
                before[:-1] + b"\x01" if name == "a.safetensors" else before[:-1] + b" }"
            )
            assert Checkpoint.open(folder).digest != digest
            path.write_bytes(before)
        assert Checkpoint.open(folder).digest == digest

    def test_a_known_file_is_not_read_again(
        self, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for path in plain.iterdir():
            os.utime(path, (1_000_000_000, 1_000_000_000))
        cache = tmp_path / "cache"
        digest = Checkpoint.open(plain, cache=cache).digest
        again = Checkpoint.open(plain, cache=cache)
        with monkeypatch.context() as patched:
            for read in ("read_into", "open"):
                patched.setattr(LocalFiles, read, lambda *_: pytest.fail("was read again"))
            assert again.digest == digest
            again.check_finite()
        shard = plain / "a.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
        assert Checkpoint.open(plain, cache=cache).digest != digest

    def test_a_large_shard_is_looked_at_in_pieces(
        self, plain: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In one pass: its sha256, and the first weight that is not finite."""
        monkeypatch.setattr(checkpoints, "_PIECE_BYTES", 16)
        bad = torch.ones(5, 3)
        bad[4, 2] = float("nan")
        save_file({"good": torch.ones(7), "bad": bad}, plain / "model.safetensors")
        checkpoint = Checkpoint.open(plain)
        found = checkpoint.file_records["model.safetensors"]
        content = (plain / "model.safetensors").read_bytes()
        assert found.sha256 == hashlib.sha256(content).hexdigest()
        assert found.size_bytes == len(content)
        with pytest.raises(InputError, match=r"\[bad\].*NaN"):
            checkpoint.check_finite()
        checkpoint.check_finite(["good"])

    def test_a_file_just_written_is_not_remembered(self, plain: Path, tmp_path: Path) -> None:
        os.utime(plain / "config.json", (time.time(), time.time()))
        checksums.record_of(plain / "config.json", cache=tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("content", [b"", b"[]", b'{"identity": []}', b"\xff"])
    def test_a_damaged_cache_is_done_without(
        self, plain: Path, tmp_path: Path, content: bytes
    ) -> None:
        os.utime(plain / "config.json", (1_000_000_000, 1_000_000_000))
        expected = checksums.record_of(plain / "config.json", cache=tmp_path)
        (known,) = (tmp_path / "checksums").iterdir()
        known.write_bytes(content)
        assert checksums.record_of(plain / "config.json", cache=tmp_path) == expected

    def test_a_cache_that_cannot_be_written_is_done_without(
        self, plain: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        os.utime(plain / "config.json", (1_000_000_000, 1_000_000_000))
        found = checksums.record_of(plain / "config.json", cache=tmp_path / "file")
        assert found == checksums.record_of(plain / "config.json")
