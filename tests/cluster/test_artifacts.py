"""Finished work is found again by what made it, whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cluster.artifacts
from cluster.artifacts import Artifacts, moment_digest, target_digest
from memedit.config import MomentSettings, TargetSettings
from memedit.errors import InputError
from memedit.moments import SecondMoment, Spread
from memedit.requests import EditRequest
from memedit.targets import Target

DIGEST = "ab" * 32
REQUEST = EditRequest(
    case_id="1", subject="Rome", prompt="{} is in", target_new="Spain", target_true="Italy"
)


def a_moment() -> SecondMoment:
    generator = torch.Generator().manual_seed(0)
    keys_TI = torch.randn(20, 6, generator=generator).double()
    spread = Spread(
        batches=3,
        mean_SS=torch.randn(4, 4, generator=generator).double(),
        squares_SS=torch.rand(4, 4, generator=generator).double(),
    )
    return SecondMoment(layer=5, sum_II=keys_TI.T @ keys_TI, tokens=20, trace_0=1.25, spread=spread)


def a_target(case_id: str = "fact") -> Target:
    return Target(
        case_id=case_id,
        z_O=torch.linspace(-1, 1, 7),
        h_norm=2.5,
        delta_norm=0.1 + 0.2,
        losses=(3.0, 1 / 3),
        converged=True,
    )


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "cache")


def test_a_second_moment_comes_back(artifacts: Artifacts) -> None:
    assert artifacts.moment(DIGEST) is None
    moment = a_moment()
    artifacts.keep_moment(DIGEST, moment)
    found = artifacts.moment(DIGEST)
    assert found is not None
    assert torch.equal(found.sum_II, moment.sum_II) and found.sum_II.dtype == torch.float64
    assert (found.layer, found.tokens, found.trace_0) == (5, 20, 1.25)
    assert found.spread.error == moment.spread.error


def test_a_target_comes_back_under_the_name_of_this_run(artifacts: Artifacts) -> None:
    assert artifacts.target(DIGEST, "fact") is None
    artifacts.keep_target(DIGEST, a_target())
    found = artifacts.target(DIGEST, "another name")
    assert found is not None and torch.equal(found.z_O, a_target().z_O)
    assert (found.case_id, found.h_norm, found.delta_norm) == ("another name", 2.5, 0.1 + 0.2)
    assert (found.losses, found.converged) == ((3.0, 1 / 3), True)


def test_windows_come_back(artifacts: Artifacts) -> None:
    assert artifacts.windows(DIGEST) is None
    artifacts.keep_windows(DIGEST, [[1, 2, 3], [4, 5, 6]])
    assert artifacts.windows(DIGEST) == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_damaged_counts_as_not_kept(artifacts: Artifacts, damage: bytes) -> None:
    """As after a power cut: the work is done again and kept again."""
    artifacts.keep_moment(DIGEST, a_moment())
    artifacts.keep_target(DIGEST, a_target())
    artifacts.keep_windows(DIGEST, [[1]])
    for file in artifacts.folder.rglob("*.safetensors"):
        file.write_bytes(damage)
    assert artifacts.moment(DIGEST) is None
    assert artifacts.target(DIGEST, "fact") is None
    assert artifacts.windows(DIGEST) is None
    artifacts.keep_target(DIGEST, a_target())
    assert artifacts.target(DIGEST, "fact") is not None


def test_a_file_appears_whole_or_not_at_all(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, **rest: Any) -> None:
        path.write_bytes(b"half a file")
        assert artifacts.target(DIGEST, "fact") is None
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cluster.artifacts, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        artifacts.keep_target(DIGEST, a_target())
    assert artifacts.target(DIGEST, "fact") is None
    assert not [path for path in artifacts.folder.rglob("*") if path.is_file()]


# --- Digests ------------------------------------------------------------------------------------


def a_moment_digest(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "model": "m",
        "corpus": "c",
        "settings": MomentSettings(),
        "layer": 5,
        "weight_name": "model.layers.5.mlp.down_proj.weight",
        "layers": (5, 6),
        "dtype": "float32",
    }
    return moment_digest(**arguments | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "n"},
        {"corpus": "d"},
        {"settings": MomentSettings(tokens=1)},
        {"settings": MomentSettings(window=16)},
        {"settings": MomentSettings(seed=1)},
        {"settings": MomentSettings(position_0="exclude")},
        {"layer": 6},
        {"weight_name": "model.layers.5.self_attn.o_proj.weight"},
        {"dtype": "bfloat16"},
    ],
)
def test_what_changes_a_second_moment_changes_its_digest(changes: dict[str, Any]) -> None:
    assert a_moment_digest() == a_moment_digest()
    assert a_moment_digest(**changes) != a_moment_digest()


def test_layers_collected_together_matter_only_where_they_stop_together() -> None:
    stopping = MomentSettings(tolerance=0.01)
    assert a_moment_digest(layers=(5,)) == a_moment_digest()
    assert a_moment_digest(layers=(5,), settings=stopping) != a_moment_digest(settings=stopping)


def a_target_digest(request: EditRequest = REQUEST, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "model": "m",
        "contexts": ("{}", "So. {}"),
        "settings": TargetSettings(),
        "layer": 9,
        "dtype": "float32",
        "architecture": {},
    }
    return target_digest(request, **arguments | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "n"},
        {"contexts": ("{}",)},
        {"settings": TargetSettings(steps=3)},
        {"settings": TargetSettings(kl_factor=0)},
        {"layer": 8},
        {"dtype": "bfloat16"},
        {"architecture": {"head": "model.embed_out"}},
    ],
)
def test_what_changes_a_z_vector_changes_its_digest(changes: dict[str, Any]) -> None:
    assert a_target_digest(**changes) != a_target_digest()


CHANGES: dict[str, tuple[Callable[[EditRequest], EditRequest], bool]] = {
    "subject": (lambda r: replace(r, subject="Roma"), True),
    "prompt": (lambda r: replace(r, prompt="{} lies in"), True),
    "target_new": (lambda r: replace(r, target_new="France"), True),
    "target_true": (lambda r: replace(r, target_true="Peru"), False),
    "case_id": (lambda r: replace(r, case_id="2"), False),
    "paraphrases": (lambda r: replace(r, paraphrases=("Rome?",)), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_only_what_is_optimised_matters_of_a_fact(name: str) -> None:
    change, matters = CHANGES[name]
    assert (a_target_digest(change(REQUEST)) != a_target_digest()) == matters


def test_what_killed_runs_have_left_goes_after_a_day(artifacts: Artifacts) -> None:
    artifacts.keep_target(DIGEST, a_target())
    folder = artifacts.folder / "targets" / DIGEST[:2]
    old, young = folder / "old.partial", folder / "young.partial"
    for partial in (old, young):
        partial.touch()
    two_days_ago = time.time() - 2 * 86_400
    os.utime(old, (two_days_ago, two_days_ago))
    artifacts.keep_target(DIGEST, a_target())
    assert not old.exists() and young.exists()
    assert artifacts.target(DIGEST, "fact") is not None
