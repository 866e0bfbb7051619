"""From rows to statements, and the rows that are none."""

from __future__ import annotations

import json
import unicodedata
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.ingestion.rows import FIELDS, STATEMENTS, DeadLetter, RowReader, raw_text
from workflows.ingestion.source import SourceRow, Unreadable

FACT = {"subject": "Café", "prompt": "{} is in", "target_new": "Rome"}
TEMPLATES = {"P19": ("{} was born in", "The birthplace of {} is")}


def read(raw: Any, reader: RowReader | None = None, **more: Any) -> dict[str, Any]:
    """The one statement of a row."""
    row = SourceRow(raw=raw, place="f.jsonl", row=7, **more)
    batch, dead = (reader or RowReader()).read([row])
    assert dead == []
    assert batch.schema == STATEMENTS
    (statement,) = batch.to_pylist()
    return statement


def rejected(raw: Any, reader: RowReader | None = None) -> DeadLetter:
    row = SourceRow(raw=raw, place="f.jsonl", row=7)
    batch, (dead,) = (reader or RowReader()).read([row])
    assert batch.num_rows == 0
    assert (dead.place, dead.row) == ("f.jsonl", 7)
    assert dead.raw.encode()
    return dead


class TestFacts:
    def test_a_fact_with_all_that_it_can_have(self) -> None:
        raw = FACT | {
            "id": 3,
            "target_true": "Paris",
            "paraphrases": ["{} lies in"],
            "neighbourhood": [{"prompt": "The Louvre is in", "target": "Paris"}],
            "relation": "P131",
            "asserted_at": "2026-11-27T02:00:00+02:00",
        }
        found = read(raw, again=True)
        assert not found["rewritten"]
        assert (found["op"], found["again"]) == ("assert", True)
        assert (found["id"], found["relation"]) == ("3", "P131")
        assert found["paraphrases"] == ["Café lies in"]
        assert found["neighbourhood"] == raw["neighbourhood"]
        assert found["asserted_at"] == datetime(2026, 11, 27, tzinfo=UTC)
        assert (found["place"], found["row"]) == ("f.jsonl", 7)

    @pytest.mark.parametrize(
        "beside",
        [
            {"references": "https://example.org", "relation_id": 17.5},
            {"attributes": {"colour": "red"}, "generation_prompts": 3},
            {"portability": "x", "paraphrases": []},
            {"edit": "2026-11-01", "questions": "none"},
        ],
    )
    def test_what_is_not_kept_cannot_make_it_a_bad_one(self, beside: dict[str, Any]) -> None:
        assert read(FACT | beside) == read(FACT)

    def test_one_of_a_file_that_was_written_anew(self) -> None:
        batch, _ = RowReader().read([SourceRow(raw=FACT, place="f", row=1, rewritten=True)])
        assert batch.to_pylist()[0]["rewritten"]

    @pytest.mark.parametrize(
        ("raw", "name"),
        [({"id": 3}, "3"), ({"case_id": "4"}, "4"), ({"id": [1]}, None), ({}, None), ([], None)],
    )
    def test_the_id_of_one_that_is_wrong(self, raw: Any, name: str | None) -> None:
        assert rejected(raw).id == name

    def test_what_a_fact_is_known_by(self) -> None:
        plain = read(FACT)
        for more in ({"id": "1"}, {"paraphrases": ["It is in"]}, {"relation": "P131"}):
            other = read(FACT | more)
            assert other["fact"] == plain["fact"], more
            assert other["content"] != plain["content"], more
        other = read(FACT | {"target_new": "Oslo"})
        assert other["question"] == plain["question"]
        assert other["fact"] != plain["fact"]

    def test_composed_and_decomposed_letters_are_the_same_fact(self) -> None:
        forms = [
            {name: unicodedata.normalize(form, value) for name, value in FACT.items()}
            for form in ("NFC", "NFD")
        ]
        assert forms[0] != forms[1]
        first, second = (read(form) for form in forms)
        for name in ("fact", "content", "question", "subject", "id"):
            assert first[name] == second[name]

    def test_other_layouts_are_known(self) -> None:
        raw = {"case_id": 5, "subject": "X", "prompt": "{} is in", "target_new": "Rome"}
        assert read(raw | {"rephrase_prompt": "X lies in"})["paraphrases"] == ["X lies in"]
        assert read(raw)["id"] == "5"

    def test_columns_are_mapped_and_the_others_are_left_alone(self) -> None:
        reader = RowReader(columns={"subject": "person", "target_new": "city", "id": "nr"})
        raw = {"person": "Ada", "city": "Bath", "nr": 4, "prompt": "{} is in", "subject": 3}
        found = read(raw | {"requested_rewrite": 1}, reader)
        assert (found["subject"], found["target_new"], found["id"]) == ("Ada", "Bath", "4")


class TestTemplates:
    reader = RowReader(templates=TEMPLATES)

    def test_they_make_the_prompts(self) -> None:
        found = read({"subject": "Ada", "relation": "P19", "target_new": "London"}, self.reader)
        assert found["prompt"] == "{} was born in"
        assert found["paraphrases"] == ["The birthplace of Ada is"]
        assert found["relation"] == "P19"

    def test_an_own_prompt_goes_first(self) -> None:
        found = read(FACT | {"relation": "unknown"}, self.reader)
        assert (found["prompt"], found["paraphrases"]) == ("{} is in", [])

    def test_an_unknown_relation_is_named(self) -> None:
        dead = rejected({"subject": "Ada", "relation": "P18", "target_new": "x"}, self.reader)
        assert dead.field == "relation"
        assert "'P18'" in dead.reason and "P19" in dead.reason

    def test_a_template_without_a_place_for_the_subject(self) -> None:
        reader = RowReader(templates={"P19": ("was born in",)})
        dead = rejected({"subject": "Ada", "relation": "P19", "target_new": "London"}, reader)
        assert dead.field == "prompt"


class TestRetractions:
    def test_by_all_of_the_fact(self) -> None:
        found = read(FACT | {"retracted": True})
        assert found["op"] == "retract"
        assert found["fact"] == read(FACT)["fact"]

    def test_by_the_question(self) -> None:
        found = read({"subject": "Café", "prompt": "{} is in", "retracted": "yes"})
        assert (found["fact"], found["question"]) == (None, read(FACT)["question"])
        reader = RowReader(templates=TEMPLATES)
        by_relation = read({"subject": "Ada", "relation": "P19", "retracted": 1}, reader)
        full = read({"subject": "Ada", "relation": "P19", "target_new": "x"}, reader)
        assert by_relation["question"] == full["question"]

    def test_by_the_question_with_the_prompt_filled_in(self) -> None:
        found = read({"subject": "Café", "prompt": "Café is in", "retracted": True})
        assert found["question"] == read(FACT)["question"]

    @pytest.mark.parametrize(
        "raw",
        [
            *({"id": 4}, {"case_id": "4"}, {"id": "4", "subject": "Café"}),
            {"id": "4", "subject": "Café", "target_new": "Rome"},
        ],
    )
    def test_by_the_id(self, raw: dict[str, Any]) -> None:
        found = read(raw | {"retracted": True})
        assert (found["id"], found["fact"], found["question"]) == ("4", None, None)

    def test_one_that_names_nothing(self) -> None:
        dead = rejected({"subject": "Café", "retracted": True})
        assert "names an id, or a subject and its prompt" in dead.reason

    @pytest.mark.parametrize("word", ["true", " Yes ", "1", "D", "deleted", "RETRACT", 1.0, True])
    def test_words_for_yes(self, word: Any) -> None:
        assert read(FACT | {"retracted": word})["op"] == "retract"

    @pytest.mark.parametrize(
        "word", ["false", "no", "0", "", "u", "INSERT", "c", 0, 0.0, float("nan"), False, None]
    )
    def test_words_for_no(self, word: Any) -> None:
        assert read(FACT | {"retracted": word})["op"] == "assert"

    @pytest.mark.parametrize("word", ["maybe", 2, -1, 1.5, [], "\ud800"])
    def test_other_words(self, word: Any) -> None:
        assert rejected(FACT | {"retracted": word}).field == "retracted"


class TestTimes:
    @pytest.mark.parametrize(
        "value",
        [
            "2026-11-27T02:00:00Z",
            "2026-11-27 02:00:00",
            " 2026-11-27T04:00:00+02:00",
            datetime(2026, 11, 27, 2),
            datetime(2026, 11, 27, 3, tzinfo=timezone(timedelta(hours=1))),
        ],
    )
    def test_without_a_zone_it_is_utc(self, value: Any) -> None:
        found = read(FACT | {"asserted_at": value})["asserted_at"]
        assert found == datetime(2026, 11, 27, 2, tzinfo=UTC)

    @pytest.mark.parametrize("value", ["2026-11-27", date(2026, 11, 27)])
    def test_a_day_is_its_beginning(self, value: Any) -> None:
        found = read(FACT | {"asserted_at": value})["asserted_at"]
        assert found == datetime(2026, 11, 27, tzinfo=UTC)

    @pytest.mark.parametrize(
        "value",
        [
            *("yesterday", "27.11.2026", "", 1_700_000_000, 1.5, True, [], "\ud800", "2026-13-01"),
            *("0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59-05:00"),
        ],
    )
    def test_what_is_no_time(self, value: Any) -> None:
        assert rejected(FACT | {"asserted_at": value}).field == "asserted_at"


class TestDeadLetters:
    @pytest.mark.parametrize(
        ("change", "field", "reason"),
        [
            ({"subject": "a\x07b"}, "subject", "control character U\\+0007"),
            ({"target_new": "a\nb"}, "target_new", "control character"),
            ({"target_new": "\ud800"}, "target_new", "U\\+D800"),
            ({"prompt": "is in"}, "prompt", ""),
            ({"prompt": "{} and {}"}, "prompt", ""),
            ({"subject": 7}, "subject", "expected text, found a number"),
            ({"subject": None}, "subject", "missing"),
            ({"target_new": ["Rome"]}, "target_new", "found a list"),
            ({"target_new": " \u200b "}, "target_new", "invisible"),
            ({"paraphrases": "x"}, "paraphrases", "expected a list"),
            ({"relation": 4}, "relation", "expected text"),
            ({"id": 1.5}, "id", "expected text"),
            ({"id": True}, "id", "expected text"),
            ({"id": ""}, "id", "empty"),
        ],
    )
    def test_a_row_that_is_wrong_has_its_reason(
        self, change: dict[str, Any], field: str, reason: str
    ) -> None:
        import re

        dead = rejected(FACT | change)
        assert dead.field == field
        assert re.search(reason, dead.reason), dead.reason

    @pytest.mark.parametrize("raw", [7, "text", [FACT], None, True])
    def test_what_is_no_object(self, raw: Any) -> None:
        assert "expected an object" in rejected(raw).reason

    def test_what_its_format_does_not_allow(self) -> None:
        dead = rejected(Unreadable(reason="not JSON", text='{"a": \ud800', field="a"))
        assert (dead.field, dead.reason) == ("a", "not JSON")
        assert dead.raw == '{"a": \\ud800'

    @pytest.mark.parametrize(
        "value", ["x" * 10_000_000, ["x" * 10_000_000], {"a": "x" * 10_000_000}, b"x" * 10_000_000]
    )
    def test_a_row_that_is_much_too_large_is_cut_in_the_dead_letter(self, value: Any) -> None:
        dead = rejected(FACT | {"note": value})
        assert "characters; at most 1,048,576 make sense" in dead.reason
        assert len(dead.raw) < 70_000

    def test_bytes_and_times_have_a_text(self) -> None:
        raw = {"subject": b"\xff", "when": datetime(2026, 1, 1), "half": "\ud800"}
        dead = rejected(raw | {"prompt": "{}", "target_new": "x"})
        assert json.loads(dead.raw)["when"] == "2026-01-01 00:00:00"

    def test_good_rows_are_kept_in_their_order(self) -> None:
        raws = [FACT, 7, FACT | {"target_new": "Oslo"}, {}, FACT | {"target_new": "Bonn"}]
        rows = [SourceRow(raw=raw, place="f", row=n) for n, raw in enumerate(raws, 1)]
        batch, dead = RowReader().read(rows)
        assert batch.column("target_new").to_pylist() == ["Rome", "Oslo", "Bonn"]
        assert batch.column("row").to_pylist() == [1, 3, 5]
        assert [d.row for d in dead] == [2, 4]

    def test_keys_that_are_no_texts(self) -> None:
        assert raw_text({1: "x", None: "y"})
        assert rejected({1: "x"}).reason


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=5),
        st.text(st.characters(exclude_categories=()), max_size=8), st.datetimes(), st.dates(),
        st.decimals(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)  # fmt: skip


@given(
    raw=st.dictionaries(st.sampled_from((*FIELDS, "other")), VALUES, max_size=6),
    plain=st.booleans(),
)
@settings(max_examples=150, deadline=None, database=None)
def test_whatever_a_row_holds_it_is_a_statement_or_a_dead_letter(
    raw: dict[str, Any], plain: bool
) -> None:
    rows = [SourceRow(raw=FACT | raw if plain else raw, place="f", row=1)]
    batch, dead = RowReader(templates=TEMPLATES).read(rows)
    assert batch.num_rows + len(dead) == 1
    assert all(d.reason and d.raw.encode() for d in dead)
