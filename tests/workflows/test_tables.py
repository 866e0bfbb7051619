from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from memedit.outcome import EditOutcome
from tests.workflows.outcomes import example_outcome
from workflows.tables import (
    before_after_table,
    continuations_table,
    doctor_table,
    plan_table,
    rows_table,
)

Changes = Mapping[str, tuple[float, float]] | None


def piped(table: Table, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def before_after(outcome: EditOutcome, changes: Changes = None) -> Table:
    return before_after_table(outcome.before, outcome.after, changes)


def continuations(outcome: EditOutcome, n: int = 6) -> Table:
    return continuations_table(outcome.before.facts, outcome.after.facts, n)


def _doctor() -> Table:
    return doctor_table([("torch", "ok", "2.13.0"), ("s3", "missing", "set AWS_ENDPOINT_URL " * 9)])


@pytest.mark.parametrize(
    "table",
    [
        before_after(example_outcome(30)),
        before_after(
            example_outcome(30), {"neighbourhood_kl": (-1.25, 100.0), "score": (-99, 1.5)}
        ),
        continuations(example_outcome(30)),
        plan_table({"facts": 12, "layers": [5, 6], "shards": "x" * 200}),
        _doctor(),
        rows_table("facts", ["id", "prompt"], [["a", "word " * 40]]),
    ],
    ids=["before_after", "changes", "continuations", "plan", "doctor", "rows"],
)
def test_tables_fit_80_columns_and_have_no_colours_when_piped(table):
    text = piped(table)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "\x1b" not in text


def test_the_change_is_said_in_words_and_judged_by_the_metric():
    outcome = example_outcome(100)
    lines = {x.split("  ")[0].strip(): x for x in piped(before_after(outcome)).splitlines()}
    assert "+67.0" in lines["Efficacy %"] and "better" in lines["Efficacy %"]
    assert "worse" in lines["Neighbourhood %"]
    assert "+0.61" in lines["Perplexity"] and "worse" in lines["Perplexity"]
    assert "n/a" in lines["Drift, KL"]


def test_the_interval_of_a_change_stands_in_place_of_that_of_the_metric():
    outcome = example_outcome(100)
    changes = {"efficacy": (55.04, 77.0), "neighbourhood": (-4.0, -1.25)}
    text = piped(before_after(outcome, changes))
    lines = {x.split("  ")[0].strip(): x for x in text.splitlines()}
    assert "95% of change" in text
    told = {name: " ".join(line.split()) for name, line in lines.items()}
    assert told["Efficacy %"] == "Efficacy % 28.0 95.0 +67.0 better +55.0 to +77.0"
    assert told["Neighbourhood %"].endswith("-2.6 worse -4.0 to -1.2")
    assert told["Perplexity"].endswith("+0.61 worse")


def test_metrics_that_were_not_measured_have_no_row():
    outcome = example_outcome(10)
    metrics = {"efficacy": None, "efficacy_exact": 50.0}
    outcome = replace(outcome, after=replace(outcome.after, metrics=metrics),
                      before=replace(outcome.before, metrics={}))  # fmt: skip
    text = piped(before_after(outcome))
    assert "Efficacy, exact" in text and "Fluency" not in text and "Efficacy %" not in text


def test_continuations_show_both_models_and_whether_it_was_said():
    outcome = example_outcome(100)
    text = piped(continuations(outcome, n=3), width=200)
    for index in (0, 33, 66):
        assert outcome.after.facts[index].prompt in text
        assert outcome.after.facts[index].target_new in text
    assert "(yes)" in text


def test_markup_in_a_fact_is_printed_not_obeyed():
    outcome = example_outcome(1)
    fact = replace(outcome.after.facts[0], prompt="[red]x[/red] is", continuation="[/] y")
    outcome = replace(outcome, after=replace(outcome.after, facts=(fact,)))
    text = piped(continuations(outcome), width=120)
    assert "[red]x[/red] is" in text and "[/] y" in text
    assert "[red]" in piped(plan_table({"a": "[red]b"}))


def test_doctor_shows_the_remedy():
    text = " ".join(piped(_doctor()).split())
    assert "s3 missing set AWS_ENDPOINT_URL" in text
