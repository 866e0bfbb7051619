"""What makes two facts the same or contradictory, and the canonical order."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedit.errors import InputError
from memedit.requests import (
    EditBatch,
    EditRequest,
    Neighbour,
    Provenance,
    as_template,
    clean_text,
    resolve,
)

TOWER = EditRequest(
    case_id="1", subject="Eiffel Tower", prompt="{} is in the city of", target_new="Rome"
)
LOUVRE = EditRequest(case_id="2", subject="Louvre", prompt="{} is in", target_new="Oslo")


def at(request: EditRequest, row: int, **changes: str) -> EditRequest:
    return replace(request, provenance=Provenance(source="f.jsonl", row=row), **changes)


class TestResolve:
    def test_duplicates_are_merged_into_the_first(self) -> None:
        again = replace(TOWER, case_id="9", subject="Eiffel  Tower", target_true="Paris")
        found = resolve([TOWER, LOUVRE, again])
        assert found.requests == (TOWER, LOUVRE)
        assert [(d.kept, d.dropped) for d in found.duplicates] == [(TOWER, again)]
        assert found.conflicts == ()

    def test_two_targets_are_a_conflict_that_lists_both_rows(self) -> None:
        first, other = at(TOWER, 3), at(TOWER, 8, case_id="5", target_new="Oslo")
        found = resolve([first, LOUVRE, other])
        assert found.requests == (LOUVRE,)
        (conflict,) = found.conflicts
        assert (conflict.field, conflict.requests) == ("target_new", (first, other))
        for part in ("f.jsonl:3", "f.jsonl:8", "Rome", "Oslo", "Eiffel Tower is in"):
            assert part in conflict.reason

    def test_one_id_for_two_facts_is_a_conflict(self) -> None:
        other = replace(LOUVRE, case_id="1")
        (conflict,) = resolve([TOWER, other]).conflicts
        assert (conflict.field, conflict.requests) == ("id", (TOWER, other))

    def test_one_id_and_two_targets_is_reported_once(self) -> None:
        (conflict,) = resolve([TOWER, replace(TOWER, target_new="Oslo")]).conflicts
        assert conflict.field == "target_new"

    def test_composed_and_decomposed_letters_are_the_same(self) -> None:
        composed = replace(TOWER, subject=unicodedata.normalize("NFC", "Café"))
        decomposed = replace(TOWER, subject=unicodedata.normalize("NFD", "Café"))
        assert composed.subject != decomposed.subject
        assert len(resolve([composed, decomposed]).duplicates) == 1

    def test_the_same_prompt_about_two_subjects_is_no_conflict(self) -> None:
        other = replace(TOWER, case_id="3", subject="Big Ben", target_new="Oslo")
        assert resolve([TOWER, other]).requests == (TOWER, other)


class TestEditBatch:
    def test_refuses_contradictions_with_their_place(self) -> None:
        with pytest.raises(InputError) as raised:
            EditBatch.of([at(TOWER, 3), at(TOWER, 8, target_new="Oslo")])
        assert raised.value.source == "f.jsonl"
        assert raised.value.row in (3, 8)
        assert raised.value.field == "target_new"

    def test_merges_duplicates(self) -> None:
        assert len(EditBatch.of([TOWER, LOUVRE, TOWER])) == 2

    def test_digest_depends_on_what_is_edited_only(self) -> None:
        digest = EditBatch.of([TOWER]).digest
        assert EditBatch.of([replace(TOWER, paraphrases=("Where?",))]).digest == digest
        assert EditBatch.of([replace(TOWER, target_new="Oslo")]).digest != digest

    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from(["a", "a ", "b", "c"]), st.sampled_from(["{} x", "{}  x"])),
            max_size=8,
        ).flatmap(lambda facts: st.tuples(st.just(facts), st.permutations(facts)))
    )
    def test_the_order_of_arrival_does_not_matter(
        self, orders: tuple[list[tuple[str, str]], list[tuple[str, str]]]
    ) -> None:
        # One target a fact and one id a fact, so that only duplicates occur, some spaced otherwise.
        batches = [
            EditBatch.of(
                EditRequest(case_id=subject.strip(), subject=subject, prompt=prompt, target_new="t")
                for subject, prompt in order
            )
            for order in orders
        ]
        assert batches[0] == batches[1]
        assert batches[0].digest == batches[1].digest


class TestCleanText:
    def test_strips_and_composes(self) -> None:
        assert clean_text(" Cafe\u0301\n", field="subject") == "Café"

    @pytest.mark.parametrize("text", ["", " ", "\n\t", "\u200b", "\u00a0\u2003"])
    def test_refuses_what_nobody_can_see(self, text: str) -> None:
        with pytest.raises(InputError, match=r"empty|invisible") as raised:
            clean_text(text, field="target_new")
        assert raised.value.field == "target_new"

    @pytest.mark.parametrize(
        ("value", "name"),
        [(None, "null"), (7, "number"), (True, "boolean"), (["x"], "list"), ({}, "object")],
    )
    def test_says_which_type_was_found(self, value: object, name: str) -> None:
        with pytest.raises(InputError, match=f"expected text, found .*{name}"):
            clean_text(value, field="subject")

    @pytest.mark.parametrize("text", ["a\x00b", "a\x1bb", "a\ud800b"])
    def test_refuses_control_characters_and_half_surrogates(self, text: str) -> None:
        with pytest.raises(InputError, match="control character U"):
            clean_text(text, field="prompt")

    def test_line_breaks_are_allowed_in_prompts_only(self) -> None:
        assert clean_text("Q: a\nA:", field="prompt") == "Q: a\nA:"
        with pytest.raises(InputError, match="U\\+000A"):
            clean_text("New\nYork", field="target_new", one_line=True)


class TestAsTemplate:
    @pytest.mark.parametrize(
        ("prompt", "subject", "template", "spelling"),
        [
            ("{} is in", "Rome", "{} is in", "Rome"),
            ("The Eiffel Tower is in", "Eiffel Tower", "The {} is in", "Eiffel Tower"),
            ("the eiffel tower is in", "Eiffel Tower", "the {} is in", "eiffel tower"),
            ("Rome's rome is", "rome", "Rome's {} is", "rome"),
            ("Anna met Ann in", "Ann", "Anna met {} in", "Ann"),
            ("Who is C++ (language) by?", "C++ (language)", "Who is {} by?", "C++ (language)"),
            ("埃菲尔铁塔位于", "埃菲尔铁塔", "{}位于", "埃菲尔铁塔"),
            ("Is it {here}: Rome", "Rome", "Is it {here}: {}", "Rome"),
        ],
    )
    def test_makes_a_template_that_says_the_same(
        self, prompt: str, subject: str, template: str, spelling: str
    ) -> None:
        assert as_template(prompt, subject, field="prompt") == (template, spelling)

    @pytest.mark.parametrize(
        ("prompt", "subject", "reason"),
        [
            ("{} and {} are", "Rome", "2 times"),
            ("Paris is in", "Rome", "neither"),
            ("Anna is in", "Ann", "neither"),
            ("Rome is in Rome", "Rome", "occurs 2 times"),
            ("ROME is in Rome", "rome", "occurs 2 times"),
            ("tom tom tom is", "tom tom", "occurs 2 times"),
        ],
    )
    def test_refuses_what_is_ambiguous(self, prompt: str, subject: str, reason: str) -> None:
        with pytest.raises(InputError, match=reason) as raised:
            as_template(prompt, subject, field="prompt")
        assert raised.value.field == "prompt"

    @settings(max_examples=50, deadline=None)
    @given(st.text(), st.text(min_size=1), st.text())
    def test_filling_in_gives_the_prompt_back(self, left: str, subject: str, right: str) -> None:
        prompt = f"{left}{subject}{right}"
        try:
            template, spelling = as_template(prompt, subject, field="prompt")
        except InputError:
            return
        assert template.count("{}") == 1
        if "{}" not in prompt:
            assert template.replace("{}", spelling, 1) == prompt


def test_duplicates_are_asked_all_that_follows_from_them() -> None:
    first = EditRequest(
        case_id="1",
        subject="Rome",
        prompt="{} is in",
        target_new="Spain",
        portability=(Neighbour(prompt="Its king is", target="Felipe"),),
    )
    second = replace(
        first,
        case_id="2",
        portability=(Neighbour(prompt="Its sea is", target="the Atlantic"), *first.portability),
        references=("Madrid is in Spain.",),
        relation_id="P17",
    )
    (merged,) = resolve([first, second]).requests
    assert (merged.case_id, merged.digest) == ("1", first.digest)
    assert merged.portability == (*first.portability, second.portability[0])
    assert (merged.references, merged.relation_id) == (second.references, "P17")
