"""Bootstrap intervals: against a count of all draws, how often they hold the truth, their edges."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from statistics import harmonic_mean

import pytest
import torch

from memedit import intervals
from memedit.evaluate import summarise
from memedit.intervals import changes_of, intervals_of, ratio_interval, resampled_means
from memedit.outcome import FactResult


def fact(said: bool, *, neighbours: tuple[bool, ...] = (True, False)) -> FactResult:
    return FactResult(
        case_id="",
        prompt="p",
        target_new="new",
        target_true="true",
        efficacy=said,
        efficacy_exact=said,
        paraphrase=(said, True),
        paraphrase_exact=(said,),
        neighbourhood=neighbours,
        neighbourhood_exact=neighbours,
        generation=said,
        continuation="",
        logprob_new=-1.0,
        logprob_true=-2.0,
    )


def test_a_small_batch_against_all_its_draws() -> None:
    facts = [fact(True), fact(True), fact(True, neighbours=(True,)), fact(False, neighbours=())]
    draws = [[facts[i] for i in draw] for draw in product(range(4), repeat=4)]
    found = intervals_of(facts, resamples=20_000)
    for name in ("efficacy", "paraphrase", "neighbourhood", "score"):
        # Each draw is as likely as another, and a metric that it lacks is left out.
        means = [m for draw in draws if (m := summarise(draw)[name]) is not None]
        expected = torch.quantile(
            torch.tensor(means).double(), torch.tensor([0.025, 0.975]).double()
        )
        assert found[name] == pytest.approx(expected.tolist(), abs=0.01), name


def test_it_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(5)
    held = 0
    for _ in range(200):
        said = (torch.rand(80, generator=generator) < 0.7).tolist()
        low, high = intervals_of([fact(s) for s in said], resamples=300)["efficacy"]
        held += low <= 70 <= high
    assert 180 <= held <= 199


def test_the_metric_lies_inside_and_more_facts_make_it_narrower() -> None:
    facts = [fact(i % 3 != 0) for i in range(30)]
    few, many = intervals_of(facts), intervals_of(facts * 16)
    metrics = summarise(facts)
    for name, (low, high) in few.items():
        value = metrics[name]
        assert value is not None and low <= value <= high
        if low < high:
            assert many[name][1] - many[name][0] < (high - low) / 3
    assert few["score"][0] < few["score"][1]


def test_facts_that_are_all_alike_leave_no_doubt() -> None:
    found = intervals_of([fact(True)] * 9)
    assert found["efficacy"] == (100, 100)
    assert found["score"] == pytest.approx((harmonic_mean([100, 100, 50]),) * 2)
    assert intervals_of([fact(False, neighbours=(True,))] * 9)["score"] == (0, 0)


def test_what_was_not_measured_has_none() -> None:
    bare = replace(fact(True, neighbours=()), efficacy=None, paraphrase=(), paraphrase_exact=())
    assert set(intervals_of([bare, bare])) == {"efficacy_exact", "generation"}
    assert intervals_of([]) == {}


def test_one_fact_says_nothing_of_others() -> None:
    one, bare = fact(True), replace(fact(True, neighbours=()), paraphrase=(), paraphrase_exact=())
    assert intervals_of([one]) == {}
    assert set(intervals_of([one, bare])) == {"efficacy", "efficacy_exact", "generation"}
    assert changes_of([one], [one]) == {}


@pytest.mark.parametrize("at_once", [1, 50, 2**20])
def test_counts_of_draws_give_the_means_of_what_is_drawn(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    values_FM = torch.rand(23, 4, generator=generator, dtype=torch.float64)
    values_FM[values_FM < 0.3] = torch.nan
    values_FM[:, 3] = torch.nan
    values_FM[5, 3] = 0.5  # many draws have none
    drawn_RF = torch.randint(23, (200, 23), generator=torch.Generator().manual_seed(7))
    expected_RM = values_FM[drawn_RF].nanmean(1)
    monkeypatch.setattr(intervals, "_AT_ONCE", at_once)
    found_RM = resampled_means(values_FM, resamples=200, seed=7)
    assert torch.equal(found_RM.isnan(), expected_RM.isnan()) and bool(found_RM.isnan().any())
    torch.testing.assert_close(found_RM, expected_RM, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_same_facts_give_the_same_and_another_seed_others() -> None:
    facts = [fact(i % 3 != 0) for i in range(30)]
    first = intervals_of(facts, resamples=40)
    assert first == intervals_of(facts, resamples=40)
    assert first != intervals_of(facts, resamples=40, seed=1)


def test_a_change_is_drawn_on_the_same_facts() -> None:
    """Against the percentiles of the mean difference over all draws of five facts."""
    before = [replace(fact(said), case_id=str(i)) for i, said in enumerate((1, 0, 1, 0, 0))]
    after = [replace(fact(said), case_id=str(i)) for i, said in enumerate((1, 1, 0, 1, 0))]
    differences = (0, 1, -1, 1, 0)
    drawn = torch.tensor(
        [sum(differences[i] for i in draw) / 5 for draw in product(range(5), repeat=5)],
        dtype=torch.float64,
    )
    expected = 100 * torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64))
    found = changes_of(before, after, resamples=20_000)
    assert found["efficacy_exact"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert found["neighbourhood"] == (0, 0)
    # What makes a fact hard is in both, so the change is surer than the difference of two draws.
    alone = intervals_of(after)["efficacy_exact"]
    same = changes_of(after, after)["efficacy_exact"]
    assert same == (0, 0) and alone[1] - alone[0] > 0


def test_a_change_is_of_the_same_facts() -> None:
    one, other = (replace(fact(True), case_id=name) for name in "ab")
    with pytest.raises(ValueError, match="not the same facts"):
        changes_of([one], [other])
    assert changes_of([], []) == {}


def test_of_a_handful_of_prompts_nothing_is_said_of_others() -> None:
    assert ratio_interval([0.0] * 4) is None
    assert ratio_interval([0.0] * 5) == (0.0, 0.0)
    low, high = ratio_interval([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0, 2.0]) or (0, 0)
    assert 1.0 < low < 15 / 6 < high < 4.0
