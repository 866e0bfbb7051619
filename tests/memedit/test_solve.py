"""The closed form: the textbook formula, both ways of computing it, and when there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memedit.errors import NumericalError
from memedit.solve import (
    LayerProblem,
    MomentFactor,
    Update,
    factors_are_cheaper,
    solve_device,
    solve_from_factors,
    solve_from_sums,
)


def _problem(edits: int, inputs: int, outputs: int, lam: float = 3.0) -> LayerProblem:
    generator = torch.Generator().manual_seed(edits)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    samples = random(4 * inputs, inputs)
    return LayerProblem(
        layer=5,
        keys_NI=random(edits, inputs),
        residuals_NO=random(edits, outputs),
        moment=MomentFactor(samples.T @ samples / len(samples), layer=5),
        lam=lam,
    )


def _textbook(problem: LayerProblem) -> Tensor:
    K_IN, R_ON = problem.keys_NI.T, problem.residuals_NO.T
    return R_ON @ K_IN.T @ torch.linalg.inv(problem.lam * problem.moment.moment_II + K_IN @ K_IN.T)


def _sums(problem: LayerProblem) -> Update:
    return solve_from_sums(
        layer=problem.layer,
        keys_II=problem.keys_NI.T @ problem.keys_NI,
        residual_keys_OI=problem.residuals_NO.T @ problem.keys_NI,
        moment_II=problem.moment.moment_II,
        lam=problem.lam,
    )


@given(st.integers(1, 60), st.integers(2, 24), st.integers(1, 12), st.floats(0.01, 1e4))
def test_factors_and_sums_are_the_textbook_formula(
    edits: int, inputs: int, outputs: int, lam: float
) -> None:
    problem = _problem(edits, inputs, outputs, lam)
    expected = _textbook(problem)
    for update in (solve_from_factors(problem), _sums(problem)):
        assert update.layer == 5
        assert (update.delta_OI - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize(("edits", "factored"), [(2, True), (200, False)])
def test_the_cheaper_form_is_taken(edits: int, factored: bool) -> None:
    assert factors_are_cheaper(edits, 32, 16) is factored


def test_a_strong_prior_keeps_the_weight_and_a_weak_one_obeys_the_facts() -> None:
    strong = solve_from_factors(_problem(3, 32, 8, lam=1e9)).delta_OI
    assert strong.norm() < 1e-6
    weak = _problem(3, 32, 8, lam=1e-9)
    written = weak.keys_NI @ solve_from_factors(weak).delta_OI.T
    torch.testing.assert_close(written, weak.residuals_NO, rtol=1e-5, atol=1e-6)


def test_too_few_tokens_fail_loudly_and_a_ridge_helps() -> None:
    keys = torch.randn(4, 16, dtype=torch.float64)
    singular = keys.T @ keys / 4
    with pytest.raises(NumericalError, match="layer 7 is singular"):
        _ = MomentFactor(singular, layer=7).factor_II
    factor = MomentFactor(singular, ridge=1e-3, layer=7)
    assert bool(factor.solve(keys).isfinite().all())


def test_nan_is_never_solved() -> None:
    problem = _problem(2, 8, 4)
    problem.keys_NI[0, 0] = float("nan")
    with pytest.raises(NumericalError):
        solve_from_factors(problem)
    with pytest.raises(NumericalError):
        _sums(problem)


@pytest.mark.parametrize(
    ("wanted", "gpus", "expected"),
    [
        ("auto", 0, "cpu"),
        ("cuda", 0, "cpu"),  # the workers have GPUs, this machine has none
        ("auto", 1, "cuda"),
        ("cpu", 1, "cpu"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda:1", 1, "cuda"),
    ],
)
def test_a_gpu_solves_where_there_is_one(
    wanted: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert solve_device(wanted) == torch.device(expected)
