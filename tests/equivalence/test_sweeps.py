"""A further sweep over the layers, against the same written out; and what the models hold then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memedit.config import SolveSettings
from memedit.executor import Executor, InlineExecutor
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from memedit.moments import SecondMoment
from memedit.progress import Silent
from memedit.solve import METHODS, Update
from memedit.stages import SolvedLayer, solve_layers
from memedit.targets import Target
from tests.memedit.made_edits import made_moments, made_targets
from tests.memedit.test_devices import LAYERS_EDITED, _requests
from tests.tiny import HIDDEN, INNER, save_tiny

LAM = 5.0
SCALE = 0.5


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    torch.set_num_threads(1)
    return ModelSpec(files=LocalFiles(save_tiny(tmp_path_factory.mktemp("sweeps"))))


@pytest.fixture(scope="module")
def moments() -> dict[int, SecondMoment]:
    return made_moments(LAYERS_EDITED, scale=1 / 8)


@pytest.fixture(scope="module")
def targets() -> list[Target]:
    return made_targets(_requests())


def solved(
    executor: Executor,
    targets: list[Target],
    moments: dict[int, SecondMoment],
    sweeps: int,
    *,
    method: str = "memit",
    sums_above: int | None = None,
    stored: torch.dtype = torch.float32,
) -> list[SolvedLayer]:
    return solve_layers(
        executor,
        _requests(),
        targets,
        moments=moments,
        layers=LAYERS_EDITED,
        method=METHODS[method],  # type: ignore[index]
        settings=SolveSettings(
            lam=LAM, sweeps=sweeps, sums_above=sums_above, null_threshold=0.06, ridge=0.01
        ),
        residual_scale=SCALE,
        stored=dict.fromkeys(LAYERS_EDITED, stored),
        device=torch.device("cpu"),
        progress=Silent(),
    )


def written_out(
    executor: Executor,
    first: list[SolvedLayer],
    targets: list[Target],
    moments: dict[int, SecondMoment],
) -> list[Tensor]:
    """Σ λ‖Δ‖²_C + ‖Δ k − (r + Δ' k)‖² at its least, on a model that has Δ' already."""
    found = []
    for depth, one in enumerate(first):
        layer, before_OI = one.update.layer, one.update.delta_OI
        calls = [(0, _requests(), layer, LAYERS_EDITED[-1])]
        ((_, keys),) = executor.map("keys", calls)
        K_NI = keys.keys_NI.double()
        z_NO = torch.stack([target.z_O for target in targets]).double()
        share = (len(first) - depth) * SCALE
        R_NO = (z_NO - keys.current_NO.double()) / share + K_NI @ before_OI.T
        C_II = moments[layer].value_II.clone()
        C_II += 0.01 * C_II.diagonal().mean() * torch.eye(INNER, dtype=torch.float64)
        A_II = LAM * C_II + K_NI.T @ K_NI
        delta_OI = torch.linalg.solve(A_II, K_NI.T @ R_NO).T
        change = Update(layer=layer, left_NO=(delta_OI - before_OI).T, right_NI=None)
        executor.broadcast("apply", change, torch.float32)
        found.append(delta_OI)
    return found


@pytest.mark.parametrize("sums_above", [None, 0])
def test_the_second_sweep_is_the_closed_form_of_the_whole_update(
    spec: ModelSpec,
    targets: list[Target],
    moments: dict[int, SecondMoment],
    sums_above: int | None,
) -> None:
    with InlineExecutor(spec) as executor:
        first = solved(executor, targets, moments, 1)
        expected = written_out(executor, first, targets, moments)
    with InlineExecutor(spec) as executor:
        both = solved(executor, targets, moments, 2, sums_above=sums_above)
    assert [one.update.layer for one in both] == list(LAYERS_EDITED)
    for one, true_OI, before in zip(both, expected, first, strict=True):
        assert (one.update.delta_OI - true_OI).norm() <= 1e-5 * true_OI.norm()
        assert (before.update.delta_OI - true_OI).norm() > 1e-2 * true_OI.norm()
    # What the first layer finds in the second sweep is what the first one has left.
    assert both[0].residual_norm is not None and first[0].residual_norm is not None
    assert both[0].residual_norm < first[0].residual_norm


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit"])
def test_the_models_hold_the_whole_update_rounded_once(
    spec: ModelSpec, targets: list[Target], moments: dict[int, SecondMoment], method: str
) -> None:
    with InlineExecutor(spec) as executor:
        found = solved(executor, targets, moments, 3, method=method, stored=torch.bfloat16)
        assert executor._worker is not None
        held = [executor._worker._weight(layer).clone() for layer in LAYERS_EDITED]
        executor.broadcast("load", spec)
        for one, weight in zip(found, held, strict=True):
            executor.broadcast("apply", one.update, torch.bfloat16)
            assert torch.equal(executor._worker._weight(one.update.layer), weight)


def test_a_pass_that_was_ahead_begins_anew(spec: ModelSpec) -> None:
    """As that of a unit which another worker had for some layers of the second sweep."""
    first, last = LAYERS_EDITED
    generator = torch.Generator().manual_seed(9)

    def update(layer: int) -> Update:
        left_IO = torch.randn(INNER, HIDDEN, generator=generator).double() / 50
        return Update(layer=layer, left_NO=left_IO, right_NI=None)

    def keys(executor: Executor, layer: int) -> Tensor:
        ((_, found),) = executor.map("keys", [(0, _requests(), layer, last)])
        keys_NI: Tensor = found.keys_NI
        return keys_NI

    before, anew, above = update(first), update(first), update(last)
    with InlineExecutor(spec) as executor:
        executor.broadcast("keep", LAYERS_EDITED)
        keys(executor, first)
        executor.broadcast("apply", before, torch.float32)
        old_NI = keys(executor, last)
        executor.broadcast("apply", above, torch.float32)
        executor.broadcast("apply", anew, torch.float32, True)
        found_NI = keys(executor, last)
    with InlineExecutor(spec) as executor:
        executor.broadcast("apply", anew, torch.float32)
        true_NI = keys(executor, last)
    assert (found_NI - true_NI).norm() <= 1e-5 * true_NI.norm()
    assert (old_NI - true_NI).norm() > 1e-2 * true_NI.norm()
