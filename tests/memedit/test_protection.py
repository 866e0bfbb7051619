"""Prompts of other subjects: which names are found, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memedit.config import ProtectSettings
from memedit.protection import (
    Neighbours,
    ProtectingPrompts,
    names_in,
    neighbours_of,
    prompts_elsewhere,
    protecting_prompts,
)
from memedit.requests import EditRequest, Neighbour
from memedit.side_effects import drift_prompts

TEXT = (
    "The river Danube flows through Vienna, and past Bratislava. Nobody knows what Anna Maria of "
    'Saxony said ("It is late", perhaps) to Ludwig van Beethoven when he left Bonn! A letter.'
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (TEXT, ["Danube", "Vienna", "Bratislava", "Anna Maria of Saxony", "Ludwig van Beethoven",
                "Bonn"]),
        ("Only the first word has one. Then nothing.", []),
        ("we met in Санкт-Петербург with Ωμέγα", ["Санкт-Петербург", "Ωμέγα"]),
        ("it lies in 東京 and nowhere else", []),
        ("the isle of Man of", ["Man"]),
        ("see A Very Long Heading In Capitals Here", []),
        ("Old History\nThe town of\nBonn lies", ["History"]),
        ('it ended. " He went to Kiel', ["Kiel"]),
        ("in Rome, Paris and Rome", ["Rome", "Paris"]),
        ("", []),
    ],
)  # fmt: skip
def test_names(text: str, names: Sequence[str]) -> None:
    assert names_in([text]) == names


def test_no_more_names_than_asked_for() -> None:
    assert names_in([TEXT, TEXT], most=2) == ["Danube", "Vienna"]


@given(st.lists(st.text(max_size=60), max_size=4))
def test_any_text_is_read(texts: list[str]) -> None:
    for name in names_in(texts):
        assert name.strip() == name and name[0].isupper()


def fact(i: int, subject: str, prompt: str = "{} lies in", **more: object) -> EditRequest:
    return EditRequest(case_id=str(i), subject=subject, prompt=prompt, target_new="Rome", **more)  # type: ignore[arg-type]


FACTS = [
    fact(0, "Vienna", paraphrases=("Bonn lies in",)),
    fact(1, "Oslo", "The flag of {} is", neighbourhood=(Neighbour(prompt="Kiel is", target="x"),)),
]


def chosen(
    prompts: int,
    heldout: int = 0,
    *,
    seed: int = 0,
    texts: Sequence[str] = (TEXT,),
) -> ProtectingPrompts:
    settings = ProtectSettings(prompts=prompts, seed=seed)
    return protecting_prompts(FACTS, texts, settings=settings, heldout=heldout)


def test_templates_take_other_names() -> None:
    found = chosen(100)
    # Six names but for the subject Vienna, two templates, and one prompt that a fact edits.
    assert len(found.protected) == 9 and not found.heldout
    assert "Danube lies in" in found.protected
    assert "The flag of Ludwig van Beethoven is" in found.protected
    assert "Bonn lies in" not in found.protected
    assert not any("Vienna" in prompt for prompt in found.protected)


def test_what_is_measured_is_not_protected() -> None:
    found = chosen(6, 2)
    assert (len(found.protected), len(found.heldout)) == (6, 2)
    assert not set(found.protected) & set(found.heldout)
    short = chosen(75, 25)  # each gets its share of nine
    assert (len(short.protected), len(short.heldout)) == (7, 2)
    assert chosen(6, 2) == found and chosen(6, 2, seed=1) != found


NEAR = [f"The flag of country {i} is" for i in range(40)]
WITH_NEIGHBOURS = [
    fact(i, subject, neighbourhood=tuple(Neighbour(prompt=p, target="x") for p in NEAR[i::2]))
    for i, subject in enumerate(("Vienna", "Oslo"))
]


def test_half_of_the_neighbours_is_measured_and_never_protected() -> None:
    found = neighbours_of(WITH_NEIGHBOURS)
    assert sorted(found.measured + found.protectable) == sorted(NEAR)
    assert 10 < len(found.measured) < 30
    # The side of a prompt does not depend on the batch.
    for each in WITH_NEIGHBOURS:
        assert set(neighbours_of([each]).measured) <= set(found.measured)
    assert drift_prompts(WITH_NEIGHBOURS, 100) == found.measured
    protected = protecting_prompts(
        WITH_NEIGHBOURS, [TEXT], settings=ProtectSettings(prompts=200), heldout=10
    )
    chosen_ones = {*protected.protected, *protected.heldout}
    assert set(found.protectable) <= chosen_ones and not chosen_ones & set(found.measured)
    bonn = fact(9, "Bonn", NEAR[0].replace("country 0", "{}"), paraphrases=(NEAR[1], NEAR[2]))
    edited = neighbours_of([*WITH_NEIGHBOURS, bonn])
    assert not {NEAR[1], NEAR[2]} & {*edited.measured, *edited.protectable}


def test_a_single_neighbour_is_measured() -> None:
    for prompt in NEAR:
        one = fact(0, "Vienna", neighbourhood=(Neighbour(prompt=prompt, target="x"),))
        assert neighbours_of([one]) == Neighbours(measured=[prompt], protectable=[])


def test_neighbourhood_prompts_come_first_unless_templates_are_asked_for() -> None:
    protectable = set(neighbours_of(WITH_NEIGHBOURS).protectable)

    def protected(**more: Any) -> tuple[str, ...]:
        settings = ProtectSettings(prompts=len(protectable) + 2, **more)
        return protecting_prompts(WITH_NEIGHBOURS, [TEXT], settings=settings, heldout=0).protected

    assert set(protected()[: len(protectable)]) == protectable
    assert not protectable & set(protected(source="templates"))
    assert protected(seed=1)[:5] != protected()[:5]


def test_without_names_there_is_nothing() -> None:
    assert chosen(9, texts=("nothing here",)) == ProtectingPrompts(protected=(), heldout=())


def test_drift_elsewhere_is_of_the_facts_prompts_with_other_names() -> None:
    found = prompts_elsewhere(FACTS, [TEXT], count=100)
    assert len(found) == 9 and set(found) == set(chosen(100).protected)
    assert prompts_elsewhere(FACTS, [TEXT], count=4) == prompts_elsewhere(FACTS, [TEXT], count=4)
    assert len(prompts_elsewhere(FACTS, [TEXT], count=4)) in (3, 4)  # one may be edited
    assert prompts_elsewhere(FACTS, ["no names"], count=9) == []
