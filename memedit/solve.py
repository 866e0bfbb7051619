"""The closed forms of an edit: pure linear algebra in float64, one layer at a time.

With one edit per row, K [N, I] are keys, R [N, O] residuals and C [I, I] the second moment of the
keys that must keep their values. MEMIT (Eq. 14) asks for Δ = Rᵀ K (λ C + Kᵀ K)⁻¹, Δ [O, I]; its
relatives differ in how they weigh the two. Knows matrices; does not know models, prompts or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from memedit.config import MethodName
from memedit.errors import NumericalError


@dataclass(frozen=True, kw_only=True)
class Update:
    """The change of one weight as factors: delta_OI = left_NOᵀ · right_NI.

    With more edits than the smaller side of the weight, the factors are the dense delta and the
    identity's place is taken by `right_NI` being None: then left_NO is delta transposed, [I, O].
    """

    layer: int
    left_NO: Tensor
    right_NI: Tensor | None

    @property
    def delta_OI(self) -> Tensor:
        """The dense change, float64 [O, I]."""
        return self.left_NO.T if self.right_NI is None else self.left_NO.T @ self.right_NI

    def of_keys(self, keys_NI: Tensor) -> Tensor:
        """Δ k of each key, float64 [N, O], on the device of the keys, without the dense Δ."""
        left_NO = self.left_NO.to(keys_NI.device)
        if self.right_NI is None:
            return keys_NI @ left_NO
        return (keys_NI @ self.right_NI.to(keys_NI.device).T) @ left_NO

    def rows(self, start: int, stop: int, *, transposed: bool) -> Tensor:
        """Rows of Δ, float64 [stop - start, I]; or of Δᵀ, [stop - start, O], if `transposed`."""
        if self.right_NI is None:
            return self.left_NO[start:stop] if transposed else self.left_NO[:, start:stop].T
        if transposed:
            return self.right_NI[:, start:stop].T @ self.left_NO
        return self.left_NO[:, start:stop].T @ self.right_NI

    @classmethod
    def sum(cls, updates: Sequence[Update]) -> Update:
        """All of them together, which are of one layer and factored."""
        rights = [update.right_NI for update in updates]
        return cls(
            layer=updates[0].layer,
            left_NO=torch.cat([update.left_NO for update in updates]),
            right_NI=torch.cat([right_NI for right_NI in rights if right_NI is not None]),
        )

    def cpu(self) -> Update:
        """The same on the CPU."""
        right_NI = None if self.right_NI is None else self.right_NI.cpu()
        return Update(layer=self.layer, left_NO=self.left_NO.cpu(), right_NI=right_NI)


def solve_device(wanted: str) -> torch.device:
    """Where this process solves: on a GPU if it has one, unless the CPU is `wanted`."""
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda" if wanted == "auto" else wanted)
    # A worker's GPU may have a number that this machine lacks.
    seen = device.index is None or device.index < torch.cuda.device_count()
    return device if seen else torch.device("cuda")


class MomentFactor:
    """The Cholesky factor of C, computed once and kept: λ C needs only a scale of it.

    Args:
        moment_II: C, symmetric, any float dtype and device.
        ridge: Added to the diagonal as a fraction of its mean.
        layer: Named in errors.

    Raises (when it is first solved with, which solving from sums never does):
        NumericalError: C is not positive definite, that is, too few tokens were counted.
    """

    def __init__(self, moment_II: Tensor, *, ridge: float = 0.0, layer: int) -> None:
        self.moment_II, self.ridge = moment_II.double(), ridge
        if ridge:
            self.moment_II = self.moment_II.clone()
            self.moment_II.diagonal().add_(ridge * self.moment_II.diagonal().mean())
        self.layer = layer

    @cached_property
    def factor_II(self) -> Tensor:
        """Lower triangular; made when it is first needed, which solving from sums never does."""
        factor_II: Tensor
        factor_II, info = torch.linalg.cholesky_ex(self.moment_II)
        if int(info) != 0:
            raise NumericalError(
                f"the second moment of layer {self.layer} is singular (pivot {int(info)} of "
                f"{len(self.moment_II)}): count more tokens or set solve.ridge (1e-6, say)"
            )
        return factor_II

    def solve(self, rows_NI: Tensor) -> Tensor:
        """The product rows · C⁻¹, [N, I]."""
        solved_IN: Tensor = torch.cholesky_solve(rows_NI.T, self.factor_II)
        return solved_IN.T


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """What a method solves at one layer; all tensors float64 on one device.

    keys_NI, residuals_NO: one edit per row; the residual is the share of this layer already.
    `moment` is C with its factor, `lam` is λ, `null_threshold` is AlphaEdit's.
    """

    layer: int
    keys_NI: Tensor
    residuals_NO: Tensor
    moment: MomentFactor
    lam: float
    null_threshold: float = 0.02


@dataclass(frozen=True, kw_only=True)
class SummedProblem:
    """The same of so many edits that only sums over them are at hand.

    keys_II = Kᵀ K, residual_keys_OI = Rᵀ K, moment_II = C.
    """

    layer: int
    keys_II: Tensor
    residual_keys_OI: Tensor
    moment_II: Tensor
    lam: float
    null_threshold: float = 0.02


def factors_are_cheaper(edits: int, inputs: int, outputs: int) -> bool:
    """Compare the operations of the two forms, each with its Cholesky factor."""
    factors = inputs**3 / 3 + 2 * edits * inputs**2 + 2 * edits**2 * inputs + edits**3
    sums = inputs**3 / 3 + 2 * outputs * inputs**2 + 2 * edits * inputs * (inputs + outputs)
    return factors < sums


def solve_from_factors(problem: LayerProblem) -> Update:
    """Δ = Rᵀ K (λ C + Kᵀ K)⁻¹ (MEMIT, Eq. 14), with N right-hand sides only.

    By Woodbury it is Rᵀ (I + Y Kᵀ)⁻¹ Y with Y = K (λ C)⁻¹.
    """
    K_NI = problem.keys_NI
    Y_NI = problem.moment.solve(K_NI) / problem.lam
    G_NN = Y_NI @ K_NI.T
    G_NN.diagonal().add_(1)
    right_NI = torch.cholesky_solve(Y_NI, _cholesky((G_NN + G_NN.T) / 2, problem.layer))
    return Update(layer=problem.layer, left_NO=problem.residuals_NO, right_NI=right_NI)


def solve_from_sums(problem: SummedProblem) -> Update:
    """The same Δ = B A⁻¹ with A = λ C + Σ k kᵀ and B = Σ r kᵀ, which do not grow with the facts."""
    A_II = problem.lam * problem.moment_II + problem.keys_II
    delta_IO = torch.cholesky_solve(problem.residual_keys_OI.T, _cholesky(A_II, problem.layer))
    return Update(layer=problem.layer, left_NO=delta_IO, right_NI=None)


_LEAST_PIVOT = 1e-10
"""Of a key that is this near to the others, relative to its own size, nothing is left."""


def solve_emmet(problem: LayerProblem) -> Update:
    """Δ = Rᵀ (K C⁻¹ Kᵀ)⁻¹ K C⁻¹ (EMMET, arXiv 2403.14236): every edit holds exactly.

    With one edit it is ROME's update (arXiv 2202.05262). Of all Δ with Δ kᵢ = rᵢ it is the one
    with the least Δ C Δᵀ, and MEMIT's limit for λ → 0. A ridge is added to K C⁻¹ Kᵀ, too, as a
    fraction of its mean diagonal; then no edit holds exactly.

    Raises:
        NumericalError: The keys depend on each other: two facts have the same subject, or there are
            more than I.
    """
    Y_NI = problem.moment.solve(problem.keys_NI)
    G_NN = Y_NI @ problem.keys_NI.T
    G_NN = (G_NN + G_NN.T) / 2
    G_NN.diagonal().add_(problem.moment.ridge * G_NN.diagonal().mean())
    factor_NN, info = torch.linalg.cholesky_ex(G_NN)
    # Of equal keys rounding may leave a tiny pivot, and with it an enormous update.
    left_N = factor_NN.diagonal() ** 2 / G_NN.diagonal()
    if int(info) != 0 or not bool((left_N > _LEAST_PIVOT).all()):
        raise NumericalError(
            f"not every fact can hold exactly at layer {problem.layer}: keys of some are the same, "
            "as those of facts about one subject, or there are more facts than inputs; set "
            "solve.ridge (1e-3, say), or take memit"
        )
    right_NI = torch.cholesky_solve(Y_NI, factor_NN)
    return Update(layer=problem.layer, left_NO=problem.residuals_NO, right_NI=right_NI)


def null_projection(moment_II: Tensor, threshold: float, *, layer: int) -> Tensor:
    """P = U Uᵀ [I, I] over the eigenvectors U of C whose eigenvalues are below `threshold`.

    Keys of the corpus have almost nothing in that space, so that Δ P moves them by almost nothing
    (AlphaEdit, arXiv 2410.02355).

    Raises:
        NumericalError: There is no such eigenvector, so that nothing could be edited.
    """
    values_I, vectors_II = torch.linalg.eigh(moment_II)
    null_IJ: Tensor = vectors_II[:, values_I < threshold]
    if not null_IJ.shape[1]:
        raise NumericalError(
            f"the second moment of layer {layer} has no eigenvalue below {threshold:g} (the "
            f"smallest is {float(values_I[0]):.3g}): raise solve.null_threshold"
        )
    return null_IJ @ null_IJ.T


def solve_alphaedit(problem: LayerProblem) -> Update:
    """Δ = Rᵀ K P (P Kᵀ K P + λ I)⁻¹ (AlphaEdit), as Rᵀ (K P Kᵀ + λ I)⁻¹ K P."""
    moment_II = problem.moment.moment_II
    P_II = null_projection(moment_II, problem.null_threshold, layer=problem.layer)
    K_NI = problem.keys_NI @ P_II
    G_NN = K_NI @ K_NI.T
    G_NN.diagonal().add_(problem.lam)
    right_NI = torch.cholesky_solve(K_NI, _cholesky(G_NN, problem.layer))
    return Update(layer=problem.layer, left_NO=problem.residuals_NO, right_NI=right_NI)


def sum_alphaedit(problem: SummedProblem) -> Update:
    """The same from sums: B P (P Σ k kᵀ P + λ I)⁻¹."""
    P_II = null_projection(problem.moment_II, problem.null_threshold, layer=problem.layer)
    A_II = P_II @ problem.keys_II @ P_II
    A_II = (A_II + A_II.T) / 2
    A_II.diagonal().add_(problem.lam)
    projected_IO = P_II @ problem.residual_keys_OI.T
    delta_IO = torch.cholesky_solve(projected_IO, _cholesky(A_II, problem.layer))
    return Update(layer=problem.layer, left_NO=delta_IO, right_NI=None)


def _cholesky(matrix: Tensor, layer: int) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0 or not bool(factor.isfinite().all()):
        raise NumericalError(
            f"the system of layer {layer} is singular: raise λ or set solve.ridge (1e-6, say)"
        )
    return factor


@dataclass(frozen=True, kw_only=True)
class Method:
    """One closed form from a layer's problem to its update, in the two forms that it may have."""

    from_factors: Callable[[LayerProblem], Update]
    """From the keys and residuals of each fact."""
    from_sums: Callable[[SummedProblem], Update] | None
    """From sums over the facts; None where all keys are needed."""


_MEMIT = Method(from_factors=solve_from_factors, from_sums=solve_from_sums)
METHODS: dict[MethodName, Method] = {
    "memit": _MEMIT,
    "memedit": _MEMIT,  # differs in C and in what it asks for
    "emmet": Method(from_factors=solve_emmet, from_sums=None),
    "alphaedit": Method(from_factors=solve_alphaedit, from_sums=sum_alphaedit),
    "rome": Method(from_factors=solve_emmet, from_sums=None),  # one fact after another
}
"""The closed forms by the name of the method; fine-tuning has none."""
