from __future__ import annotations

import math
from dataclasses import replace

import pytest

from memedit.outcome import METRIC_KEYS, Evaluation, FactResult, TargetTrace
from tests.workflows.outcomes import example_outcome
from workflows.findings import failures, probability, sample, verdict, weakest
from workflows.metrics import METRICS
from workflows.wording import layers_text

LOST = FactResult(
    case_id="a",
    prompt="Paris is in",
    target_new="Spain",
    target_true="France",
    efficacy=False,
    efficacy_exact=False,
    generation=False,
    continuation=" France",
    logprob_new=-3.0,
    logprob_true=-1.0,
)
TRACE = TargetTrace(
    case_id="a", losses=(9.0, 3.0, 0.04), steps=2, h_norm=10.0, delta_norm=5.0, converged=True
)


def test_every_metric_has_a_name():
    assert tuple(m.key for m in METRICS) == METRIC_KEYS


@pytest.mark.parametrize(
    ("fact", "trace", "reason", "detail"),
    [
        (LOST, TRACE, "solve", "loss 9.00 → 0.04 in 2 steps; now 5.0% a token, old object 37%"),
        (LOST, replace(TRACE, losses=(9.0, 4.0), converged=False), "target", "loss 9.00 → 4.00"),
        (
            LOST,
            replace(TRACE, losses=(9.0, 4.0), delta_norm=7.5, converged=False),
            "clamp",
            "0.75·‖h‖",
        ),
        (LOST, replace(TRACE, losses=(9.0, math.nan), converged=False), "diverged", "nan"),
        (LOST, None, "untraced", "now 5.0%"),
        (replace(LOST, generation=True), TRACE, "wording", "now 5.0%"),
        (replace(LOST, efficacy_exact=True), TRACE, "comparison", "old object 37%"),
        (replace(LOST, efficacy=None, target_true=None, logprob_true=None), TRACE, "solve", "now"),
    ],
)
def test_a_failure_is_given_the_reason_that_the_traces_show(fact, trace, reason, detail):
    (failure,) = failures([], [fact], [trace] if trace else [], clamp=0.75)
    assert failure.reason == reason
    assert detail in failure.detail


@pytest.mark.parametrize(
    "fact",
    [
        replace(LOST, efficacy=True, efficacy_exact=True),
        replace(LOST, efficacy=True, generation=True),
        replace(LOST, efficacy=None, efficacy_exact=True),
    ],
)
def test_a_fact_that_is_there_is_no_failure(fact):
    assert failures([], [fact], [TRACE]) == ()


def test_the_worst_failure_comes_first():
    facts = tuple(
        replace(LOST, case_id=c, efficacy=e, logprob_new=p)
        for c, e, p in (("weak", True, -9.0), ("near", False, -1.5), ("far", False, -8.0))
    )
    found = failures([replace(LOST, case_id="near", continuation=" Spain")], facts)
    assert [f.after.case_id for f in found] == ["far", "near", "weak"]
    assert [f.before and f.before.continuation for f in found] == [None, " Spain", None]


def test_a_neighbour_counts_as_lost_only_when_it_was_right_before():
    good = replace(LOST, efficacy=True, efficacy_exact=True, paraphrase=(True, False))
    before = replace(LOST, neighbourhood=(True, False, True))
    (found,) = weakest([before], [replace(good, neighbourhood=(False, False, True))])
    assert (found.paraphrases_failed, found.neighbours_lost) == (1, 1)
    assert found.before == before


@pytest.mark.parametrize(
    ("efficacy", "words"),
    [(99.0, "the edit works."), (80.0, "works in part"), (30.0, "does not work")],
)
def test_the_verdict_follows_the_efficacy(efficacy, words):
    outcome = example_outcome(10)
    after = replace(outcome.after, metrics={**outcome.after.metrics, "efficacy": efficacy})
    assert words in verdict(outcome.before, after, "10 facts written").headline


def test_the_verdict_names_what_was_damaged_against_the_base():
    before = Evaluation(metrics={"neighbourhood": 71.0, "perplexity": 20.0})
    after = Evaluation(metrics={"efficacy": 99.0, "neighbourhood": 61.0, "perplexity": 22.0})
    damage = verdict(before, after, "10 facts written").damage
    assert "10.0 points of the facts about other subjects were lost" in damage
    assert "perplexity on other text rose by 10.0%" in damage


@pytest.mark.parametrize(
    ("efficacy", "measured", "headline", "tone"),
    [
        (99.0, {"perplexity": 24.9, "drift_top1": 50.0}, "facts, and the edit works.", "better"),
        (
            99.0,
            {"perplexity": 25.0},
            "facts, and the edit works, but the model is damaged.",
            "worse",
        ),
        (80.0, {"perplexity": math.inf}, "works in part, but the model is damaged.", "worse"),
        (99.0, {"drift_top1": 40.0}, "works, but the model is damaged.", "worse"),
        (9.0, {"drift_top1": 40.0}, "does not work, and the model is damaged.", "worse"),
    ],
)
def test_a_damaged_model_is_called_so(efficacy, measured, headline, tone):
    base = Evaluation(metrics={"perplexity": 20.0, "drift_top1": 100.0})
    intervals = {"drift_top1": (30.0, 49.9)} if measured.get("drift_top1") == 40 else {}
    model = Evaluation(metrics={"efficacy": efficacy, **measured}, intervals=intervals)
    found = verdict(base, model, "facts")
    assert found.headline.endswith(headline) and found.tone == tone


def test_a_single_prompt_or_a_base_that_says_nothing_proves_no_damage():
    base = Evaluation(metrics={"perplexity": math.inf, "drift_top1": 100.0})
    metrics = {"efficacy": 99.0, "perplexity": math.inf, "drift_top1": 0.0}
    assert "damaged" not in verdict(base, Evaluation(metrics=metrics), "facts").headline
    unsure = Evaluation(metrics=metrics, intervals={"drift_top1": (0.0, 60.0)})
    assert "damaged" not in verdict(base, unsure, "facts").headline


def test_the_verdict_without_an_evaluation_claims_nothing():
    found = verdict(None, Evaluation(metrics={}), "1 fact written")
    assert found.headline == "1 fact written, not evaluated."
    assert found.success == "" and "not measured" in found.damage


def test_the_sample_is_even_and_never_longer_than_there_are_facts():
    outcome = example_outcome(100)
    before, after = outcome.before.facts, outcome.after.facts
    picked = sample(before, after, 4)
    assert [a.case_id for _, a in picked] == ["case-0", "case-25", "case-50", "case-75"]
    assert all(b is not None and b.case_id == a.case_id for b, a in picked)
    assert len(sample(before[:3], after[:3], 8)) == 3


def test_small_words():
    assert layers_text((5, 6, 7)) == "layers 5–9".replace("9", "7")
    assert layers_text((3, 8)) == "layers 3, 8"
    assert layers_text((9,)) == "layer 9"
    assert probability(0.0) == "100%"
    assert probability(-20.0) == "<0.01%"
    assert probability(math.nan) == "n/a"
