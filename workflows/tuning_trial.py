"""One trial of a search: the base edited with some facts under some settings, and judged.

What a trial finds of z vectors and statistics is kept, so one that shares them with an earlier
trial need not find them again. Knows how settings become metrics and ranks; does not know which
settings are tried (`memedit.search`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch

from cluster.artifacts import Artifacts
from memedit.config import EditSettings, EvaluationSettings
from memedit.drift import DriftReference
from memedit.errors import InputError, MemeditError, NumericalError
from memedit.evaluate import leave_out
from memedit.executor import Executor
from memedit.memory import is_out_of_memory, release_memory
from memedit.outcome import Evaluation
from memedit.requests import EditRequest
from memedit.search import Proposal, Rank, values_of
from memedit.stages import judge
from workflows.editing import Editing, editing_for, target_digests
from workflows.gates import Gate
from workflows.metrics import METRIC
from workflows.moments import TokenSource, load_stats
from workflows.progress import Timed
from workflows.protection import prompts_for_drift
from workflows.session import Base, encode_fact
from workflows.tuning_settings import TuneJob
from workflows.wording import plural

_NEARER = 0.05
"""In nats a token; what is nearer than this to being said is so by chance."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Some settings, and what came of them."""

    number: int
    moved: str
    """What differs from the best settings before; empty for those that the search begins with."""
    settings: EditSettings
    evaluation: Evaluation | None = None
    seconds: float = 0.0
    """For all of it, the evaluation too."""
    z_found: int = 0
    z_reused: int = 0
    failed: str | None = None
    """Why there is no evaluation."""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """The facts for which no z was found, each with the reason; then the trial failed."""

    def summary(self) -> dict[str, Any]:
        """Without the judgements of single facts."""
        found = self.evaluation
        return {
            "trial": self.number,
            "moved": self.moved,
            "settings": values_of(self.settings),
            "metrics": None if found is None else dict(found.metrics),
            "intervals": {} if found is None else {n: list(p) for n, p in found.intervals.items()},
            "seconds": self.seconds,
            "z_found": self.z_found,
            "z_reused": self.z_reused,
            "failed": self.failed,
        }


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where trials are made: the base, its workers, and what is kept."""

    job: TuneJob
    base: Base
    contexts: tuple[str, ...]
    executor: Executor
    artifacts: Artifacts
    source: TokenSource
    progress: Timed

    def half(self, requests: Sequence[EditRequest], settings: EvaluationSettings) -> Half:
        """Facts to try settings on; the base is judged on them now."""
        windows = self.source.heldout(self.executor, self.progress)
        before, reference = judge(
            self.executor,
            requests,
            heldout=windows,
            elsewhere=prompts_for_drift(
                requests, windows, self.base.tokenizer, self.base.positions, settings
            ),
            reference=None,
            settings=settings,
            progress=self.progress,
        )
        return Half(
            bench=self,
            requests=requests,
            evaluation=settings,
            windows=windows,
            before=before,
            reference=reference,
        )

    def editing(self, requests: Sequence[EditRequest], settings: EditSettings) -> Editing:
        """The method with these settings, ready to begin; its layers are sound."""
        base, job, names = self.base, self.job, self.base.checkpoint.names
        base.checkpoint.check_editable(base.arch.checkpoint_key(i, names) for i in settings.layers)
        self.executor.broadcast("probe", settings.layers)
        return editing_for(
            requests,
            self.source,
            base=base,
            settings=settings,
            contexts=self.contexts,
            executor=self.executor,
            artifacts=self.artifacts,
            progress=self.progress,
            given=load_stats(job.stats, base, settings, self.artifacts) if job.stats else None,
        )


@dataclass(frozen=True, kw_only=True)
class Half:
    """Facts that settings are tried on, each time from the base."""

    bench: Bench
    requests: Sequence[EditRequest]
    evaluation: EvaluationSettings
    windows: Sequence[Sequence[int]]
    """Held-out text."""
    before: Evaluation
    """Of the base."""
    reference: DriftReference

    def tried(self, proposal: Proposal, number: int) -> Trial:
        """What comes of some settings; what goes wrong is told by the trial.

        Raises:
            InputError: The settings that the search begins with cannot be used at all.
        """
        bench, settings = self.bench, proposal.settings
        began = time.perf_counter()
        trial = Trial(number=number, moved=proposal.moved, settings=settings)
        try:
            editing = bench.editing(self.requests, settings)
            encoded = [encode_fact(each, bench.base, editing.contexts) for each in self.requests]
            digests = target_digests(self.requests, editing.contexts, bench.base, settings)
            reused = len(bench.artifacts.kept_targets(digests.values()))
            trial = replace(trial, z_reused=reused, z_found=len(digests) - reused)
            targets, quarantined = editing.targets(encoded)
            if quarantined:
                trial = replace(trial, quarantined=quarantined)
                case_id, why = next(iter(quarantined.items()))
                raise NumericalError(
                    f"{plural(len(quarantined), 'fact')} left out: {why} ({case_id})"
                )
            editing.install(editing.solve(encoded, targets))
            after, _ = judge(
                bench.executor,
                self.requests,
                heldout=self.windows,
                reference=self.reference,
                settings=self.evaluation,
                progress=bench.progress,
            )
            if useless := _useless(after.metrics, bench.job.objective):
                raise NumericalError(useless)
            trial = replace(trial, evaluation=after)
        except (MemeditError, RuntimeError) as error:
            trial = replace(trial, failed=_reason(error, first=number == 1))
        finally:
            bench.executor.broadcast("load", bench.base.spec())
        return replace(trial, seconds=time.perf_counter() - began)

    def begun(self, start: EditSettings, number: int) -> tuple[Half, Trial]:
        """The first trial; with `on_bad_row: skip` on the half without facts that have no z then.

        Raises:
            InputError: The settings cannot be used at all, or no fact has a z.
        """
        proposal = Proposal(settings=start, moved="")
        trial = self.tried(proposal, number)
        if not trial.quarantined or self.bench.job.on_bad_row == "fail":
            return self, trial
        rest = self.without(trial.quarantined)
        self.bench.progress.message(trial.failed or "")
        again = rest.tried(proposal, number)
        return rest, replace(
            again,
            seconds=trial.seconds + again.seconds,
            z_found=trial.z_found,
            z_reused=trial.z_reused,
        )

    def without(self, case_ids: Collection[str]) -> Half:
        """The half without some of its facts.

        Raises:
            InputError: None is left.
        """
        left = tuple(each for each in self.requests if each.case_id not in case_ids)
        if not left:
            raise InputError(
                "no z vector was found for any fact of a half",
                source=self.bench.job.facts,
                field="facts",
            )
        return replace(self, requests=left, before=leave_out(self.before, case_ids))

    def rank(self, trial: Trial) -> Rank | None:
        """How good a trial is; None where it failed.

        As long as gates are missed, by fewer of them and then by less: the sum of their shortfalls
        |value - bound|, each in units of its metric's noise. Else the objective decides, then the
        facts that are really said, then drift, each rounded to multiples of its metric's noise, so
        that most of what chance moves ranks equal. Where no fact is said, the nearest to it decides
        in place of drift, which would choose the edit that does nothing.
        """
        found, job = trial.evaluation, self.bench.job
        if found is None or _useless(found.metrics, job.objective):
            return None
        missed = [gate for gate in job.gates if self.missed(gate, trial)]
        if missed:
            return (-len(missed), -sum(self._short(gate, found.metrics) for gate in missed))
        decide = [job.objective, "efficacy_exact"]
        if found.metrics["efficacy_exact"]:
            decide.append("drift_kl")
            nearest = 0.0
        else:
            nearest = fmean(fact.logprob_new for fact in found.facts) / _NEARER
        values = (*(_in_noise(key, found.metrics) or 0 for key in decide), nearest)
        return (0, *map(round, values))

    def missed(self, gate: Gate, trial: Trial) -> str | None:
        """Why a trial does not meet a gate; None if it does."""
        metrics: Mapping[str, float | None] = trial.evaluation.metrics if trial.evaluation else {}
        return gate.check(metrics, {"base": self.before.metrics})

    def _short(self, gate: Gate, metrics: Mapping[str, float | None]) -> float:
        """How far a gate is from being met, in units of noise; without end where nobody knows."""
        value, bound = metrics[gate.metric], gate.bound({"base": self.before.metrics})
        if value is None or bound is None or not math.isfinite(value):
            return math.inf
        return abs(value - bound) / METRIC[gate.metric].noise


def _useless(metrics: Mapping[str, float | None], objective: str) -> str | None:
    """Why a model cannot be ranked by what was measured of it; None if it can."""
    if metrics[objective] is None:
        return f"{objective} was not measured"
    ruined = [key for key in (objective, "drift_kl") if not math.isfinite(metrics[key] or 0)]
    return f"the edit ruined the model: {ruined[0]} is {metrics[ruined[0]]}" if ruined else None


def _in_noise(key: str, metrics: Mapping[str, float | None]) -> float | None:
    """A metric as a multiple of its noise, the more the better; None where it was not measured."""
    metric, value = METRIC[key], metrics[key]
    if value is None or not math.isfinite(value):
        return None
    return value / metric.noise * (1 if metric.higher_is_better else -1)


def _reason(error: Exception, *, first: bool) -> str:
    """What a trial says of its error.

    Raises:
        Exception: That error, if no other settings would mend it.
    """
    if isinstance(error, MemeditError):
        if first and isinstance(error, InputError):
            raise error
        return str(error)
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and is_out_of_memory(error)
    ):
        release_memory()
        return f"out of memory: {str(error).splitlines()[0]}"
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return str(error).splitlines()[0]
    raise error
