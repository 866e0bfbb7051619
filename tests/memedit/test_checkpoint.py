"""Reading, checking and patching checkpoint folders."""

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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memedit import checksums, shards
from memedit.checkpoint import Checkpoint, write_patched
from memedit.errors import InputError, NumericalError
from tests.tiny import save_tiny

INDEX = "model.safetensors.index.json"
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base", "llama")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Two shards with an index, made without transformers."""
    folder = tmp_path / "plain"
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
    with pytest.raises(InputError, match="no tensor 'missing'"):
        Checkpoint.open(plain).read("missing")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_found(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    save_file({"w": torch.tensor([1.0, bad], dtype=dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("w").numel() == 2
    for check in (checkpoint.check_finite, lambda: checkpoint.check_editable(["w"])):
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
        with monkeypatch.context() as patched:
            patched.setattr(hashlib, "file_digest", lambda *_: pytest.fail("was read again"))
            assert Checkpoint.open(plain, cache=cache).digest == digest
        shard = plain / "a.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
        assert Checkpoint.open(plain, cache=cache).digest != digest

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


class TestWritePatched:
    def test_only_the_bytes_of_the_edited_tensor_change(
        self, tiny_base: Path, tmp_path: Path
    ) -> None:
        base = Checkpoint.open(tiny_base)
        delta = torch.randn(base.info(WEIGHT).shape, generator=torch.Generator().manual_seed(1))
        result = write_patched(base, tmp_path, {WEIGHT: lambda w: w + delta})

        edited = base.shard_of(WEIGHT)
        assert result.rewritten == (edited,)
        info = base.info(WEIGHT)
        before, after = (tiny_base / edited).read_bytes(), (tmp_path / edited).read_bytes()
        end = info.offset + info.size_bytes
        assert before[: info.offset] == after[: info.offset] and before[end:] == after[end:]
        expected = base.read(WEIGHT) + delta
        assert torch.equal(load_file(tmp_path / edited)[WEIGHT], expected)

        record = result.tensors[WEIGHT]
        assert record.sha256 == hashlib.sha256(after[info.offset : end]).hexdigest()
        # (W + Δ) - W rounds like W + Δ does.
        assert record.delta_norm == pytest.approx(float(delta.double().norm()), rel=1e-5)
        assert record.weight_norm == pytest.approx(float(base.read(WEIGHT).double().norm()))
        assert record.rounding_error == 0.0
        for name, listed in result.files.items():
            content = (tmp_path / name).read_bytes()
            assert listed.sha256 == hashlib.sha256(content).hexdigest()
            assert listed.size_bytes == len(content)
        assert set(result.files) == {p.name for p in tiny_base.iterdir()}
        assert set(result.files) == {p.name for p in tmp_path.iterdir()}

    def test_transformers_loads_the_copy_with_the_edit(
        self, tiny_base: Path, tmp_path: Path
    ) -> None:
        write_patched(Checkpoint.open(tiny_base), tmp_path, {WEIGHT: torch.neg})
        before = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
        after = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        assert AutoTokenizer.from_pretrained(tmp_path).encode("a b")
        for name, tensor in before.items():
            assert torch.equal(after[name], -tensor if name == WEIGHT else tensor)

    def test_untouched_shards_are_linked_and_side_files_are_not(
        self, plain: Path, tmp_path: Path
    ) -> None:
        (plain / "tokenizer.json").write_text("{}")
        write_patched(Checkpoint.open(plain), tmp_path, {"w": torch.neg})
        assert (tmp_path / "b.safetensors").samefile(plain / "b.safetensors")
        for name in ("a.safetensors", "tokenizer.json", "config.json", INDEX):
            assert (tmp_path / name).stat().st_nlink == 1

    def test_copies_where_links_and_reflinks_are_not_possible(
        self, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError("not here")

        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "copy_file_range", refuse)
        write_patched(Checkpoint.open(plain), tmp_path, {"w": torch.neg})
        assert not (tmp_path / "b.safetensors").samefile(plain / "b.safetensors")
        assert (tmp_path / "b.safetensors").read_bytes() == (plain / "b.safetensors").read_bytes()
        assert torch.equal(Checkpoint.open(tmp_path).read("w"), -Checkpoint.open(plain).read("w"))

    def test_a_base_of_symbolic_links_as_in_the_hub_cache(
        self, plain: Path, tmp_path: Path
    ) -> None:
        snapshot, out = tmp_path / "snapshot", tmp_path / "out"
        snapshot.mkdir()
        out.mkdir()
        for path in plain.iterdir():
            (snapshot / path.name).symlink_to(Path("..") / "plain" / path.name)
        write_patched(Checkpoint.open(snapshot), out, {"w": torch.neg})
        assert not any(p.is_symlink() for p in out.iterdir())
        assert Checkpoint.open(out).names == Checkpoint.open(plain).names

    def test_what_must_not_go_along_stays(self, plain: Path, tmp_path: Path) -> None:
        stay = (
            *("memedit.json", "facts.jsonl", "report.html", "rejects.jsonl"),
            *("pytorch_model.bin", "x.gguf"),
            *(".gitattributes", "consolidated.safetensors"),
        )
        go = ("LICENSE", "generation_config.json", "additional_chat_templates/tool.jinja")
        for name in (*stay, *go):
            (plain / name).parent.mkdir(exist_ok=True)
            (plain / name).write_text("text")
        (plain / "nested").mkdir()
        (plain / "nested" / "other.json").write_text("{}")
        out = tmp_path / "out"
        out.mkdir()
        result = write_patched(Checkpoint.open(plain), out, {})
        assert result.rewritten == ()
        assert set(result.files) == {*go, "config.json", INDEX, "a.safetensors", "b.safetensors"}

    def test_the_stored_dtype_stays_and_the_rounding_is_measured(
        self, plain: Path, tmp_path: Path
    ) -> None:
        base = Checkpoint.open(plain)
        delta = torch.full((5,), 1e-3, dtype=torch.float64)
        result = write_patched(base, tmp_path, {"h": lambda w: w.double() + delta})
        stored, exact = Checkpoint.open(tmp_path).read("h"), base.read("h").double() + delta
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, exact.bfloat16())
        expected = float((stored.double() - exact).norm() / delta.norm())
        assert expected > 0.1
        assert result.tensors["h"].rounding_error == pytest.approx(expected, rel=1e-9)

    def test_a_patch_may_work_in_place_or_return_a_view(self, plain: Path, tmp_path: Path) -> None:
        base = Checkpoint.open(plain)
        result = write_patched(base, tmp_path, {"w": lambda w: w.mul_(2).t().contiguous().t()})
        assert torch.equal(Checkpoint.open(tmp_path).read("w"), base.read("w") * 2)
        assert result.tensors["w"].delta_norm == pytest.approx(float(base.read("w").norm()))

    def test_a_patch_that_changes_nothing(self, plain: Path, tmp_path: Path) -> None:
        result = write_patched(Checkpoint.open(plain), tmp_path, {"w": lambda w: w})
        assert (result.tensors["w"].delta_norm, result.tensors["w"].rounding_error) == (0.0, 0.0)
        assert (tmp_path / "a.safetensors").read_bytes() == (plain / "a.safetensors").read_bytes()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e60])
    def test_a_result_that_is_not_finite_is_refused(
        self, plain: Path, tmp_path: Path, bad: float
    ) -> None:
        def spoil(weight: Tensor) -> Tensor:
            return torch.full_like(weight, bad, dtype=torch.float64)

        with pytest.raises(NumericalError, match="tensor w holds NaN or a number beyond"):
            write_patched(Checkpoint.open(plain), tmp_path, {"w": spoil})

    def test_nothing_is_written_when_a_tensor_cannot_be_edited(
        self, plain: Path, tmp_path: Path
    ) -> None:
        save_file({"q": torch.ones(2, dtype=torch.int8)}, plain / "model.safetensors")
        out = tmp_path / "out"
        out.mkdir()
        base = Checkpoint.open(plain)
        for name, match in (("q", "quantised"), ("nope", "no tensor")):
            with pytest.raises(InputError, match=match):
                write_patched(base, out, {name: torch.neg})
        assert not list(out.iterdir())

    def test_a_patch_of_another_shape_is_a_fault_of_the_caller(
        self, plain: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"patch of w has shape \(4, 3\)"):
            write_patched(Checkpoint.open(plain), tmp_path, {"w": torch.t})

    def test_an_existing_file_is_not_overwritten(self, plain: Path, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_text("someone's")
        with pytest.raises(FileExistsError):
            write_patched(Checkpoint.open(plain), tmp_path, {"w": torch.neg})
        assert (tmp_path / "a.safetensors").read_text() == "someone's"
