"""The closed form: the textbook formula, both ways of computing it, and when there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memedit.errors import NumericalError
from memedit.solve import (
    LayerProblem,
    MomentFactor,
    SummedProblem,
    Update,
    factors_are_cheaper,
    null_projection,
    solve_alphaedit,
    solve_device,
    solve_emmet,
    solve_from_factors,
    solve_from_sums,
    sum_alphaedit,
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


def _summed(problem: LayerProblem) -> SummedProblem:
    return SummedProblem(
        layer=problem.layer,
        keys_II=problem.keys_NI.T @ problem.keys_NI,
        residual_keys_OI=problem.residuals_NO.T @ problem.keys_NI,
        moment_II=problem.moment.moment_II,
        lam=problem.lam,
        null_threshold=problem.null_threshold,
    )


def _sums(problem: LayerProblem) -> Update:
    return solve_from_sums(_summed(problem))


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


@pytest.mark.parametrize("edits", [1, 5, 16])
def test_emmet_holds_every_edit_exactly_at_the_least_cost(edits: int) -> None:
    problem = _problem(edits, 32, 8)
    C_II, K_NI, R_NO = problem.moment.moment_II, problem.keys_NI, problem.residuals_NO
    delta_OI = solve_emmet(problem).delta_OI
    torch.testing.assert_close(K_NI @ delta_OI.T, R_NO)
    # A change that moves no edited key costs more: it is orthogonal to Δ in the norm of C.
    change_OI = torch.randn(8, 32, dtype=torch.float64)
    change_OI -= change_OI @ torch.linalg.pinv(K_NI) @ K_NI
    torch.testing.assert_close(
        (change_OI @ C_II * delta_OI).sum(), torch.tensor(0.0).double(), atol=1e-8, rtol=0
    )
    assert change_OI.norm() > 1


def test_emmet_is_memit_without_lambda_and_rome_for_one_edit() -> None:
    weak = _problem(3, 32, 8, lam=1e-9)
    torch.testing.assert_close(
        solve_emmet(weak).delta_OI, solve_from_factors(weak).delta_OI, rtol=1e-5, atol=1e-6
    )
    one = _problem(1, 32, 8)
    k_I, r_O = one.keys_NI[0], one.residuals_NO[0]
    direction_I = torch.linalg.solve(one.moment.moment_II, k_I)
    rome_OI = torch.outer(r_O, direction_I) / (direction_I @ k_I)
    torch.testing.assert_close(solve_emmet(one).delta_OI, rome_OI)


def test_more_exact_edits_than_inputs_cannot_be() -> None:
    with pytest.raises(NumericalError, match="layer 5: keys of some are the same"):
        solve_emmet(_problem(40, 16, 8))


def test_facts_with_one_key_cannot_both_hold_and_a_ridge_lets_them_share() -> None:
    problem = _problem(6, 32, 8)
    problem.keys_NI[4] = problem.keys_NI[1] * (1 + 1e-13)
    with pytest.raises(NumericalError, match="layer 5: keys of some are the same"):
        solve_emmet(problem)
    moment = MomentFactor(problem.moment.moment_II, ridge=1e-6, layer=5)
    written = problem.keys_NI @ solve_emmet(replace(problem, moment=moment)).delta_OI.T
    wanted = problem.residuals_NO.clone()
    wanted[[1, 4]] = (wanted[1] + wanted[4]) / 2
    torch.testing.assert_close(written, wanted, rtol=1e-3, atol=1e-3)


def _with_null_space(problem: LayerProblem, size: int) -> LayerProblem:
    """The same with a C that is next to nothing in `size` random directions."""
    inputs = problem.keys_NI.shape[1]
    basis_II, _ = torch.linalg.qr(torch.randn(inputs, inputs, dtype=torch.float64))
    values_I = torch.linspace(1, 2, inputs, dtype=torch.float64)
    values_I[:size] = 1e-3
    moment_II = basis_II @ values_I.diag() @ basis_II.T
    return replace(problem, moment=MomentFactor((moment_II + moment_II.T) / 2, layer=5))


@pytest.mark.parametrize("edits", [1, 7, 50])
def test_alphaedit_moves_nothing_outside_of_the_null_space(edits: int) -> None:
    problem = _with_null_space(_problem(edits, 24, 6), 10)
    P_II = null_projection(problem.moment.moment_II, 0.02, layer=5)
    torch.testing.assert_close(P_II @ P_II, P_II)
    assert round(float(P_II.trace())) == 10
    delta_OI = solve_alphaedit(problem).delta_OI
    torch.testing.assert_close(delta_OI @ P_II, delta_OI)
    torch.testing.assert_close(sum_alphaedit(_summed(problem)).delta_OI, delta_OI)
    # The optimum of ‖Δ P K − R‖² + λ ‖Δ P‖²: its gradient is zero.
    K_NI = problem.keys_NI @ P_II
    gradient_OI = (K_NI @ delta_OI.T - problem.residuals_NO).T @ K_NI + problem.lam * delta_OI
    assert gradient_OI.norm() <= 1e-8 * (problem.residuals_NO.T @ K_NI).norm()


def test_without_a_null_space_alphaedit_says_so() -> None:
    with pytest.raises(NumericalError, match=r"layer 5 has no eigenvalue below 0\.02.*threshold"):
        solve_alphaedit(_problem(3, 16, 4))


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


def test_an_update_of_keys_is_that_of_the_dense_change() -> None:
    generator = torch.Generator().manual_seed(3)
    keys_NI, left_NO, right_NI = (
        torch.randn(n, width, generator=generator, dtype=torch.float64)
        for n, width in ((4, 6), (3, 5), (3, 6))
    )
    factored = Update(layer=0, left_NO=left_NO, right_NI=right_NI)
    dense = Update(layer=0, left_NO=factored.delta_OI.T, right_NI=None)
    for update in (factored, dense):
        torch.testing.assert_close(update.of_keys(keys_NI), keys_NI @ factored.delta_OI.T)
