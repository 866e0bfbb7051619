"""The stages of an edit after the statistics: z vectors, layer updates, evaluation.

Each cuts its work into units, hands them to an executor and puts the results together, so one
process and a cluster run the same code. Units depend on the input only, not on the workers. Knows
the method's order of steps; does not know files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memedit.config import EvaluationSettings, SolveSettings, TargetSettings
from memedit.drift import DriftReference
from memedit.errors import NumericalError
from memedit.evaluate import evaluation_of, with_side_effects
from memedit.executor import Executor, Failed
from memedit.free_text import Sample
from memedit.memory import is_out_of_memory, release_memory, trim_memory
from memedit.moments import SecondMoment
from memedit.outcome import Evaluation, FactResult, MomentSummary
from memedit.progress import Progress
from memedit.prompts import EncodedRequest
from memedit.reduction import reduce_rows
from memedit.requests import EditRequest
from memedit.side_effects import Part, side_effect_parts, side_effects_of
from memedit.solve import (
    LayerProblem,
    Method,
    MomentFactor,
    SummedProblem,
    Update,
    factors_are_cheaper,
)
from memedit.tally import held_units
from memedit.targets import Target, default_tokens_per_batch, whole_batches

_BATCHES_PER_UNIT = 2
FACTS_PER_KEY_UNIT = 64
FACTS_PER_SCORE_UNIT = 64


def once(executor: Executor, method: str, *arguments: Any) -> Any:
    """The last item of one call on any worker."""
    *_, (_, item) = executor.map(method, [arguments])
    return item


def find_targets(
    executor: Executor,
    requests: Sequence[EncodedRequest],
    *,
    layer: int,
    settings: TargetSettings,
    known: Mapping[str, Target],
    keep: Callable[[Target], None],
    progress: Progress,
) -> tuple[list[Target], dict[str, str]]:
    """The z vector of each request, in their order (MEMIT, Eq. 16), and which have none.

    A fact that cannot be optimised, or whose worker dies each time, is found by halving the unit
    that it is in, and left out with its reason (by case id); the others go on.

    Args:
        executor: Where the work is done.
        requests: Encoded facts.
        layer: The last edited layer.
        settings: See `TargetSettings`.
        known: Targets found before, by case id; they are not computed again.
        keep: Called with each new target as soon as it is found, so that a stopped run loses none.
        progress: Told of each target.
    """
    progress.start("targets", total=len(requests), unit="facts")
    found = {r.request.case_id: known[r.request.case_id] for r in requests if _id(r) in known}
    if found:
        progress.advance("targets", len(found), reused=len(found))
    units = target_units(_missing(requests, found), settings)
    losses, done = 0.0, 0
    quarantined: dict[str, str] = {}
    while units:
        given, units = units, []

        def rest(unit: int, given: Sequence[Sequence[EncodedRequest]] = given) -> Any:
            missing = _missing(given[unit], found)
            return (missing, layer, settings) if missing else None

        calls = [(unit, layer, settings) for unit in given]
        for index, target in executor.map("targets", calls, copies=True, rest=rest, give_up=True):
            if isinstance(target, Failed):
                failed = _missing(given[index], found)
                if len(failed) == 1:
                    quarantined[_id(failed[0])] = target.reason
                    progress.message(f"fact {_id(failed[0])} is left out: {target.reason}")
                else:
                    middle = len(failed) // 2
                    units += [failed[:middle], failed[middle:]]
            elif target.case_id not in found:
                if not math.isfinite(target.losses[-1]) or not bool(target.z_O.isfinite().all()):
                    raise NumericalError(f"the z vector of fact {target.case_id} is not finite")
                found[target.case_id] = target
                keep(target)
                losses, done = losses + target.losses[-1], done + 1
                progress.advance("targets", 1, loss=losses / done)
    progress.finish("targets")
    # Another attempt at the same fact may have ended well meanwhile.
    quarantined = {case_id: why for case_id, why in quarantined.items() if case_id not in found}
    return [found[_id(r)] for r in requests if _id(r) in found], quarantined


def _missing(
    requests: Sequence[EncodedRequest], found: Mapping[str, Target]
) -> list[EncodedRequest]:
    return [request for request in requests if _id(request) not in found]


def target_units(
    requests: Sequence[EncodedRequest], settings: TargetSettings
) -> list[list[EncodedRequest]]:
    """Units of a few whole batches each, the widest facts first."""
    budget = settings.tokens_per_batch or default_tokens_per_batch(torch.device("cpu"))
    batches = whole_batches(requests, budget=budget)
    return [
        [request for batch in batches[start : start + _BATCHES_PER_UNIT] for request in batch]
        for start in range(0, len(batches), _BATCHES_PER_UNIT)
    ]


def _id(request: EncodedRequest) -> str:
    return request.request.case_id


@dataclass(frozen=True, kw_only=True)
class SolvedLayer:
    """The update of one layer, and how far the facts were from their targets before it."""

    update: Update
    residual_norm: float | None
    """Mean ‖z − h^L‖ over the facts, in the last sweep; None without z."""
    moment: MomentSummary


def solve_layers(
    executor: Executor,
    requests: Sequence[EncodedRequest],
    targets: Sequence[Target],
    *,
    moments: Mapping[int, SecondMoment],
    layers: tuple[int, ...],
    method: Method,
    settings: SolveSettings,
    protected: Mapping[int, SecondMoment] | None = None,
    protect_weight: float = 0.0,
    residual_scale: float,
    stored: Mapping[int, torch.dtype],
    device: torch.device,
    progress: Progress,
) -> list[SolvedLayer]:
    """Spread the residuals over the layers, from the lowest up (MEMIT, Eq. 14, 19 and 20).

    Each layer is solved with the keys and the states that the updates below it have left; the
    workers' models are edited in memory. In a further sweep they have a Δ' already, and what is
    asked for is the whole Δ that takes its place, so that λ weighs the sum of all sweeps: the
    residual then is R + Δ' K, what Δ' gives these keys besides what they still miss.

    Args:
        executor: Where keys are read and updates applied.
        requests: Encoded facts.
        targets: Their z vectors, in the same order.
        moments: The second moment of each layer; looked up once a sweep, and let go of.
        layers: The edited layers, ascending.
        method: The closed form.
        settings: See `SolveSettings`; λ is set.
        protected: The second moment C_p of keys that must keep their values, too; C is then
            C + protect_weight · C_p.
        protect_weight: See `ProtectSettings`.
        residual_scale: c where a block adds c times the rewrite module's output.
        stored: The dtype in which the checkpoint keeps each layer's weight. A layer sees the layers
            below it as they will be saved, and makes up for their rounding (where computing is at
            least as wide as storing).
        device: Where the solve runs, in float64.
        progress: Told of each layer.
    """
    if [target.case_id for target in targets] != [_id(request) for request in requests]:
        raise ValueError("the targets are not those of the requests, in their order")
    progress.start("solve", total=settings.sweeps * len(layers), unit="layers")
    if settings.sweeps > 1:
        executor.broadcast("keep", layers)
    z_NO = torch.stack([target.z_O for target in targets])
    units = [
        (start, requests[start : start + FACTS_PER_KEY_UNIT])
        for start in range(0, len(requests), FACTS_PER_KEY_UNIT)
    ]
    solved: dict[int, SolvedLayer] = {}
    for depth, layer in list(enumerate(layers)) * settings.sweeps:
        before = solved[layer].update if layer in solved else None
        share = 1 / (len(layers) - depth) / residual_scale
        moment = moments[layer]
        summary, matrices = moment.summary, [moment.value_II]
        del moment  # its sum is as large as its value
        if protected is not None:
            also = protected[layer]
            matrices[0].add_(also.sum_II, alpha=protect_weight / also.tokens)
            del also
        keys: _Factors | _Sums
        n, inputs = len(requests), len(matrices[0])
        cheaper = factors_are_cheaper(n, inputs, z_NO.shape[1])
        few = cheaper if settings.sums_above is None else n <= settings.sums_above
        if few or method.from_sums is None:
            keys = _factors(executor, units, z_NO, layer, layers[-1])
        else:
            keys = _sums(executor, units, z_NO, share, layer, layers[-1], inputs)
        solve = partial(
            _solve, method, keys, layer=layer, share=share, settings=settings, before=before
        )
        update: Update | None = None
        if device.type != "cpu":
            try:
                update = solve([matrices[0].to(device)], device)
            except RuntimeError as error:  # a worker's model may lie there too
                if not is_out_of_memory(error):
                    raise
                progress.message(
                    f"layer {layer} does not fit into {device}: on the CPU from now on"
                )
                device = torch.device("cpu")
            release_memory()
        if update is None:
            update = solve(matrices, device)
        executor.broadcast("apply", update, stored[layer], before is not None)
        norm = keys.residual_norm
        solved[layer] = SolvedLayer(update=update, residual_norm=norm, moment=summary)
        del keys, solve, matrices
        trim_memory()
        progress.advance("solve", 1, residual=norm)
    progress.finish("solve")
    return list(solved.values())


def _solve(
    method: Method,
    keys: _Factors | _Sums,
    matrices: list[Tensor],
    device: torch.device,
    *,
    layer: int,
    share: float,
    settings: SolveSettings,
    before: Update | None,
) -> Update:
    """The update of one layer; takes C out of `matrices`, since with a ridge there is another."""
    assert settings.lam is not None, "the defaults of every family set λ"
    factor = MomentFactor(matrices.pop(), ridge=settings.ridge, layer=layer)
    if isinstance(keys, _Sums):
        assert method.from_sums is not None, "or there would be factors"
        keys_II, residual_keys_OI = keys.keys_II.to(device), keys.residual_keys_OI.to(device)
        if before is not None:
            # K Kᵀ is symmetric: its rows are its columns.
            residual_keys_OI = residual_keys_OI + before.of_keys(keys_II).T
        summed = SummedProblem(
            layer=layer,
            keys_II=keys_II,
            residual_keys_OI=residual_keys_OI,
            moment_II=factor.moment_II,
            lam=settings.lam,
            null_threshold=settings.null_threshold,
        )
        return method.from_sums(summed).cpu()
    keys_NI, residuals_NO = keys.keys_NI.to(device), (keys.residuals_NO * share).to(device)
    if before is not None:
        residuals_NO = residuals_NO + before.of_keys(keys_NI)
    problem = LayerProblem(
        layer=layer,
        keys_NI=keys_NI,
        residuals_NO=residuals_NO,
        moment=factor,
        lam=settings.lam,
        null_threshold=settings.null_threshold,
    )
    return method.from_factors(problem).cpu()


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """Keys and residuals z − h^L of a few facts, float64, and the mean ‖z − h^L‖."""

    keys_NI: Tensor
    residuals_NO: Tensor
    residual_norm: float


def _factors(
    executor: Executor,
    units: Sequence[tuple[int, Sequence[EncodedRequest]]],
    z_NO: Tensor,
    layer: int,
    last_layer: int,
) -> _Factors:
    """Keys [N, I] and z − h^L [N, O] of all facts."""
    calls = [(*unit, layer, last_layer) for unit in units]
    parts = dict(executor.map("keys", calls, sticky=True))
    keys_NI = torch.cat([parts[i].keys_NI for i in range(len(units))]).double()
    current_NO = torch.cat([parts[i].current_NO for i in range(len(units))]).double()
    if not bool(keys_NI.isfinite().all() and current_NO.isfinite().all()):
        raise NumericalError(f"the keys of layer {layer} are not finite")
    residuals_NO = z_NO.double() - current_NO
    return _Factors(
        keys_NI=keys_NI,
        residuals_NO=residuals_NO,
        residual_norm=float(residuals_NO.norm(dim=1).mean()),
    )


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Σ k kᵀ and Σ r kᵀ over all facts, float64, and the mean ‖z − h^L‖."""

    keys_II: Tensor
    residual_keys_OI: Tensor
    residual_norm: float


def _sums(
    executor: Executor,
    units: Sequence[tuple[int, Sequence[EncodedRequest]]],
    z_NO: Tensor,
    share: float,
    layer: int,
    last_layer: int,
    inputs: int,
) -> _Sums:
    """What the closed form needs of many facts; workers add, and nobody holds the keys of all."""
    executor.broadcast("forget", "keys")
    norms: dict[int, float] = {}
    calls = {
        # A view would take the z vectors of all facts along to each worker.
        start: (start, facts, z_NO[start : start + len(facts)].clone(), share, layer, last_layer)
        for start, facts in units
    }
    missing = list(calls)
    while True:
        added = executor.map("sum_keys", [calls[start] for start in missing], sticky=True)
        norms |= {start: norm for _, (start, norm) in added}
        held = executor.broadcast("held", "keys")
        missing = sorted(calls.keys() - held_units(held))
        if missing:  # a worker has died, and with it what it had added
            continue
        keys_II = reduce_rows(executor, held, "keys", "keys", (inputs, inputs))
        if keys_II is None:
            continue
        shape = (z_NO.shape[1], inputs)
        residual_keys_OI = reduce_rows(executor, held, "keys", "residuals", shape)
        if residual_keys_OI is None:
            continue
        executor.broadcast("forget", "keys")
        return _Sums(
            keys_II=keys_II,
            residual_keys_OI=residual_keys_OI,
            residual_norm=sum(norms[start] for start in calls) / len(z_NO),
        )


def said(executor: Executor, requests: Sequence[EncodedRequest]) -> dict[str, bool]:
    """Whether the workers' model says the new object of each fact, by case id."""
    size = FACTS_PER_SCORE_UNIT
    units = [(requests[i : i + size],) for i in range(0, len(requests), size)]
    return dict(item for _, item in executor.map("said", units, copies=True))


def judge(
    executor: Executor,
    requests: Sequence[EditRequest],
    *,
    heldout: Sequence[Sequence[int]],
    reference: DriftReference | None,
    settings: EvaluationSettings,
    progress: Progress,
    elsewhere: Sequence[str] = (),
) -> tuple[Evaluation, DriftReference]:
    """All metrics of the workers' model on a batch of facts, and the base's distributions.

    `heldout`, `elsewhere`, `reference` and `settings` are those of
    `memedit.side_effects.side_effect_parts`. A reference that an earlier call gave brings its
    sample of facts for free text, so that facts that were left out since do not make it another
    one.
    """
    progress.start("evaluate", total=len(requests), unit="facts")
    size = FACTS_PER_SCORE_UNIT
    units = [(requests[i : i + size], settings) for i in range(0, len(requests), size)]
    results: dict[str, FactResult] = {}

    def rest(unit: int) -> Any:
        missing = [request for request in units[unit][0] if request.case_id not in results]
        return (missing, settings) if missing else None

    for _, result in executor.map("score", units, copies=True, rest=rest):
        if result.case_id not in results:
            progress.advance("evaluate", 1)
        results[result.case_id] = result
    facts = [results[request.case_id] for request in requests]
    progress.finish("evaluate")

    sample = (reference and reference.sample) or Sample.of(requests, settings)
    parts = side_effect_parts(
        requests,
        heldout=heldout,
        elsewhere=elsewhere,
        reference=reference,
        sample=sample,
        settings=settings,
    )
    measured = _measured(executor, parts, progress)
    effects = side_effects_of(parts, measured, reference, sample)
    return (
        evaluation_of(
            with_side_effects(facts, requests, effects), effects.metrics, effects.intervals
        ),
        effects.reference,
    )


def _measured(executor: Executor, parts: Sequence[Part], progress: Progress) -> list[Any]:
    """What comes out of each part; a part is done by any worker."""
    found: dict[int, Any] = {}
    if not parts:
        return []
    progress.start("evaluate", total=len(parts), unit="measures")
    for index, result in executor.map("damage", [(part,) for part in parts]):
        if index not in found:
            progress.advance("evaluate", 1)
        found[index] = result
    progress.finish("evaluate")
    return [found[index] for index in range(len(parts))]
