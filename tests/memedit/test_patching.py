"""A patched copy: the same bytes but for the edited tensors, whatever it is made from."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memedit import patching
from memedit.checkpoint import INDEX_NAME, Checkpoint
from memedit.checksums import FileRecord, record_of
from memedit.errors import InputError, NumericalError
from memedit.files import File
from memedit.manifest import write_manifest
from memedit.patching import (
    LocalSink,
    pieces,
    records_of_patches,
    row_blocks,
    write_patched,
)
from tests.elsewhere import Elsewhere
from tests.memedit.test_checkpoint import two_shards
from tests.memedit.test_manifest import manifest_of
from tests.patches import each_row
from tests.tiny import save_tiny
from tests.workflows.runs import contents

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base", "llama")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return two_shards(tmp_path / "plain")


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_only_the_bytes_of_the_edited_tensor_change(tiny_base: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny_base)
    delta = torch.randn(base.info(WEIGHT).shape, generator=torch.Generator().manual_seed(1))
    result = write_patched(
        base, LocalSink(tmp_path), {WEIGHT: lambda w, start: w + delta[start : start + len(w)]}
    )

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


def test_transformers_loads_the_copy_with_the_edit(tiny_base: Path, tmp_path: Path) -> None:
    write_patched(Checkpoint.open(tiny_base), LocalSink(tmp_path), {WEIGHT: each_row(torch.neg)})
    before = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a b")
    for name, tensor in before.items():
        assert torch.equal(after[name], -tensor if name == WEIGHT else tensor)


def test_untouched_shards_are_linked_and_side_files_are_not(plain: Path, tmp_path: Path) -> None:
    (plain / "tokenizer.json").write_text("{}")
    write_patched(Checkpoint.open(plain), LocalSink(tmp_path), {"w": each_row(torch.neg)})
    assert (tmp_path / "b.safetensors").samefile(plain / "b.safetensors")
    for name in ("a.safetensors", "tokenizer.json", "config.json", INDEX_NAME):
        assert (tmp_path / name).stat().st_nlink == 1


def test_what_is_known_of_the_base_is_not_found_out_again(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest took a look at every byte."""
    (plain / "README.md").write_text("no part of the digest")
    hashed: list[str] = []

    def noting(path: Path) -> FileRecord:
        hashed.append(path.name)
        return record_of(path)

    monkeypatch.setattr(patching, "record_of", noting)
    known, unknown = Checkpoint.open(plain), Checkpoint.open(plain)
    assert known.digest
    written = write_patched(known, LocalSink(new(tmp_path / "a")), {"w": each_row(torch.neg)})
    assert sorted(hashed) == ["README.md", "a.safetensors"]
    hashed.clear()
    again = write_patched(unknown, LocalSink(new(tmp_path / "b")), {"w": each_row(torch.neg)})
    assert sorted(hashed) == sorted(again.files)
    assert written == again


def test_copies_where_links_and_reflinks_are_not_possible(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    write_patched(Checkpoint.open(plain), LocalSink(tmp_path), {"w": each_row(torch.neg)})
    assert not (tmp_path / "b.safetensors").samefile(plain / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (plain / "b.safetensors").read_bytes()
    assert torch.equal(Checkpoint.open(tmp_path).read("w"), -Checkpoint.open(plain).read("w"))


def test_a_base_of_symbolic_links_as_in_the_hub_cache(plain: Path, tmp_path: Path) -> None:
    snapshot, out = tmp_path / "snapshot", tmp_path / "out"
    snapshot.mkdir()
    out.mkdir()
    for path in plain.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / "plain" / path.name)
    write_patched(Checkpoint.open(snapshot), LocalSink(out), {"w": each_row(torch.neg)})
    assert not any(p.is_symlink() for p in out.iterdir())
    assert Checkpoint.open(out).names == Checkpoint.open(plain).names


def test_what_must_not_go_along_stays(plain: Path, tmp_path: Path) -> None:
    stay = (
        *("facts.jsonl", "report.html", "rejects.jsonl"),
        *("pytorch_model.bin", "x.gguf"),
        *(".gitattributes", "consolidated.safetensors"),
    )
    go = ("LICENSE", "generation_config.json", "additional_chat_templates/tool.jinja")
    for name in (*stay, *go):
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_text("text")
    write_manifest(plain, manifest_of(tensors={}))
    (plain / "nested").mkdir()
    (plain / "nested" / "other.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    result = write_patched(Checkpoint.open(plain), LocalSink(out), {})
    assert result.rewritten == ()
    assert set(result.files) == {*go, "config.json", INDEX_NAME, "a.safetensors", "b.safetensors"}


def test_the_stored_dtype_stays_and_the_rounding_is_measured(plain: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(plain)
    delta = torch.full((5,), 1e-3, dtype=torch.float64)
    result = write_patched(base, LocalSink(tmp_path), {"h": each_row(lambda w: w.double() + delta)})
    stored, exact = Checkpoint.open(tmp_path).read("h"), base.read("h").double() + delta
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, exact.bfloat16())
    expected = float((stored.double() - exact).norm() / delta.norm())
    assert expected > 0.1
    assert result.tensors["h"].rounding_error == pytest.approx(expected, rel=1e-9)


def test_a_patch_may_work_in_place_or_return_a_view(plain: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(plain)
    result = write_patched(
        base, LocalSink(tmp_path), {"w": each_row(lambda w: w.mul_(2).t().contiguous().t())}
    )
    assert torch.equal(Checkpoint.open(tmp_path).read("w"), base.read("w") * 2)
    assert result.tensors["w"].delta_norm == pytest.approx(float(base.read("w").norm()))


def test_a_patch_that_changes_nothing(plain: Path, tmp_path: Path) -> None:
    result = write_patched(
        Checkpoint.open(plain), LocalSink(tmp_path), {"w": each_row(lambda w: w)}
    )
    assert (result.tensors["w"].delta_norm, result.tensors["w"].rounding_error) == (0.0, 0.0)
    assert (tmp_path / "a.safetensors").read_bytes() == (plain / "a.safetensors").read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_base_that_is_not_finite_is_refused(plain: Path, tmp_path: Path, bad: float) -> None:
    """Even where the patch would put something finite in its place."""
    tensors = load_file(plain / "b.safetensors")
    tensors["h"][3] = bad
    save_file(tensors, plain / "b.safetensors")
    base = Checkpoint.open(plain)
    base.check_editable(["h"])
    for patch in (each_row(torch.zeros_like), each_row(torch.neg)):
        with pytest.raises(InputError, match=r"b\.safetensors \[h\]: .*NaN or an infinity"):
            write_patched(base, LocalSink(tmp_path / "out"), {"h": patch})
        with pytest.raises(InputError, match=r"b\.safetensors \[h\]: .*NaN or an infinity"):
            records_of_patches(base, {"h": patch})
        shutil.rmtree(tmp_path / "out")
    # Nobody looks at what is passed on.
    write_patched(base, LocalSink(tmp_path / "out"), {"w": each_row(torch.neg)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e60])
def test_a_result_that_is_not_finite_is_refused(plain: Path, tmp_path: Path, bad: float) -> None:
    def spoil(weight: Tensor) -> Tensor:
        return torch.full_like(weight, bad, dtype=torch.float64)

    with pytest.raises(NumericalError, match="tensor w holds NaN or a number beyond"):
        write_patched(Checkpoint.open(plain), LocalSink(tmp_path), {"w": each_row(spoil)})


def test_nothing_is_written_when_a_tensor_cannot_be_edited(plain: Path, tmp_path: Path) -> None:
    save_file({"q": torch.ones(2, dtype=torch.int8)}, plain / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    base = Checkpoint.open(plain)
    for name, match in (("q", "quantised"), ("nope", "no tensor")):
        with pytest.raises(InputError, match=match):
            write_patched(base, LocalSink(out), {name: each_row(torch.neg)})
    assert not list(out.iterdir())


def test_a_patch_of_another_shape_is_a_fault_of_the_caller(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"patch of w has shape \(4, 3\)"):
        write_patched(Checkpoint.open(plain), LocalSink(tmp_path), {"w": each_row(torch.t)})


# --- Blocks of rows -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((), [(0, 1)]),
        ((0, 3), []),
        ((25,), [(0, 10), (10, 20), (20, 25)]),
        ((6, 3), [(0, 3), (3, 6)]),
        ((3, 10), [(0, 1), (1, 2), (2, 3)]),
        ((2, 1000), [(0, 1), (1, 2)]),
        ((4, 0), [(0, 4)]),
        ((3, 2, 2), [(0, 2), (2, 3)]),
    ],
)
def test_blocks_cover_the_rows(
    shape: tuple[int, ...], blocks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patching, "BLOCK_ELEMENTS", 10)
    assert list(row_blocks(shape)) == blocks


@pytest.mark.parametrize("elements", [1, 64, 65, 1000, 2048])
def test_a_tensor_of_many_blocks_is_that_of_one(
    elements: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint.open(tiny_base)
    shape = base.info(WEIGHT).shape
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    starts: list[int] = []

    def patch(rows: Tensor, start: int) -> Tensor:
        starts.append(start)
        return rows.double() + delta[start : start + len(rows)]

    whole = write_patched(base, LocalSink(new(tmp_path / "whole")), {WEIGHT: patch})
    assert starts == [0]
    starts.clear()
    monkeypatch.setattr(patching, "BLOCK_ELEMENTS", elements)
    parts = write_patched(base, LocalSink(new(tmp_path / "parts")), {WEIGHT: patch})
    assert starts == list(range(0, shape[0], max(1, elements // shape[1])))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole") != contents(tiny_base)
    assert parts.files == whole.files and parts.rewritten == whole.rewritten
    one, other = parts.tensors[WEIGHT], whole.tensors[WEIGHT]
    assert one.sha256 == other.sha256
    for name in ("delta_norm", "weight_norm", "rounding_error"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-12) != 0
    assert records_of_patches(base, {WEIGHT: patch}) == parts.tensors


class Exact(LocalSink):
    """A sink that is told what it was promised: edits that fill ranges, both in order."""

    def patch(
        self,
        source: File,
        ranges: Sequence[tuple[int, int]],
        edits: Iterator[tuple[int, memoryview]],
    ) -> FileRecord:
        made = [(offset, bytes(raw)) for offset, raw in edits]
        filled = [n for offset, raw in made for n in range(offset, offset + len(raw))]
        assert filled == [n for offset, size in ranges for n in range(offset, offset + size)]
        assert filled == sorted(set(filled)) != []
        return super().patch(source, ranges, iter([(o, memoryview(raw)) for o, raw in made]))


@pytest.mark.parametrize("elements", [100, 1 << 22])
def test_many_tensors_of_one_shard(
    elements: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order in which they are named."""
    monkeypatch.setattr(patching, "BLOCK_ELEMENTS", elements)
    base = Checkpoint.open(tiny_base)
    shard = base.shard_of(WEIGHT)
    names = [name for name in base.names if base.shard_of(name) == shard][::-1]
    assert len(names) > 1
    written = write_patched(base, Exact(tmp_path), {n: each_row(torch.neg) for n in names})
    assert written.rewritten == (shard,) and written.tensors.keys() == set(names)
    found = Checkpoint.open(tmp_path)
    for name in base.names:
        assert torch.equal(found.read(name), base.read(name) * (-1 if name in names else 1))


# --- From a place that is not here --------------------------------------------------------------


@pytest.mark.parametrize("at_most", [7, 1 << 26])
def test_from_afar_the_copy_is_the_same(
    at_most: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_base = shutil.copytree(tiny_base, tmp_path / "base")
    (new(tiny_base / "additional_chat_templates") / "tool.jinja").write_text("{}")
    other = "model.layers.3.mlp.up_proj.weight"
    patches = {name: each_row(torch.neg) for name in (WEIGHT, other)}
    here = write_patched(Checkpoint.open(tiny_base), LocalSink(new(tmp_path / "a")), patches)
    far = Elsewhere(tiny_base)
    base = Checkpoint.open(far)
    monkeypatch.setattr(patching, "pieces", partial(pieces, at_most=at_most))
    far.reads.clear()
    there = write_patched(base, LocalSink(new(tmp_path / "b")), patches)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert here == there
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "b").iterdir() if path.is_file())
    # What is replaced is read once, to add to it; what is passed on, once; shards not as a whole.
    assert len(set(far.reads)) == len(far.reads)
    assert not set(far.opened) & set(there.rewritten)
    for shard in there.rewritten:
        assert sum(size for name, _, size in far.reads if name == shard) == far.size(shard)


@pytest.mark.parametrize("at_most", [1, 3, 100])
def test_pieces_are_the_file_with_the_edits_in_it(at_most: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(20)))
    for ranges in ([], [(0, 20)], [(0, 5), (5, 5), (12, 1)], [(3, 4), (19, 1)], [(7, 0)]):
        expected = bytearray(range(20))
        edits = []
        for offset, size in ranges:
            for start in range(offset, offset + size, 2):
                raw = bytes(min(2, offset + size - start))
                expected[start : start + len(raw)] = raw
                edits.append((start, memoryview(raw)))
        far = Elsewhere(tmp_path)
        found = list(pieces(File(far, "file"), ranges, iter(edits), at_most=at_most))
        assert b"".join(found) == expected
        assert all(0 < size <= at_most for _, _, size in far.reads)
        assert sum(size for _, _, size in far.reads) == 20 - sum(size for _, size in ranges)


def test_a_file_that_changes_meanwhile_stops_the_copy(tiny_base: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(Elsewhere(shutil.copytree(tiny_base, tmp_path / "base")))
    os.truncate(tmp_path / "base" / base.shard_of(WEIGHT), 1000)
    with pytest.raises(InputError, match="shorter"):
        write_patched(base, LocalSink(new(tmp_path / "out")), {WEIGHT: each_row(torch.neg)})


def test_an_existing_file_is_not_overwritten(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("someone's")
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be written.*exists"):
        write_patched(Checkpoint.open(plain), LocalSink(tmp_path), {"w": each_row(torch.neg)})
    assert (tmp_path / "a.safetensors").read_text() == "someone's"
