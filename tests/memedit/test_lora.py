"""Adapters: the best low-rank form of an update, and what PEFT makes of the two files."""

from __future__ import annotations

import json
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from memedit.architecture import architecture_of
from memedit.errors import InputError, NumericalError
from memedit.lora import LoraFactors, low_rank, save_lora, updates_of_lora
from memedit.solve import Update
from tests.tiny import DENSE, HIDDEN, tiny_model

# Of PEFT's own making, about an attribute of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

FAMILIES = ("llama", "gpt2", "gpt_neox", "gptj")


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_update(
    edits: int, outputs: int, inputs: int, *, layer: int = 0, dense: bool = False, scale: float = 1
) -> Update:
    """Random factors; `edits` is the rank also where the update is dense."""
    left_NO = random_matrix(edits, outputs, seed=layer) * scale
    right_NI = random_matrix(edits, inputs, seed=layer + 100)
    if dense:
        return Update(layer=layer, left_NO=right_NI.T @ left_NO, right_NI=None)
    return Update(layer=layer, left_NO=left_NO, right_NI=right_NI)


def best_error(delta_OI: Tensor, rank: int) -> float:
    """‖Δ - Δ_R‖ / ‖Δ‖ of the nearest matrix of that rank, from the singular values of Δ."""
    values = torch.linalg.svdvals(delta_OI)
    return float(values[rank:].norm() / values.norm())


def distance(update: Update, factors: LoraFactors) -> float:
    delta_OI = update.delta_OI
    product_OI = factors.B_OR.double() @ factors.A_RI.double()
    return float((delta_OI - product_OI).norm() / delta_OI.norm())


sizes = st.integers(1, 12)


@settings(deadline=None, max_examples=200)
@given(
    edits=sizes, outputs=sizes, inputs=sizes, limit=st.integers(1, 14), dense=st.booleans(),
    seed=st.integers(0, 2**20), decay=st.sampled_from([0.0, 0.5, 2.0]),
)  # fmt: skip
def test_no_matrix_of_that_rank_is_nearer(
    edits: int, outputs: int, inputs: int, limit: int, dense: bool, seed: int, decay: float
) -> None:
    weight_N1 = (-decay * torch.arange(edits)).exp().double()[:, None]
    left_NO, right_NI = random_matrix(edits, outputs, seed=seed), random_matrix(edits, inputs)
    left_NO = left_NO * weight_N1
    update = (
        Update(layer=0, left_NO=right_NI.T @ left_NO, right_NI=None)
        if dense
        else Update(layer=0, left_NO=left_NO, right_NI=right_NI)
    )
    factors = low_rank(update, limit=limit, dtype=torch.float64)
    rank = min(limit, outputs, inputs) if dense else min(edits, limit, outputs, inputs)
    assert factors.A_RI.shape == (rank, inputs)
    assert factors.B_OR.shape == (outputs, rank)
    assert factors.rank == rank
    assert distance(update, factors) == pytest.approx(best_error(update.delta_OI, rank), abs=1e-7)
    assert factors.truncation_error == pytest.approx(distance(update, factors), abs=1e-12)


@pytest.mark.parametrize("edits", [1, 5, 32, 40])
def test_the_rank_is_the_number_of_edits_and_then_the_form_is_exact(edits: int) -> None:
    update = random_update(edits, 32, 64)
    factors = low_rank(update, limit=100, dtype=torch.float64)
    assert factors.rank == min(edits, 32)
    torch.testing.assert_close(factors.B_OR @ factors.A_RI, update.delta_OI, atol=1e-11, rtol=0)
    assert factors.truncation_error < 1e-13


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 64), (64, 32)])
def test_singular_values_are_split_evenly_in_falling_order(
    dense: bool, outputs: int, inputs: int
) -> None:
    update = random_update(9, outputs, inputs, dense=dense, scale=1e4)
    factors = low_rank(update, limit=6, dtype=torch.float64)
    values = torch.linalg.svdvals(update.delta_OI)[:6]
    for gram in (factors.A_RI @ factors.A_RI.T, factors.B_OR.T @ factors.B_OR):
        torch.testing.assert_close(gram, torch.diag(values), rtol=1e-6, atol=1e-6 * values[0])


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (torch.float64, 0.0, 1e-14),
        (torch.float32, 1e-9, 1e-7),
        (torch.float16, 1e-5, 1e-3),
        (torch.bfloat16, 1e-4, 1e-2),
    ],
)
def test_the_error_is_that_of_what_is_stored(dtype: torch.dtype, low: float, high: float) -> None:
    update = random_update(4, 32, 64)
    factors = low_rank(update, limit=8, dtype=dtype)
    assert factors.A_RI.dtype == factors.B_OR.dtype == dtype
    assert low <= factors.truncation_error < high
    assert factors.truncation_error == pytest.approx(distance(update, factors), rel=1e-9)


def test_the_error_does_not_depend_on_the_pieces_it_is_measured_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dense in (False, True):
        update = random_update(9, 32, 64, dense=dense)
        whole = low_rank(update, limit=3).truncation_error
        monkeypatch.setattr("memedit.lora._CHUNK", 300)
        assert low_rank(update, limit=3).truncation_error == pytest.approx(whole, rel=1e-12)
        monkeypatch.undo()


@pytest.mark.parametrize("dense", [False, True])
def test_a_zero_update_has_no_error(dense: bool) -> None:
    update = random_update(4, 32, 64, dense=dense, scale=0)
    factors = low_rank(update, limit=8)
    assert factors.truncation_error == 0.0
    assert not factors.B_OR.double().matmul(factors.A_RI.double()).any()
    assert factors.A_RI.isfinite().all()


def test_equal_edits_leave_a_rank_that_is_not_used() -> None:
    once = random_update(3, 32, 64)
    assert once.right_NI is not None
    twice = Update(layer=0, left_NO=once.left_NO.repeat(2, 1), right_NI=once.right_NI.repeat(2, 1))
    factors = low_rank(twice, limit=8)
    assert factors.rank == 6
    assert factors.truncation_error < 1e-7


@pytest.mark.parametrize("dense", [False, True])
def test_equal_updates_give_equal_bits_and_the_sign_is_fixed(dense: bool) -> None:
    first = low_rank(random_update(9, 32, 64, dense=dense), limit=4)
    again = low_rank(random_update(9, 32, 64, dense=dense), limit=4)
    assert torch.equal(first.A_RI, again.A_RI)
    assert torch.equal(first.B_OR, again.B_OR)
    # A factorisation that differs by the signs of both factors comes out as the same adapter.
    update = random_update(9, 32, 64, dense=dense)
    right_NI = None if update.right_NI is None else -update.right_NI
    turned = low_rank(Update(layer=0, left_NO=-update.left_NO, right_NI=right_NI), limit=4)
    sign = -1 if dense else 1  # a dense one is the opposite update
    torch.testing.assert_close(turned.B_OR, first.B_OR, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned.A_RI, first.A_RI * sign, rtol=1e-4, atol=1e-5)
    for factors in (first, turned):
        assert (factors.B_OR.amax(dim=0) == factors.B_OR.abs().amax(dim=0)).all()


def test_updates_that_cannot_be_stored_are_refused() -> None:
    update = random_update(4, 32, 64)
    with pytest.raises(InputError, match="at least 1"):
        low_rank(update, limit=0)
    with pytest.raises(NumericalError, match="float16"):
        low_rank(random_update(4, 32, 64, scale=1e12), limit=8, dtype=torch.float16)
    for dense in (False, True):
        broken = random_update(4, 32, 64, layer=7, dense=dense)
        broken.left_NO[0, 0] = torch.nan
        with pytest.raises(NumericalError, match="layer 7 holds NaN"):
            low_rank(broken, limit=8)


@pytest.mark.parametrize(
    ("outputs", "inputs", "edits", "dense", "decomposed"),
    [
        (32, 64, 5, False, [("svd", 5)]),
        (64, 32, 5, False, [("svd", 5)]),
        (32, 64, 40, False, [("eigh", 32), ("svd", 3)]),
        (64, 32, 40, False, [("eigh", 32), ("svd", 3)]),
        (32, 64, 9, True, [("eigh", 32), ("svd", 3)]),
        (64, 32, 9, True, [("eigh", 32), ("svd", 3)]),
    ],
)
def test_no_more_is_decomposed_than_the_edits_or_the_smaller_side(
    outputs: int,
    inputs: int,
    edits: int,
    dense: bool,
    decomposed: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int]] = []

    def recorded(name: str) -> Any:
        function = getattr(torch.linalg, name)

        def call(matrix: Tensor, **options: Any) -> Any:
            assert matrix.shape[0] == matrix.shape[1]
            calls.append((name, len(matrix)))
            return function(matrix, **options)

        return call

    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, recorded(name))
    low_rank(random_update(edits, outputs, inputs, dense=dense), limit=3)
    assert calls == decomposed


# What PEFT makes of it.


def add(model: nn.Module, updates: Mapping[str, Update], *, conv1d: bool) -> nn.Module:
    """The full checkpoint's weights, in memory."""
    for module, update in updates.items():
        weight = model.get_parameter(f"{module}.weight")
        delta = update.delta_OI.T if conv1d else update.delta_OI
        weight.data.copy_(weight.double() + delta)
    return model


def adapted(model: nn.Module) -> list[str]:
    prefix = "base_model.model."
    return [
        name.removeprefix(prefix)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def load(base: nn.Module, folder: Path) -> PeftModel:
    """With PEFT's warnings (keys that do not fit, another `fan_in_fan_out`) as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(base, folder).eval()


IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.double()


def edit(
    name: str, ranks: Mapping[int, int], *, limit: int = 100, dense: bool = False, **changes: Any
) -> tuple[dict[str, Update], dict[str, LoraFactors], bool]:
    """Random updates of some layers of a tiny model, large enough to be seen in its logits."""
    arch = architecture_of(tiny_model(name, **changes).config)
    inputs, outputs = arch.widths(tiny_model(name, **changes))
    updates = {
        arch.weight_name(layer).removesuffix(".weight"): random_update(
            rank, outputs, inputs, layer=layer, dense=dense, scale=0.05
        )
        for layer, rank in ranks.items()
    }
    factors = {module: low_rank(update, limit=limit) for module, update in updates.items()}
    return updates, factors, arch.family.conv1d


def check_like(model: nn.Module, expected: nn.Module, base: nn.Module) -> None:
    found, wanted, before = logits(model), logits(expected), logits(base)
    moved = float((wanted - before).abs().max())
    assert moved > 0.05
    assert float((found - wanted).abs().max()) < 1e-4 * moved


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_peft_says_what_the_full_checkpoint_says(name: str, dense: bool, tmp_path: Path) -> None:
    updates, factors, conv1d = edit(name, {1: 3, 2: 3}, dense=dense)
    save_lora(tmp_path, factors, base_model="tiny", fan_in_fan_out=conv1d)
    model = load(tiny_model(name), tmp_path)
    full = add(tiny_model(name), updates, conv1d=conv1d)
    assert adapted(model) == list(updates)
    check_like(model, full, tiny_model(name))
    merged = model.merge_and_unload()
    check_like(merged, full, tiny_model(name))
    for key, weight in full.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_truncated_adapter_does_what_its_updates_say(name: str, tmp_path: Path) -> None:
    updates, factors, conv1d = edit(name, {0: 12, 2: 12}, limit=5)
    assert all(0.1 < part.truncation_error < 1 for part in factors.values())
    assert all(part.rank == 5 for part in factors.values())
    save_lora(tmp_path, factors, base_model="tiny", fan_in_fan_out=conv1d)
    applied = updates_of_lora(factors)
    assert {m: u.layer for m, u in applied.items()} == {m: u.layer for m, u in updates.items()}
    assert all(update.left_NO.dtype == torch.float64 for update in applied.values())
    model = load(tiny_model(name), tmp_path)
    check_like(model, add(tiny_model(name), applied, conv1d=conv1d), tiny_model(name))
    exact = add(tiny_model(name), updates, conv1d=conv1d)
    assert float((logits(model) - logits(exact)).abs().max()) > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_may_differ_from_layer_to_layer(name: str, tmp_path: Path) -> None:
    updates, factors, conv1d = edit(name, {0: 2, 1: 7, 3: 4})
    save_lora(tmp_path, factors, base_model="tiny", fan_in_fan_out=conv1d)
    model = load(tiny_model(name), tmp_path)
    layers = [model.get_base_model().get_submodule(module) for module in updates]
    assert [layer.r["default"] for layer in layers] == [2, 7, 4]
    assert [layer.scaling["default"] for layer in layers] == [1, 1, 1]
    check_like(model, add(tiny_model(name), updates, conv1d=conv1d), tiny_model(name))


# From 20 modules on, PEFT shortens the list of targets by itself.
@pytest.mark.parametrize(
    ("depth", "layers"),
    [(13, (1, 2)), (13, (11,)), (24, (*range(1, 22), 23))],
    ids=["not 11 and 12", "not 1", "many"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_the_edited_modules_are_adapted(
    name: str, depth: int, layers: tuple[int, ...], tmp_path: Path
) -> None:
    changes = {"n_layer" if name == "gpt2" else "num_hidden_layers": depth}
    ranks = {layer: 1 + layer % 3 for layer in layers}
    updates, factors, conv1d = edit(name, ranks, **changes)
    save_lora(tmp_path, factors, base_model="tiny", fan_in_fan_out=conv1d)
    model = load(tiny_model(name, **changes), tmp_path)
    assert adapted(model) == list(updates)
    full = add(tiny_model(name, **changes), updates, conv1d=conv1d)
    check_like(model, full, tiny_model(name, **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_stored_in_half_does_what_its_updates_say(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    updates, _, conv1d = edit("llama", {1: 3})
    factors = {m: low_rank(update, limit=8, dtype=dtype) for m, update in updates.items()}
    save_lora(tmp_path, factors, base_model="tiny", fan_in_fan_out=conv1d)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    full = add(tiny_model("llama"), updates_of_lora(factors), conv1d=conv1d)
    check_like(load(tiny_model("llama"), tmp_path), full, tiny_model("llama"))


def test_the_adapter_works_on_a_base_in_half(tmp_path: Path) -> None:
    updates, factors, conv1d = edit("llama", {1: 3, 2: 3})
    save_lora(tmp_path, factors, base_model="tiny", fan_in_fan_out=conv1d)
    half = torch.bfloat16
    found = logits(load(tiny_model("llama", dtype=half), tmp_path))
    wanted = logits(add(tiny_model("llama", dtype=half), updates, conv1d=conv1d))
    before = logits(tiny_model("llama", dtype=half))
    # Two roundings of the same model: the weights' in one, the outputs' in the other.
    assert (found - wanted).norm() < 0.1 * (wanted - before).norm()


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def test_the_config_and_the_tensors_are_those_of_peft(tmp_path: Path) -> None:
    _, factors, _ = edit("gpt2", {1: 2, 3: 4})
    folder = tmp_path / "made" / "here"
    save_lora(folder, factors, base_model="org/model", fan_in_fan_out=True)
    config = config_of(folder)
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/model",
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"transformer.h.1.mlp.c_proj": 2},
        "alpha_pattern": {"transformer.h.1.mlp.c_proj": 2},
        "target_modules": ["transformer.h.1.mlp.c_proj", "transformer.h.3.mlp.c_proj"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
        "inference_mode": True,
    }
    assert {name: config[name] for name in wanted} == wanted
    tensors = load_file(folder / "adapter_model.safetensors")
    for module, part in factors.items():
        assert torch.equal(tensors.pop(f"base_model.model.{module}.lora_A.weight"), part.A_RI)
        assert torch.equal(tensors.pop(f"base_model.model.{module}.lora_B.weight"), part.B_OR)
    assert not tensors
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert files == {"adapter_config.json": 0o644, "adapter_model.safetensors": 0o644}


def test_equal_factors_give_equal_files(tmp_path: Path) -> None:
    _, factors, _ = edit("llama", {1: 2, 3: 4})
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_lora(folder, factors, base_model="tiny", fan_in_fan_out=False)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("s3://bucket/models/base", "s3://bucket/models/base"),
        ("s3://AKIAKEY:secret@bucket/models/base", "s3://bucket/models/base"),
        ("s3://AKIAKEY:sec/ret+x@bucket/models/base", "s3://bucket/models/base"),
        ("s3://AKIAKEY:sec@ret@bucket/models/base", "s3://bucket/models/base"),
        ("https://user@host/base", "https://host/base"),
        ("https://host:8080/base@v1?revision=2", "https://host:8080/base@v1?revision=2"),
        ("s3://bucket/base@v1", "s3://bucket/base@v1"),
        ("https://host/m?X-Amz-Signature=abc&versionId=3&token=x#top", "https://host/m?versionId=3#top"),
        ("s3://bucket/m?access_key=a&secret_key=b", "s3://bucket/m"),
        ("https://host/m?sv=2024&sig=abc", "https://host/m?sv=2024"),
        ("/models/a@b?token=1", "/models/a@b?token=1"),
        ("org/Modell-ü", "org/Modell-ü"),
    ],
)  # fmt: skip
def test_credentials_are_left_out_and_nothing_else(
    given: str, written: str, tmp_path: Path
) -> None:
    _, factors, _ = edit("llama", {1: 2})
    save_lora(tmp_path, factors, base_model=given, fan_in_fan_out=False)
    assert config_of(tmp_path)["base_model_name_or_path"] == written


def test_factors_that_make_no_adapter_are_refused(tmp_path: Path) -> None:
    good = low_rank(random_update(2, HIDDEN, 8), limit=4)
    half = low_rank(random_update(2, HIDDEN, 8), limit=4, dtype=torch.bfloat16)
    bent = LoraFactors(layer=0, A_RI=good.A_RI[:1], B_OR=good.B_OR, truncation_error=0.0)
    for factors in ({}, {"a": good, "b": half}, {"a": bent}):
        with pytest.raises(ValueError):
            save_lora(tmp_path / "out", factors, base_model="tiny", fan_in_fan_out=False)
    assert not (tmp_path / "out").exists()
