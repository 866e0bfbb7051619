"""Which of two trials is the better one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from memedit.config import EditSettings, EvaluationSettings
from memedit.outcome import METRIC_KEYS, Evaluation, FactResult
from memedit.search import Rank
from workflows.metrics import METRIC
from workflows.tuning_settings import TuneJob
from workflows.tuning_trial import Half, Trial


def trial(*, logprob: float = -1.0, **metrics: float) -> Trial:
    fact = FactResult(
        case_id="a",
        prompt="p",
        target_new="new",
        efficacy_exact=False,
        generation=False,
        continuation="",
        logprob_new=logprob,
    )
    given = {"score": 80.0, "efficacy_exact": 90.0, "drift_kl": 0.1, "perplexity": 20.0} | metrics
    known: dict[str, float | None] = dict.fromkeys(METRIC_KEYS)
    found = Evaluation(metrics=known | given, facts=(fact,))
    return Trial(number=1, moved="", settings=EditSettings(), evaluation=found)


def rank(one: Trial, **job: Any) -> Rank | None:
    bench: Any = SimpleNamespace(job=TuneJob(facts="f", out="o", **job))
    before = trial(perplexity=10.0).evaluation
    assert before is not None
    return Half(
        bench=bench,
        requests=(),
        evaluation=EvaluationSettings(),
        windows=(),
        before=before,
        reference=cast(Any, None),
    ).rank(one)


def better(one: Trial, other: Trial, **job: Any) -> bool:
    first, second = rank(one, **job), rank(other, **job)
    assert first is not None and second is not None
    return first > second


def same(one: Trial, other: Trial, **job: Any) -> bool:
    return rank(one, **job) == rank(other, **job)


def test_the_objective_decides_then_what_is_said_then_drift() -> None:
    assert better(trial(score=82, efficacy_exact=50, drift_kl=1), trial())
    # Within the noise of the score, which is half a point.
    assert better(trial(score=79.9, efficacy_exact=95, drift_kl=1), trial())
    assert better(trial(score=79.9, efficacy_exact=90.1, drift_kl=0.05), trial())
    assert same(trial(score=79.9, efficacy_exact=90.1, drift_kl=0.101), trial())


@pytest.mark.parametrize("objective", ["perplexity", "drift_kl"])
def test_of_some_objectives_less_is_better(objective: str) -> None:
    assert better(trial(**{objective: 0.01}), trial(), objective=objective)


def test_where_nothing_is_said_the_nearest_to_it_is_better() -> None:
    """A λ that is too strong does nothing: no drift, and no judgement that would show a way."""
    nothing = trial(efficacy_exact=0, drift_kl=0, logprob=-9)
    assert better(trial(efficacy_exact=0, drift_kl=0.5, logprob=-7), nothing)
    assert same(trial(efficacy_exact=0, drift_kl=0.5, logprob=-9.01), nothing)
    assert better(trial(efficacy_exact=5, drift_kl=0.5, logprob=-9), nothing)


def test_gates_come_first_and_are_neared_step_by_step() -> None:
    gates = {"gate": ("perplexity<=base*1.5", "drift_kl<=0.05")}
    both, one = trial(perplexity=14, drift_kl=0.04), trial(perplexity=14)
    assert better(both, one, **gates) and better(one, trial(), **gates)
    assert better(both, trial(score=99, perplexity=14), **gates)
    # By less than any noise, so that a search goes on.
    assert better(trial(perplexity=14, drift_kl=0.099), trial(perplexity=14, score=99), **gates)


def test_a_miss_is_as_large_as_what_is_short_of_the_bound() -> None:
    """Metrics of other sizes and directions: each counts from its bound, in its own noise."""
    gates = {"gate": ("efficacy_exact>=95", "perplexity<=base*1.1")}
    near = trial(efficacy_exact=94, perplexity=12)
    assert rank(near, **gates) == (-2, pytest.approx(-(1 / 0.5 + 1 / METRIC["perplexity"].noise)))
    assert better(near, trial(efficacy_exact=60, perplexity=11.5), **gates)
    assert better(near, trial(efficacy_exact=94, perplexity=14), **gates)
    assert better(near, trial(efficacy_exact=94.5, perplexity=math.inf), **gates)
    assert rank(trial(perplexity=math.inf), gate=("perplexity<=9",)) == (-1, -math.inf)
    assert rank(trial(), gate=("fluency>=5",)) == (-1, -math.inf)  # not measured


def test_what_failed_or_was_not_measured_has_no_rank() -> None:
    assert rank(Trial(number=1, moved="", settings=EditSettings(), failed="why")) is None
    assert rank(trial(score=math.nan)) is None
    assert rank(trial(), objective="fluency") is None
    assert rank(trial(drift_kl=math.inf)) is None
