"""The file of an update: bit by bit what was saved, or an error that names file and tensor."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from memedit import delta
from memedit.delta import DELTA_NAME, load_delta, save_delta
from memedit.errors import InputError, NumericalError
from memedit.solve import Update

FACTORED, DENSE = "model.layers.1.mlp.down_proj.weight", "model.layers.11.mlp.down_proj.weight"
# MKL gives other last bits of the product for a right factor by columns than for one by rows here.
N, O, I = 10, 32, 128  # noqa: E741


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_columns(matrix: Tensor) -> Tensor:
    """Equal, but laid out as the solve returns its matrices."""
    return matrix.T.contiguous().T


def some_updates() -> dict[str, Update]:
    right_NI = by_columns(random_matrix(N, I, seed=1))
    return {
        FACTORED: Update(layer=1, left_NO=random_matrix(N, O), right_NI=right_NI),
        DENSE: Update(layer=11, left_NO=by_columns(random_matrix(I, O, seed=2)), right_NI=None),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / DELTA_NAME


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "_CHUNK_BYTES", 1000)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.int64), right.contiguous().view(torch.int64))


@pytest.mark.parametrize("chunks", ["small", "whole"])
def test_the_round_trip_keeps_every_bit_of_factors_and_of_delta(
    path: Path, chunks: str, request: pytest.FixtureRequest
) -> None:
    if chunks == "small":
        request.getfixturevalue("small_chunks")
    saved = some_updates()
    saved[FACTORED].left_NO[0, 0] = -0.0
    saved[FACTORED].left_NO[0, 1] = 5e-324
    save_delta(path, saved)
    loaded = load_delta(path)
    assert list(loaded) == [FACTORED, DENSE]
    for key, update in saved.items():
        assert loaded[key].layer == update.layer
        assert loaded[key].delta_OI.shape == (O, I)
        assert same_bits(loaded[key].left_NO, update.left_NO)
        assert same_bits(loaded[key].delta_OI, update.delta_OI)
    assert loaded[DENSE].right_NI is None
    assert same_bits(loaded[FACTORED].right_NI, saved[FACTORED].right_NI)


def test_the_layout_comes_back_because_the_bits_of_a_product_depend_on_it(path: Path) -> None:
    rows, columns = random_matrix(N, I, seed=1), by_columns(random_matrix(N, I, seed=1))
    left_NO = random_matrix(N, O)
    updates = {
        f"layer{n}": Update(layer=n, left_NO=left_NO, right_NI=right_NI)
        for n, right_NI in enumerate((rows, columns))
    }
    save_delta(path, updates)
    loaded = load_delta(path)
    for key, update in updates.items():
        assert loaded[key].left_NO.stride() == update.left_NO.stride()
        assert loaded[key].right_NI.stride() == update.right_NI.stride()
        # BLAS libraries take kernels by alignment as well.
        assert loaded[key].right_NI.data_ptr() % 64 == update.right_NI.data_ptr() % 64 == 0


def test_a_view_into_something_larger_is_saved_alone(path: Path) -> None:
    large = random_matrix(2 * N, 2 * I)
    update = Update(layer=0, left_NO=random_matrix(N, O), right_NI=large[::2, ::2])
    save_delta(path, {FACTORED: update})
    assert same_bits(load_delta(path)[FACTORED].right_NI, large[::2, ::2])
    assert path.stat().st_size < 8 * (N * O + N * I) + 2000


def test_the_file_reads_with_the_formats_own_library(path: Path) -> None:
    updates = some_updates()
    save_delta(path, updates)
    tensors = load_file(path)
    assert set(tensors) == {f"{FACTORED}.left", f"{FACTORED}.right", f"{DENSE}.delta"}
    assert same_bits(
        tensors[f"{FACTORED}.left"].T @ tensors[f"{FACTORED}.right"],
        (updates[FACTORED].left_NO.T @ updates[FACTORED].right_NI.contiguous()),
    )
    assert tensors[f"{DENSE}.delta"].shape == (I, O)
    assert torch.equal(tensors[f"{DENSE}.delta"].T, updates[DENSE].delta_OI)
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["memedit_delta"])
    # The format wants tensors aligned in the file.
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0
    assert content["format_version"] == 1
    assert "[I, O]" in content["equations"]["delta"]
    assert content["updates"][FACTORED] == {"layer": 1, "order": {"left": "C", "right": "F"}}
    assert content["updates"][DENSE] == {"layer": 11, "order": {"delta": "F"}}


def test_equal_updates_give_equal_files(path: Path) -> None:
    save_delta(path, some_updates())
    first = path.read_bytes()
    save_delta(path, some_updates())
    assert path.read_bytes() == first


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("strict_umask")
def test_others_may_read_it_and_nothing_lies_beside_it(path: Path) -> None:
    save_delta(path, some_updates())
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_failed_write_leaves_what_was_there(
    path: Path, before: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is not None:
        path.write_bytes(before)
    listed = os.listdir(path.parent)

    def full(handle: int) -> None:
        assert len(os.listdir(path.parent)) == len(listed) + 1  # it is written beside
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space"):
        save_delta(path, some_updates())
    assert os.listdir(path.parent) == listed
    assert before is None or path.read_bytes() == before


def update_of(left: Tensor, right: Tensor | None = None, layer: int = 1) -> Update:
    return Update(layer=layer, left_NO=left, right_NI=right)


@pytest.mark.parametrize(
    ("updates", "kind"),
    [
        ({}, ValueError),
        ({"a": update_of(torch.ones(2, 3))}, ValueError),
        ({"a": update_of(torch.ones(3).double())}, ValueError),
        ({"a": update_of(torch.ones(0, 3).double())}, ValueError),
        ({"a": update_of(torch.ones(2, 3).double(), torch.ones(3, 4).double())}, ValueError),
        ({k: update_of(torch.ones(2, 3).double()) for k in "ab"}, ValueError),
        ({"a": update_of(torch.full((2, 3), torch.nan).double())}, NumericalError),
        ({"a": update_of(torch.full((2, 3), -torch.inf).double())}, NumericalError),
    ],
    ids=["none", "float32", "vector", "empty", "ranks", "layer twice", "NaN", "infinity"],
)
def test_what_could_not_be_read_is_not_written(
    path: Path, updates: dict[str, Update], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        save_delta(path, updates)
    assert not path.exists()


Tensors = dict[str, Tensor]
Content = dict[str, Any]


def tampered(path: Path, change: Callable[[Tensors, Content], object]) -> None:
    """A good file whose tensors and metadata were changed, still sound as a safetensors file."""
    save_delta(path, some_updates())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["memedit_delta"])
    change(tensors, content)
    save_file(tensors, path, metadata={"memedit_delta": json.dumps(content)})


def put(tensors: Tensors, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors[name] = change(tensors[name]).contiguous()


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_put(
        (torch.tensor(len(t) - 1), torch.tensor(0)), torch.tensor(value).double()
    )


def in_update(content: Content, key: str, **changes: Any) -> None:
    content["updates"][key].update(changes)


LEFT, RIGHT, WHOLE = f"{FACTORED}.left", f"{FACTORED}.right", f"{DENSE}.delta"
META = "__metadata__.memedit_delta"
HOSTILE: dict[str, tuple[Callable[[Tensors, Content], object], str, str]] = {
    "missing left": (lambda t, c: t.pop(LEFT), LEFT, "lacks"),
    "missing right": (lambda t, c: t.pop(RIGHT), RIGHT, "lacks"),
    "missing delta": (lambda t, c: t.pop(WHOLE), WHOLE, "lacks"),
    "extra": (lambda t, c: t.update(more=torch.ones(1)), "more", "no update"),
    "factors and delta": (
        lambda t, c: t.update({f"{FACTORED}.delta": torch.ones(I, O).double()}),
        f"{FACTORED}.delta",
        "no update",
    ),
    "undescribed": (lambda t, c: c["updates"].pop(DENSE), WHOLE, "no update"),
    "float32": (lambda t, c: put(t, LEFT, Tensor.float), LEFT, "F32"),
    "integers": (lambda t, c: put(t, WHOLE, Tensor.long), WHOLE, "I64"),
    "other ranks": (lambda t, c: put(t, RIGHT, lambda x: x[1:]), RIGHT, "9 rows here and 10"),
    "transposed": (lambda t, c: put(t, LEFT, lambda x: x.T), RIGHT, "10 rows here and 32"),
    "a vector": (lambda t, c: put(t, RIGHT, Tensor.flatten), RIGHT, "matrix"),
    "three axes": (lambda t, c: put(t, WHOLE, lambda x: x[None]), WHOLE, "matrix"),
    "empty": (lambda t, c: put(t, WHOLE, lambda x: x[:0]), WHOLE, "matrix"),
    "NaN": (lambda t, c: put(t, RIGHT, with_value(torch.nan)), RIGHT, "NaN"),
    "infinity": (lambda t, c: put(t, LEFT, with_value(torch.inf)), LEFT, "NaN or an inf"),
    "minus infinity": (lambda t, c: put(t, WHOLE, with_value(-torch.inf)), WHOLE, "NaN or an inf"),
    "newer": (lambda t, c: c.update(format_version=2), f"{META}.format_version", "format 2"),
    "true": (lambda t, c: c.update(format_version=True), f"{META}.format_version", "format True"),
    "no version": (lambda t, c: c.pop("format_version"), f"{META}.format_version", "format None"),
    "no updates": (lambda t, c: c.update(updates={}), f"{META}.updates", "entry"),
    "a list": (lambda t, c: c.update(updates=[1]), f"{META}.updates", "object"),
    "a text": (lambda t, c: c["updates"].update({DENSE: "x"}), f"updates.{DENSE}.layer", "layer"),
    "layer as text": (lambda t, c: in_update(c, DENSE, layer="1"), f"{DENSE}.layer", "number"),
    "layer true": (lambda t, c: in_update(c, DENSE, layer=True), f"{DENSE}.layer", "number"),
    "layer below 0": (lambda t, c: in_update(c, DENSE, layer=-1), f"{DENSE}.layer", "number"),
    "layer twice": (lambda t, c: in_update(c, DENSE, layer=1), f"{DENSE}.layer", "two updates"),
    "half": (lambda t, c: in_update(c, DENSE, order={"left": "C"}), f"{DENSE}.order", "delta"),
    "order Z": (lambda t, c: in_update(c, DENSE, order={"delta": "Z"}), f"{DENSE}.order", "C or F"),
    "order []": (lambda t, c: in_update(c, DENSE, order={"delta": []}), f"{DENSE}.order", "C or F"),
    "no order": (lambda t, c: in_update(c, DENSE, order=None), f"{DENSE}.order", "C or F"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("small_chunks")
def test_a_hostile_file_is_refused_with_file_and_tensor(path: Path, name: str) -> None:
    change, field, reason = HOSTILE[name]
    tampered(path, change)
    with pytest.raises(InputError) as caught:
        load_delta(path)
    assert caught.value.source == path
    assert caught.value.field is not None
    assert caught.value.field.endswith(field)
    assert reason in caught.value.message


def test_a_file_that_was_only_saved_again_is_taken(path: Path) -> None:
    tampered(path, lambda tensors, content: None)
    assert list(load_delta(path)) == [FACTORED, DENSE]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "not a delta file"),
        ({"format": "pt"}, "not a delta file"),
        ({"memedit_delta": "{"}, "not JSON"),
        ({"memedit_delta": "[" * 100_000}, "not JSON"),
        ({"memedit_delta": '{"format_version": 1, "format_version": 1}'}, "occurs twice"),
        ({"memedit_delta": '{"format_version": ' + "9" * 5000 + "}"}, "not JSON"),
        ({"memedit_delta": "[1]"}, "format None"),
    ],
)
def test_metadata_of_something_else_are_refused(
    path: Path, metadata: Mapping[str, str] | None, reason: str
) -> None:
    save_file(
        {LEFT: torch.ones(1, 1).double()}, path, metadata=dict(metadata) if metadata else None
    )
    with pytest.raises(InputError, match=reason) as caught:
        load_delta(path)
    assert caught.value.source == path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b"PK\3\4" + bytes(100), "damaged"),
        (struct.pack("<Q", 2**62) + b"{}", "damaged"),
        (struct.pack("<Q", 2) + b"{}", "not a delta file"),
    ],
)
def test_something_else_than_safetensors_is_refused(
    path: Path, content: bytes, reason: str
) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        load_delta(path)


def test_no_file_and_a_folder_are_refused(path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_delta(path)
    path.mkdir()
    with pytest.raises(InputError, match="not a file"):
        load_delta(path)


def test_a_truncated_or_longer_file_is_refused(path: Path) -> None:
    save_delta(path, some_updates())
    good = path.read_bytes()
    for length in [*range(0, 1500, 7), *range(1500, len(good), 997), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(InputError):
            load_delta(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(InputError):
        load_delta(path)


def test_damage_of_the_header_is_an_input_error_or_harmless(path: Path) -> None:
    save_delta(path, some_updates())
    good = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", good[:8])
    chance, refused = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(good)
        damaged[chance.randrange(8 + header_bytes)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            load_delta(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 200
