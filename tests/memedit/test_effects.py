"""Mean effects by class of positions, their intervals, and the layers that follow from them."""

from __future__ import annotations

import math

import pytest
import torch

from memedit.effects import Curve, average, class_of, effects_by_class, propose
from memedit.intervals import middle, resampled_means
from memedit.tracing import KINDS, FactTrace, TraceRequest

LAYERS = 3


def request(tokens: int, first: int, last: int) -> TraceRequest:
    return TraceRequest(
        case_id=f"{tokens}-{first}-{last}",
        ids=tuple(range(tokens)),
        subject_first=first,
        subject_last=last,
        target_id=0,
    )


def trace(of: TraceRequest, scale: float = 1.0) -> FactTrace:
    """An effect is 10 times the layer plus the position, times a scale."""
    layers = 10.0 * torch.arange(LAYERS).unsqueeze(1)
    effects_LT = scale * (layers + torch.arange(len(of.ids)))
    severed_L = torch.tensor([0.0, 5.0, 20.0])
    return FactTrace(
        case_id=of.case_id,
        clean=0.9,
        corrupted=0.1,
        effects_LT=dict.fromkeys(KINDS, effects_LT),
        severed_L={"mlp": severed_L, "attention": severed_L + 1},
    )


@pytest.mark.parametrize(
    ("place", "classes"),
    [
        (
            request(9, 1, 4),
            "- subject_first subject_middle subject_middle subject_last next further further last",
        ),
        (request(4, 0, 1), "subject_first subject_last next last"),
        (request(3, 1, 1), "- subject_last last"),
        (request(3, 1, 2), "- subject_first subject_last"),
    ],
)
def test_every_position_has_one_class(place: TraceRequest, classes: str) -> None:
    found = [class_of(position, place) or "-" for position in range(len(place.ids))]
    assert found == classes.split()


def test_a_fact_counts_once_in_a_class_however_many_tokens_it_has_there() -> None:
    place = request(9, 1, 4)
    values = effects_by_class(trace(place), place)
    assert values["mlp", "subject_middle"].tolist() == [2.5, 12.5, 22.5]
    assert values["mlp", "further"].tolist() == [6.5, 16.5, 26.5]
    assert values["mlp_severed", "subject_last"].tolist() == [0, 5, 20]
    assert ("mlp_severed", "last") not in values


def test_means_are_over_the_facts_that_have_such_a_position() -> None:
    places = [request(9, 1, 4), request(4, 0, 1), request(3, 1, 1)]
    traces = [trace(place, scale) for place, scale in zip(places, (1, 2, 6), strict=True)]
    curves, gap_RL = average(traces, places)
    of = {(c.kind, c.position): c for c in curves}
    last = of["hidden", "subject_last"]
    assert last.facts == 3
    assert last.mean == pytest.approx([(4 + 2 + 6) / 3, (14 + 22 + 66) / 3, (24 + 42 + 126) / 3])
    middle_one = of["attention", "subject_middle"]
    assert middle_one.facts == 1 and middle_one.low == middle_one.high == middle_one.mean
    for curve in curves:
        for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True):
            assert low <= mean + 1e-9 and mean <= high + 1e-9
    # The widest possible interval of a mean over three facts is from the least to the largest.
    assert 14 <= last.low[1] < last.mean[1] < last.high[1] <= 66
    assert gap_RL.shape[1] == LAYERS
    assert float(gap_RL[:, 2].min()) >= 24 - 20 and float(gap_RL[:, 2].max()) <= 126 - 20


def test_means_of_draws_are_means_of_facts_without_those_that_have_none() -> None:
    values_FM = torch.tensor([[0.0, math.nan], [4.0, 8.0]], dtype=torch.float64)
    drawn_RM = resampled_means(values_FM, resamples=400, seed=1)
    assert set(drawn_RM[:, 0].tolist()) == {0.0, 2.0, 4.0}
    known_R = drawn_RM[:, 1][~drawn_RM[:, 1].isnan()]
    # A quarter of the draws holds the first fact twice, and so has no value.
    assert set(known_R.tolist()) == {8.0} and 260 < len(known_R) < 340
    low_M, high_M = middle(drawn_RM)
    assert low_M.tolist() == [0, 8] and high_M.tolist() == [4, 8]


def curves_of(hidden: list[float], severed: list[float]) -> list[Curve]:
    return [
        Curve(
            kind=kind,
            position="subject_last",
            facts=9,
            mean=tuple(mean),
            low=tuple(mean),
            high=tuple(mean),
        )
        for kind, mean in (("hidden", hidden), ("mlp_severed", severed))
    ]


def test_the_mlps_above_the_last_layer_add_less_than_half_and_those_above_one_less_do_not() -> None:
    hidden = [0.0, 0.2, 0.6, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1] + [0.0] * 12
    severed = [0.0, 0.0, 0.0, 0.0, 0.2, 0.25, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1] + [0.0] * 12
    gap = torch.tensor(hidden) - torch.tensor(severed)  # 0.8 at layer 3, 0.45 at 5, 0.2 at 6
    draws_RL = torch.stack([gap, gap, gap.roll(1)]).double()
    found = propose(curves_of(hidden, severed), draws_RL)
    assert found is not None
    assert found.layers == (2, 3, 4, 5, 6) and found.flag == "2-6"
    assert (found.last_low, found.last_high) == (6, 7)
    assert found.gap == pytest.approx(gap.tolist())
    assert found.gap[6] < 0.5 * max(found.gap) <= found.gap[5]


def test_layers_do_not_begin_below_the_model() -> None:
    hidden, severed = [1.0, 0.9] + [0.0] * 22, [0.0] * 24
    found = propose(curves_of(hidden, severed), torch.zeros(1, 24) + 1)
    assert found is not None and found.layers == (0, 1, 2) and found.flag == "0-2"


def test_layers_do_not_end_above_the_model() -> None:
    found = propose(curves_of([1.0] * 8, [0.0] * 8), torch.ones(1, 8))
    assert found is not None and found.layers == (6, 7)


def test_without_a_gap_nothing_is_proposed() -> None:
    assert propose(curves_of([0.1, 0.2], [0.1, 0.3]), torch.zeros(1, 2)) is None


@pytest.mark.parametrize(
    ("gap", "draws", "proposes"),
    [
        (2e-7, [2e-7] * 40, False),
        (0.3, [0.3] * 40, True),
        (0.3, [-0.1] * 4 + [0.35] * 36, False),  # with other facts there would be none
    ],
)
def test_a_gap_that_may_be_nothing_proposes_nothing(
    gap: float, draws: list[float], proposes: bool
) -> None:
    draws_RL = torch.tensor([[draw] + [0.0] * 7 for draw in draws], dtype=torch.float64)
    found = propose(curves_of([gap] + [0.0] * 7, [0.0] * 8), draws_RL)
    assert (found is not None) == proposes
