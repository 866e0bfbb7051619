from __future__ import annotations

import json
from dataclasses import replace

from memedit.outcome import METRIC_KEYS, STAGES, EditOutcome
from tests.workflows.outcomes import example_outcome


def test_an_outcome_survives_json():
    outcome = example_outcome(20)
    again = EditOutcome.from_dict(json.loads(json.dumps(outcome.to_dict())))
    assert again == outcome
    assert isinstance(again.after.facts[0].paraphrase, tuple)


def test_absent_optional_values_survive_json():
    outcome = example_outcome(1)
    fact = replace(outcome.after.facts[0], target_true=None, efficacy=None, logprob_true=None)
    outcome = replace(outcome, after=replace(outcome.after, facts=(fact,)))
    assert EditOutcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome


def test_unknown_keys_are_dropped():
    values = {**example_outcome(1).to_dict(), "from_the_future": 1}
    assert EditOutcome.from_dict(values) == example_outcome(1)


def test_the_summary_has_the_documented_keys():
    summary = example_outcome(5).summary()
    assert list(summary) == [
        "run_id", "out", "manifest", "method", "format", "model", "layers", "facts", "metrics",
        "intervals", "timings_s", "report",
    ]  # fmt: skip
    assert list(summary["facts"]) == ["read", "accepted", "rejected", "rejects", "duplicates"]
    assert tuple(summary["metrics"]["after"]) == METRIC_KEYS
    assert set(summary["timings_s"]) == {*STAGES, "total"}
    assert isinstance(summary["layers"], list)


def test_the_summary_is_strict_json_even_with_infinite_metrics():
    outcome = example_outcome(2)
    after = replace(outcome.after, metrics={**outcome.after.metrics, "perplexity": float("inf")})
    summary = replace(outcome, after=after).summary()
    assert summary["metrics"]["after"]["perplexity"] is None
    json.dumps(summary, allow_nan=False)
