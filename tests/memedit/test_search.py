"""The search over settings, on ranks that are made up: it gets there, and moves z least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from memedit.config import EditSettings, SolveSettings, TargetSettings
from memedit.search import Proposal, Rank, Space, search, searchable, values_of

START = EditSettings(
    method="memedit",
    layers=(5, 6, 7, 8, 9),
    solve=SolveSettings(lam=15_000),
    targets=TargetSettings(steps=20, lr=0.5, clamp_norm_factor=0.75),
)
ALL = searchable("memedit")


def space(*names: str, blocks: int = 30) -> Space:
    return Space(names=names or ALL, layers=frozenset(range(blocks - 1)), blocks=blocks)


def run(
    rank: Callable[[EditSettings], Rank | None], where: Space, start: EditSettings = START
) -> list[Proposal]:
    """All that is proposed where settings are as good as `rank` says."""
    proposals = search(start, where)
    found = [next(proposals)]
    while True:
        try:
            found.append(proposals.send(rank(found[-1].settings)))
        except StopIteration:
            return found


def z_of(settings: EditSettings) -> tuple[Any, ...]:
    """What a z vector depends on."""
    return settings.layers[-1], settings.targets


def near(**wanted: float) -> Callable[[EditSettings], Rank]:
    """The nearer all of these are, the better."""

    def rank(settings: EditSettings) -> Rank:
        values = values_of(settings)
        values |= {"last": settings.layers[-1] + 1, "layers": len(settings.layers)}
        return (-sum(abs(math.log(values[name] / value)) for name, value in wanted.items()),)

    return rank


def best_of(found: list[Proposal], rank: Callable[[EditSettings], Rank]) -> EditSettings:
    return max((proposal.settings for proposal in found), key=rank)


def test_a_published_lambda_that_is_60_times_too_strong_is_left_behind() -> None:
    rank = near(lam=240)
    found = run(rank, space("lam"))
    lam = best_of(found, rank).solve.lam
    assert lam is not None and 240 / 1.42 < lam < 240 * 1.42
    assert found[0].settings == START and found[0].moved == ""
    assert {proposal.moved for proposal in found[1:]} == {"lam"}
    assert len(found) < 14


def test_all_settings_are_found() -> None:
    wanted = dict(lam=900, weight=6, layers=3, last=13, lr=1.5, steps=11, clamp=0.5)
    rank = near(**wanted)
    found = run(rank, space())
    best = best_of(found, rank)
    assert rank(best) > (-0.9,) > rank(START)
    assert abs(best.layers[-1] + 1 - 13) <= 1
    assert values_of(best).keys() == set(ALL)


def test_what_keeps_z_is_tried_first_in_each_round() -> None:
    found = run(near(lam=4_000, weight=3, layers=5, last=10, lr=0.5, steps=20, clamp=0.75), space())
    first_z = z_of(START)
    moved = [z_of(proposal.settings) != first_z for proposal in found]
    beginning = moved.index(True)
    assert {p.moved for p in found[:beginning]} == {"", "lam", "layers", "weight"}
    # The other z settings are as good as they can be: each is tried twice a round, and left.
    again = next(i for i in range(beginning, len(found)) if found[i].moved == "lam")
    assert sum(moved[beginning:again]) == again - beginning == 2 * 4
    assert not any(moved[again : again + 2])


def test_with_lambda_and_layers_that_end_where_they_did_z_is_found_once() -> None:
    found = run(near(lam=100, layers=2), space("lam", "weight"))
    assert len({z_of(proposal.settings) for proposal in found}) == 1
    assert len(found) > 8


def test_nothing_is_tried_twice_and_the_search_ends() -> None:
    rank = near(lam=1_000, last=20, lr=3, clamp=4)
    found = [proposal.settings for proposal in run(rank, space())]
    assert len(found) == len(set(found)) < 80
    assert found == [proposal.settings for proposal in run(rank, space())]


def test_it_steps_over_what_fails_and_never_stands_on_it() -> None:
    good = near(lam=4_000)

    def rank(settings: EditSettings) -> Rank | None:
        return None if (settings.solve.lam or 0) < 3_000 else good(settings)

    found = run(rank, space("lam", "clamp"))
    assert best_of(found, lambda s: rank(s) or (-math.inf,)).solve.lam == 3_750
    failed = [proposal for proposal in found if rank(proposal.settings) is None]
    # From what has failed nothing is tried: the next factor begins at the best again.
    assert failed and min(p.settings.solve.lam or 0 for p in found) > 937


def test_settings_that_fail_at_first_are_left_for_any_that_do_not() -> None:
    def rank(settings: EditSettings) -> Rank | None:
        return (1.0,) if settings.targets.lr < 0.5 else None

    assert any(rank(p.settings) for p in run(rank, space("lr")))


def test_layers_stay_where_they_may_be() -> None:
    where = replace(space("layers"), layers=frozenset(range(4, 12)))
    found = run(near(layers=20, last=30), where)
    assert {layer for p in found for layer in p.settings.layers} == set(range(4, 12))
    lowest = run(near(layers=1, last=1), space("layers"))
    assert (0,) in {p.settings.layers for p in lowest}


def test_layers_with_gaps_keep_them() -> None:
    start = replace(START, layers=(3, 5, 9))
    found = {p.settings.layers for p in run(near(last=10), space("layers"), start)}
    assert {(9,), (1, 2, 3, 5, 9), (0, 2, 6), (6, 8, 12)} <= found


@pytest.mark.parametrize(
    ("method", "lacks"),
    [("memedit", set()), ("memit", {"weight"}), ("emmet", {"weight", "lam"})],
)
def test_a_method_has_only_its_own_settings(method: Any, lacks: set[str]) -> None:
    assert set(searchable(method)) == set(ALL) - lacks
    assert set(values_of(replace(START, method=method))) == set(ALL) - lacks
