"""What is said of settings that were found, against those that the search began with."""

from __future__ import annotations

from typing import Any

import pytest

from memedit.outcome import METRIC_KEYS, Evaluation, FactResult
from workflows.tuning_verdict import verdict_of


def evaluation(said: list[bool], **metrics: float) -> Evaluation:
    facts = tuple(
        FactResult(
            case_id=str(i),
            prompt="p",
            target_new="new",
            efficacy_exact=each,
            generation=each,
            continuation="",
            logprob_new=-1.0,
        )
        for i, each in enumerate(said)
    )
    share = 100 * sum(said) / len(said)
    known: dict[str, float | None] = dict.fromkeys(METRIC_KEYS)
    return Evaluation(metrics=known | {"efficacy_exact": share} | metrics, facts=facts)


def verdict(old: list[bool], new: list[bool]) -> dict[str, Any]:
    return verdict_of("efficacy_exact", before=evaluation(old), after=evaluation(new))


NONE, HALF, ALL = [False] * 20, [True, False] * 10, [True] * 20


def test_better_and_worse_are_what_the_interval_says() -> None:
    better, worse = verdict(HALF, ALL), verdict(ALL, HALF)
    assert better["tone"] == "better" and better["interval"][0] > 0
    assert better["text"].startswith(
        "Efficacy, exact 100.0 on the held-out half, against 50.0 with the settings that the search"
        " began with: +50.0 (95%: +"
    )
    assert worse["tone"] == "worse" and worse["change"] == -50
    assert "\N{MINUS SIGN}50.0" in worse["text"] and worse["text"].endswith("; keep those.")


def test_one_fact_of_twenty_may_be_chance() -> None:
    found = verdict(HALF, [True, True, *HALF[2:]])
    assert found["tone"] == "same" and found["change"] == pytest.approx(5)
    assert found["interval"][0] == 0 and found["text"].endswith(", no more than chance may give.")


def test_no_change_is_said_as_such() -> None:
    found = verdict(HALF, list(HALF))
    assert (found["tone"], found["change"]) == ("same", 0)
    assert "as with the settings that the search began with" in found["text"]


def test_what_has_no_interval_is_judged_by_its_noise_and_direction() -> None:
    def of(old: float, new: float) -> str:
        sides = {
            "before": evaluation(HALF, perplexity=old),
            "after": evaluation(HALF, perplexity=new),
        }
        found = verdict_of("perplexity", **sides)
        assert found["interval"] is None
        tone: str = found["tone"]
        return tone

    assert [of(20, 18), of(18, 20), of(20, 20.01)] == ["better", "worse", "same"]


def test_the_settings_of_the_beginning_may_have_been_the_best() -> None:
    same = evaluation(HALF)
    found = verdict_of("efficacy_exact", before=same, after=same)
    assert found["text"].startswith("The search found nothing better than the settings it began")
    assert found["tone"] == "same" and found["after"] == 50


def test_settings_that_fail_on_the_held_out_half() -> None:
    left = verdict_of("efficacy_exact", before=evaluation(ALL), after=None, failed="no memory")
    assert left["tone"] == "worse" and "no memory" in left["text"] and left["after"] is None
    first = verdict_of("efficacy_exact", before=None, after=evaluation(ALL))
    assert first["tone"] == "better" and "began with failed" in first["text"]
