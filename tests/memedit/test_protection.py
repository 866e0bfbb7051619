"""Prompts of other subjects: which names are found, and what is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memedit.config import ProtectSettings
from memedit.drift import drift_prompts
from memedit.protection import (
    Neighbours,
    ProtectingPrompts,
    names_in,
    neighbours_of,
    prompts_elsewhere,
    protecting_prompts,
)
from memedit.requests import EditRequest, Neighbour

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
    fact(1, "Oslo", "The flag of {} is", neighbourhood=(Neighbour(prompt="Ulm is", target="x"),)),
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


NAMES = ("Danube", "Bratislava", "Anna Maria of Saxony", "Ludwig van Beethoven", "Bonn")
MADE = {t.replace("{}", name) for t in ("{} lies in", "The flag of {} is") for name in NAMES}
"""With names but for the subject Vienna; one of them is a prompt that a fact edits."""


def odd(prompt: str) -> bool:
    return hashlib.sha256(prompt.encode()).digest()[0] % 2 == 1


def test_templates_take_other_names_and_half_of_them() -> None:
    found = chosen(100)
    assert set(found.protected) == {p for p in MADE if not odd(p)} - {"Bonn lies in"}
    assert len(found.protected) > 2 and not found.heldout


def test_what_is_measured_is_not_protected() -> None:
    whole = len(chosen(100).protected)
    found = chosen(whole - 1, 1)
    assert (len(found.protected), len(found.heldout)) == (whole - 1, 1)
    assert not set(found.protected) & set(found.heldout)
    assert chosen(whole - 1, 1) == found
    assert any(chosen(whole - 1, 1, seed=seed) != found for seed in range(1, 9))
    # Each gets its share of too few, and something is held out.
    assert len(chosen(100, 1).heldout) == 1
    assert len(chosen(50, 50).heldout) == whole // 2


@pytest.mark.parametrize("source", ["neighbourhood", "templates"])
def test_what_is_made_is_never_a_neighbour_that_is_measured(
    source: Literal["neighbourhood", "templates"],
) -> None:
    near = tuple(Neighbour(prompt=p, target="x") for p in sorted(MADE))
    facts = [replace(each, neighbourhood=near) for each in FACTS]
    settings = ProtectSettings(prompts=100, source=source)
    found = protecting_prompts(facts, [TEXT], settings=settings, heldout=0).protected
    measured = neighbours_of(facts).measured
    assert measured and found and not set(found) & set(measured)


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


def test_the_side_of_a_single_neighbour_is_that_of_its_prompt() -> None:
    for prompt in NEAR:
        one = fact(0, "Vienna", neighbourhood=(Neighbour(prompt=prompt, target="x"),))
        measured, protectable = ([prompt], []) if odd(prompt) else ([], [prompt])
        assert neighbours_of([one]) == Neighbours(measured=measured, protectable=protectable)
        assert drift_prompts([one], 9) == measured


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
    assert set(found) == {p for p in MADE if odd(p)} - {"Bonn lies in"}
    assert not set(found) & set(chosen(100).protected)
    assert prompts_elsewhere(FACTS, [TEXT], count=2) == prompts_elsewhere(FACTS, [TEXT], count=2)
    assert len(prompts_elsewhere(FACTS, [TEXT], count=2)) == 2
    assert prompts_elsewhere(FACTS, ["no names"], count=9) == []
