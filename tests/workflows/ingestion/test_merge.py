"""What becomes of facts when sources speak: claims, rules, retractions, held facts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workflows.ingestion.claims import CLAIMS, Held, Rule, Said
from workflows.ingestion.merge import Merge
from workflows.ingestion.rows import RowReader
from workflows.ingestion.source import SourceRow

START = datetime(2026, 11, 27, tzinfo=UTC)
Row = Mapping[str, Any]


def says(subject: str, target: str, **more: Any) -> Row:
    return {"subject": subject, "prompt": "{} is in", "target_new": target} | more


def gone(**named: Any) -> Row:
    if "subject" in named:
        named = {"prompt": "{} is in"} | named
    return {"retracted": True} | named


def at(hours: float) -> str:
    return (START + timedelta(hours=hours)).isoformat()


class World:
    """The claims in a table in memory, and the log of all events."""

    def __init__(self) -> None:
        self.database = duckdb.connect(":memory:", config={"threads": 1})
        self.database.execute("SET TimeZone = 'UTC'")
        self.database.register("empty", CLAIMS.empty_table())
        self.database.execute("CREATE TABLE state AS FROM empty")
        self.sequence = 0
        self.events: list[dict[str, Any]] = []

    def read(
        self,
        *rows: Row | SourceRow,
        source: str = "a",
        rule: Rule = "newest",
        complete: bool = False,
        priority: Sequence[str] = (),
        **more: Any,
    ) -> list[tuple[int, str, str]]:
        """Let a source speak; the statements that are refused."""
        found = [
            r if isinstance(r, SourceRow) else SourceRow(raw=r, place="f", row=n)
            for n, r in enumerate(rows, 1)
        ]
        batch, dead = RowReader().read(found)
        assert not dead
        table = pa.Table.from_batches([batch])
        positions = pa.array(range(table.num_rows), pa.int64())
        self.database.register("statements", table.append_column("position", positions))
        merge = self._merge()
        refused = merge.take(
            Said(
                source=source,
                at=merge.at,
                run="r",
                snapshot="s",
                complete=complete,
                rule=rule,
                priority=priority,
                **more,
            )
        )
        self.gone, self.spared = merge.gone(source), merge.spared()
        self._keep()
        return refused

    def hold(self, target: str, held: str | None = "retracted", source: str = "a") -> None:
        (fact,) = (
            r["fact"] for r in self.rows() if (r["target_new"], r["source"]) == (target, source)
        )
        claim = Held(source=source, fact=fact, held=held, reason="by hand" if held else None)
        self._merge().hold([claim], run="h", rule="newest", priority=())
        self._keep()

    def decide(self, rule: Rule, priority: Sequence[str]) -> None:
        self._merge().decide(rule, priority)
        self._keep()

    def _merge(self) -> Merge:
        self.sequence += 1
        moment = START + timedelta(days=1000, seconds=self.sequence)
        return Merge(self.database, sequence=self.sequence, at=moment)

    def _keep(self) -> None:
        events = self._asked("FROM events")
        self.events += events
        if not events:
            self.sequence -= 1
        self.database.execute(
            "DELETE FROM state s WHERE EXISTS"
            " (SELECT 1 FROM events e WHERE e.source = s.source AND e.fact = s.fact)"
        )
        self.database.execute("INSERT INTO state FROM events")

    def rows(self) -> list[dict[str, Any]]:
        return self._asked("FROM state ORDER BY source, fact")

    def _asked(self, query: str) -> list[dict[str, Any]]:
        found = self.database.execute(query)
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def active(self) -> set[tuple[str, str]]:
        return {(r["subject"], r["target_new"]) for r in self.rows() if r["state"] == "active"}

    def contents(self) -> list[str]:
        return sorted(r["content"] for r in self.rows() if r["state"] == "active")

    def states(self, source: str = "a") -> dict[str, str]:
        return {r["target_new"]: r["state"] for r in self.rows() if r["source"] == source}

    def row(self, target: str, source: str = "a") -> dict[str, Any]:
        (row,) = (r for r in self.rows() if (r["target_new"], r["source"]) == (target, source))
        return row


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    check(world)
    world.database.close()


def check(world: World) -> None:
    """What holds whatever was said."""
    rows = world.rows()
    last = {(e["source"], e["fact"]): e for e in world.events}
    assert {(r["source"], r["fact"]): r for r in rows} == last
    active = [r for r in rows if r["state"] == "active"]
    for name in ("question", "id"):
        assert len({r[name] for r in active}) == len(active), name
    assert all(r["claimed"] and r["held"] is None for r in active)
    assert all(r["valid_to"] is None and r["reason"] is None for r in active)
    answered = {r["question"] for r in active}
    assert all(r["question"] in answered for r in rows if r["claimed"] and r["held"] is None)


class TestNewest:
    def test_the_later_reading_wins_and_the_older_fact_is_superseded(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"))
        world.read(says("X", "Oslo", id="2"))
        assert world.active() == {("X", "Oslo")}
        row = world.row("Rome")
        assert (row["state"], row["claimed"]) == ("superseded", False)
        assert row["superseded_by"] == world.row("Oslo")["fact"]
        assert row["valid_from"] < row["valid_to"] == world.row("Oslo")["valid_from"]

    def test_the_later_row_of_a_reading_wins(self, world: World) -> None:
        world.read(says("X", "Rome"), says("Y", "Bonn"), says("X", "Oslo"))
        assert world.active() == {("X", "Oslo"), ("Y", "Bonn")}
        assert world.states()["Rome"] == "superseded"

    def test_a_fact_that_is_said_again_wins_again(self, world: World) -> None:
        world.read(says("X", "Rome"))
        world.read(says("X", "Oslo"))
        world.read(says("X", "Rome"))
        assert world.active() == {("X", "Rome")}

    def test_a_late_old_row_loses(self, world: World) -> None:
        world.read(says("X", "Oslo", asserted_at=at(5)), says("X", "Rome", asserted_at=at(3)))
        assert world.active() == {("X", "Oslo")}
        world.read(says("X", "Bonn", asserted_at=at(4)))
        assert world.active() == {("X", "Oslo")}
        assert world.row("Bonn")["superseded_by"] == world.row("Oslo")["fact"]
        world.read(says("X", "Bonn", asserted_at=at(6)))
        assert world.active() == {("X", "Bonn")}

    def test_a_late_old_row_loses_against_what_was_itself_superseded(self, world: World) -> None:
        world.read(says("X", "Oslo", id="1", asserted_at=at(5)))
        world.read(says("Y", "Bonn", id="1", asserted_at=at(6)))
        world.read(says("X", "Rome", id="2", asserted_at=at(4)))
        assert world.active() == {("Y", "Bonn")}

    def test_a_late_old_row_with_an_id_that_was_given_anew_loses(self, world: World) -> None:
        world.read(says("Y", "Bonn", id="1", asserted_at=at(5)))
        world.read(says("X", "Rome", id="1", asserted_at=at(3)))
        assert world.active() == {("Y", "Bonn")}

    def test_an_older_version_of_the_same_row_changes_nothing(self, world: World) -> None:
        world.read(says("X", "Rome", id="new", asserted_at=at(5)))
        world.read(says("X", "Rome", id="old", asserted_at=at(3)))
        assert world.row("Rome")["id"] == "new"

    def test_a_fact_that_is_confirmed_is_as_new_as_its_confirmation(self, world: World) -> None:
        world.read(says("X", "Rome", asserted_at=at(1)))
        world.read(says("X", "Rome", asserted_at=at(5)))
        world.read(says("X", "Oslo", asserted_at=at(3)))
        assert world.active() == {("X", "Rome")}

    def test_of_two_sources_the_newer_wins_by_its_own_time(self, world: World) -> None:
        world.read(says("X", "Rome", asserted_at=at(5)), source="a")
        world.read(says("X", "Oslo", asserted_at=at(3)), source="b")
        assert world.active() == {("X", "Rome")}
        assert world.states("b") == {"Oslo": "superseded"}
        assert world.row("Oslo", "b")["claimed"]

    def test_a_fact_comes_back_when_the_source_that_superseded_it_falls_silent(
        self, world: World
    ) -> None:
        world.read(says("X", "Rome", id="1"), source="a")
        world.read(says("X", "Oslo", id="2"), source="b")
        assert world.active() == {("X", "Oslo")}
        world.read(gone(id="2"), source="b")
        assert world.active() == {("X", "Rome")}
        assert world.states("b") == {"Oslo": "retracted"}

    def test_two_sources_that_say_the_same(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), source="a")
        world.read(says("X", "Rome", id="1"), source="b")
        assert world.active() == {("X", "Rome")}
        world.read(gone(subject="X", target_new="Rome"), source="b")
        assert world.active() == {("X", "Rome")}
        world.read(gone(subject="X", target_new="Rome"), source="a")
        assert world.active() == set()


class TestPriority:
    def test_the_trusted_source_wins_whenever_it_speaks(self, world: World) -> None:
        order: dict[str, Any] = {"rule": "priority", "priority": ("b", "a")}
        world.read(says("X", "Rome"), source="b", **order)
        world.read(says("X", "Oslo"), source="a", **order)
        world.read(says("X", "Bonn"), source="not named", **order)
        assert world.active() == {("X", "Rome")}
        world.read(gone(subject="X"), source="b", **order)
        assert world.active() == {("X", "Oslo")}
        world.read(says("X", "Kyiv"), source="b", **order)
        assert world.active() == {("X", "Kyiv")}


class TestRefuse:
    def test_what_stands_is_not_contradicted(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), rule="refuse")
        for source in ("a", "b"):
            ((position, field, reason),) = world.read(
                says("Y", "Bonn", id="3"), says("X", "Oslo", id="2"), rule="refuse", source=source
            )
            assert (position, field) == (1, "target_new")
            assert reason == "contradicts the fact 1 (Rome), which stands until it is retracted"
        assert world.active() == {("X", "Rome"), ("Y", "Bonn")}
        assert world.states("b") == {"Bonn": "superseded"}

    def test_the_first_row_of_a_batch_stands(self, world: World) -> None:
        refused = world.read(
            *(says("X", "Rome", id="1"), says("X", "Oslo", id="2"), says("X", "Rome", id="1")),
            rule="refuse",
        )
        assert refused == [(1, "target_new", "contradicts the row before with the id 1")]
        assert world.active() == {("X", "Rome")}

    @pytest.mark.parametrize(
        "retraction", [{"id": "1"}, {"subject": "X"}, {"subject": "X", "target_new": "Rome"}]
    )
    @pytest.mark.parametrize("known", [True, False])
    def test_after_a_retraction_in_the_same_batch_it_may_be_said(
        self, world: World, retraction: dict[str, Any], known: bool
    ) -> None:
        first = says("X", "Rome", id="1")
        if known:
            world.read(first, rule="refuse")
        refused = world.read(
            *([] if known else [first]),
            *(gone(**retraction), says("X", "Oslo", id="2"), says("X", "Bonn", id="3")),
            rule="refuse",
        )
        assert [r[0] for r in refused] == [2 if known else 3]
        assert world.active() == {("X", "Oslo")}

    def test_before_the_retraction_it_may_not(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), rule="refuse")
        refused = world.read(says("X", "Oslo", id="2"), gone(id="1"), rule="refuse")
        assert [r[0] for r in refused] == [0]
        assert world.active() == set()

    def test_behind_the_own_answer_that_of_another_source_stands(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), source="b")
        world.read(says("X", "Oslo", id="2"), source="a")
        refused = world.read(gone(id="2"), says("X", "Bonn", id="3"), rule="refuse", source="a")
        assert [r[0] for r in refused] == [1]
        assert world.active() == {("X", "Rome")}

    def test_a_complete_reading_may_change_its_mind(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), rule="refuse", complete=True)
        assert world.read(says("X", "Oslo", id="1"), rule="refuse", complete=True) == []
        assert world.active() == {("X", "Oslo")}
        refused = world.read(
            says("X", "Bonn", id="2"), says("X", "Oslo", id="1"), rule="refuse", complete=True
        )
        assert [r[0] for r in refused] == [0]
        assert world.active() == {("X", "Oslo")}

    def test_an_id_that_means_something_else_now_makes_room(self, world: World) -> None:
        refused = world.read(
            *(says("X", "Rome", id="1"), says("Y", "Bonn", id="1"), says("X", "Oslo", id="2")),
            rule="refuse",
        )
        assert refused == []
        assert world.active() == {("Y", "Bonn"), ("X", "Oslo")}


class TestIds:
    def test_the_same_id_with_another_question_replaces_the_fact(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"))
        world.read(says("Y", "Bonn", id="1"))
        assert world.active() == {("Y", "Bonn")}
        assert world.states() == {"Rome": "superseded", "Bonn": "active"}
        world.read(says("Z", "Oslo", id="1"), says("Y", "Kyiv", id="1"))
        assert world.active() == {("Y", "Kyiv")}

    def test_the_id_of_another_source_is_refused(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), source="a")
        refused = world.read(says("Y", "Bonn", id="1"), says("Z", "Oslo", id="2"), source="b")
        assert refused == [(0, "id", "the id 1 names another fact of the source a")]
        assert world.active() == {("X", "Rome"), ("Z", "Oslo")}
        assert world.read(says("X", "Bonn", id="1"), source="b") == []
        assert world.active() == {("X", "Bonn"), ("Z", "Oslo")}

    def test_an_id_that_is_free_again_may_be_used(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), source="a")
        world.read(gone(id="1"), source="a")
        assert world.read(says("Y", "Bonn", id="1"), source="b") == []

    def test_a_row_that_is_refused_pushes_nothing_aside(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), source="a")
        world.read(says("Y", "Bonn", id="2"), says("Y", "Oslo", id="1"), source="b")
        assert world.active() == {("X", "Rome"), ("Y", "Bonn")}

    def test_a_fact_can_be_renamed(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"))
        world.read(says("X", "Rome", id="2"), gone(id="1"))
        assert world.active() == {("X", "Rome")}
        world.read(gone(id="2"))
        assert world.active() == set()


class TestRetraction:
    @pytest.mark.parametrize(
        "named", [{"id": "1"}, {"subject": "X"}, {"subject": "X", "target_new": "Rome"}]
    )
    @pytest.mark.parametrize("together", [True, False])
    def test_by_id_question_or_fact(
        self, world: World, named: dict[str, Any], together: bool
    ) -> None:
        rows = [says("X", "Rome", id="1"), says("Y", "Bonn", id="2")]
        if together:
            assert world.read(*rows, gone(**named)) == []
        else:
            world.read(*rows)
            assert world.read(gone(**named)) == []
        assert world.active() == {("Y", "Bonn")}
        row = world.row("Rome")
        assert (row["state"], row["reason"]) == ("retracted", "retracted by the source")

    @pytest.mark.parametrize(
        "named", [{"id": "9"}, {"subject": "Y"}, {"subject": "X", "target_new": "Oslo"}]
    )
    def test_of_the_unknown_is_refused(self, world: World, named: dict[str, Any]) -> None:
        world.read(says("X", "Rome", id="1"))
        refused = world.read(gone(**named))
        assert refused == [(0, "id", "a retraction of what this source does not say")]
        assert world.active() == {("X", "Rome")}

    def test_only_of_what_the_source_itself_says(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), source="a")
        assert len(world.read(gone(id="1"), source="b")) == 1
        assert world.active() == {("X", "Rome")}

    def test_what_was_superseded_does_not_come_back(self, world: World) -> None:
        rows = [says("X", "Rome", id="1"), says("X", "Oslo", id="2"), gone(id="2")]
        world.read(*rows)
        assert world.active() == set()
        other = World()
        for row in rows:
            other.read(row)
        assert other.active() == set()

    def test_what_is_said_after_it_holds(self, world: World) -> None:
        world.read(says("X", "Rome"), gone(subject="X"), says("X", "Rome"))
        assert world.active() == {("X", "Rome")}


class TestComplete:
    def test_what_is_not_listed_any_more_is_retracted(self, world: World) -> None:
        world.read(says("X", "Rome"), says("Y", "Bonn"), complete=True)
        world.read(says("Y", "Bonn"), complete=True)
        assert world.active() == {("Y", "Bonn")}
        assert world.gone == (1, 2)
        assert world.row("Rome")["reason"] == "gone from the source"
        world.read(complete=True)
        assert world.active() == set()

    def test_another_answer_replaces_the_old_one(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), complete=True)
        world.read(says("X", "Oslo", id="1"), complete=True)
        assert world.states() == {"Rome": "superseded", "Oslo": "active"}
        assert world.gone == (0, 1)

    def test_the_time_of_what_is_not_listed_does_not_matter(self, world: World) -> None:
        world.read(says("X", "Oslo", asserted_at=at(5)), complete=True)
        world.read(says("X", "Rome", asserted_at=at(3)), complete=True)
        assert world.active() == {("X", "Rome")}

    def test_a_held_fact_stays_out_until_the_source_has_dropped_it(self, world: World) -> None:
        listed = [says("X", "Rome", id="1"), says("Y", "Bonn", id="2")]
        world.read(*listed, complete=True)
        world.hold("Rome")
        world.read(*listed, complete=True)
        assert world.active() == {("Y", "Bonn")}
        edited = {**listed[0], "paraphrases": ["X lies in"]}
        world.read(edited, listed[1], complete=True)
        row = world.row("Rome")
        assert (row["state"], row["reason"]) == ("retracted", "by hand")
        assert row["paraphrases"] == ["X lies in"]
        world.read(listed[1], complete=True)
        assert world.row("Rome")["held"] is None
        world.read(*listed, complete=True)
        assert world.active() == {("X", "Rome"), ("Y", "Bonn")}

    def test_a_row_that_is_refused_is_not_gone(self, world: World) -> None:
        world.read(says("Y", "Bonn", id="9"), source="b")
        world.read(says("X", "Rome", id="1"), complete=True)
        assert len(world.read(says("X", "Rome", id="9"), complete=True)) == 1
        assert world.active() == {("X", "Rome"), ("Y", "Bonn")}


class TestHeld:
    def test_a_held_fact_is_out_and_comes_back(self, world: World) -> None:
        world.read(says("X", "Rome"), source="a")
        world.read(says("X", "Oslo"), source="b")
        world.hold("Oslo", "quarantined", "b")
        assert world.active() == {("X", "Rome")}
        assert world.states("b") == {"Oslo": "quarantined"}
        world.hold("Oslo", None, "b")
        assert world.active() == {("X", "Oslo")}

    def test_a_source_that_says_it_anew_brings_it_back(self, world: World) -> None:
        world.read(says("X", "Rome"))
        world.hold("Rome")
        again = SourceRow(raw=says("X", "Rome"), place="f", row=1, again=True)
        world.read(again)
        assert world.active() == set()
        world.read(says("X", "Rome"))
        assert world.active() == {("X", "Rome")}


class TestAgain:
    def test_it_says_nothing_new(self, world: World) -> None:
        rows = [says("X", "Rome", id="1"), says("X", "Oslo", id="2"), says("Y", "Bonn", id="3")]
        rows += [gone(id="3")]
        world.read(*rows)
        before = world.rows()
        world.read(*(SourceRow(raw=r, place="f", row=n, again=True) for n, r in enumerate(rows, 1)))
        assert world.rows() == before

    def test_unless_no_fact_was_made_of_it(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"))
        world.read(SourceRow(raw=says("Y", "Bonn"), place="f", row=2, again=True))
        assert world.active() == {("X", "Rome"), ("Y", "Bonn")}

    @pytest.mark.parametrize("row", [says("X", "Oslo", id="2"), says("Y", "Oslo", id="1")])
    def test_an_old_row_does_not_become_the_newest(self, world: World, row: Row) -> None:
        world.read(SourceRow(raw=says("X", "Rome", id="1"), place="f", row=2))
        world.read(SourceRow(raw=row, place="f", row=1, again=True))
        assert world.active() == {("X", "Rome")}
        world.read(SourceRow(raw=row, place="f", row=3, again=True))
        assert {target for _, target in world.active()} == {"Oslo"}


def once_more(*rows: Row) -> list[SourceRow]:
    """The rows of a file that was written anew."""
    return [SourceRow(raw=r, place="f", row=n, rewritten=True) for n, r in enumerate(rows, 1)]


class TestRewritten:
    def test_what_is_claimed_is_not_said_anew(self, world: World) -> None:
        rows = [says("X", "Rome", id="1"), says("Y", "Bonn", id="2")]
        world.read(*rows)
        world.read(says("Y", "Oslo", id="9"), source="b")
        world.hold("Rome")
        before = world.rows()
        world.read(*once_more(*rows))
        assert world.rows() == before
        edited = {**rows[0], "paraphrases": ["X lies in"]}
        world.read(*once_more(edited, rows[1]))
        assert world.active() == {("X", "Rome"), ("Y", "Oslo")}

    def test_a_value_that_changes_back_and_forth(self, world: World) -> None:
        for target in ("Rome", "Oslo", "Rome", "Oslo"):
            world.read(*once_more(says("X", target, id="1")))
            assert world.active() == {("X", target)}

    @pytest.mark.parametrize(
        "before", [says("X", "Oslo"), says("Y", "Oslo", id="1"), gone(id="1"), gone(subject="X")]
    )
    @pytest.mark.parametrize("rule", ["newest", "refuse"])
    def test_what_stands_before_it_does_not_count(
        self, world: World, before: Row, rule: Rule
    ) -> None:
        world.read(says("X", "Rome", id="1"))
        assert world.read(*once_more(before, says("X", "Rome", id="1")), rule=rule) == []
        assert world.active() == {("X", "Rome")}

    @pytest.mark.parametrize(
        ("after", "found"), [(says("X", "Oslo"), {("X", "Oslo")}), (gone(id="1"), set())]
    )
    def test_what_comes_after_it_does(
        self, world: World, after: Row, found: set[tuple[str, str]]
    ) -> None:
        world.read(says("X", "Rome", id="1"))
        world.read(*once_more(says("X", "Rome", id="1"), after))
        assert world.active() == found

    def test_a_newer_time_confirms_it(self, world: World) -> None:
        world.read(says("X", "Rome", asserted_at=at(1)))
        world.read(says("X", "Oslo", asserted_at=at(2)), source="b")
        world.read(*once_more(says("X", "Rome", asserted_at=at(3))))
        assert world.active() == {("X", "Rome")}


class TestRejected:
    @pytest.mark.parametrize("rejected", [("1", "g", 7), (None, "f", 1)])
    def test_a_row_that_is_wrong_now_is_not_gone(
        self, world: World, rejected: tuple[str | None, str, int]
    ) -> None:
        world.read(says("X", "Rome", id="1"), says("Y", "Bonn", id="2"), complete=True)
        before = world.row("Rome")
        world.read(complete=True, rejected=[rejected])
        assert world.active() == {("X", "Rome")}
        assert world.row("Rome") == before
        assert (world.gone, world.spared) == ((1, 2), 1)
        world.read(complete=True)
        assert (world.active(), world.spared) == (set(), 0)

    def test_another_row_at_its_place_is_another_row(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), complete=True)
        world.read(complete=True, rejected=[("2", "f", 1)])
        assert world.active() == set()

    def test_nor_is_one_that_is_refused(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"), source="b")
        world.read(says("Y", "Bonn", id="2"), complete=True)
        refused = world.read(says("X", "Oslo", id="2"), complete=True, rule="refuse")
        assert len(refused) == 1
        assert world.active() == {("X", "Rome"), ("Y", "Bonn")}


class TestAnotherRule:
    def test_contested_questions_are_answered_again(self, world: World) -> None:
        world.read(says("X", "Rome"), says("Z", "Kyiv"), source="a")
        world.read(says("X", "Oslo"), source="b")
        world.decide("priority", ("a", "b"))
        assert world.active() == {("X", "Rome"), ("Z", "Kyiv")}
        world.read(says("Y", "Bonn"), source="c", rule_is_new=True)
        assert world.active() == {("X", "Oslo"), ("Y", "Bonn"), ("Z", "Kyiv")}
        events = len(world.events)
        world.decide("newest", ())
        assert len(world.events) == events

    def test_what_is_refused_on_demand(self, world: World) -> None:
        world.read(says("X", "Rome", id="1"))
        assert len(world.read(says("X", "Oslo", id="2"), source="b", guarded=True)) == 1


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_of_equal_times_one_source_wins_however_rows_come(
    world: World, order: tuple[str, ...]
) -> None:
    for source in order:
        world.read(says("X", f"Rome {source}", asserted_at=at(1)), source=source)
    world.hold(f"Rome {order[0]}", source=order[0])
    world.hold(f"Rome {order[0]}", None, source=order[0])
    assert world.active() == {("X", "Rome a")}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("rule", ["newest", "refuse", "priority"])
def test_the_same_rows_once_more_change_nothing(world: World, rule: Rule, complete: bool) -> None:
    rows = [
        *(says("X", "Rome", id="1"), says("Y", "Bonn", id="2", asserted_at=at(1))),
        *(says("Z", "Oslo", id="3", relation="r"), says("Y", "Kyiv", id="4", asserted_at=at(2))),
    ]
    world.read(*rows, rule=rule, complete=complete)
    before, events = world.rows(), len(world.events)
    for _ in range(2):
        world.read(*rows, rule=rule, complete=complete)
    assert (world.rows(), len(world.events)) == (before, events)


# --- Whatever is said in whatever order --------------------------------------------------------


@dataclass(frozen=True)
class Line:
    source: str
    row: Row


SUBJECTS, TARGETS, IDS = ("X", "Y", "Z"), ("Rome", "Oslo", "Bonn"), ("1", "2", "3", "4")
EXAMPLES = 8
BOUNDED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)
"""Each example is a few dozen queries."""

assertions = st.builds(
    says, st.sampled_from(SUBJECTS), st.sampled_from(TARGETS), id=st.sampled_from(IDS)
)
retractions = st.one_of(
    st.builds(gone, id=st.sampled_from(IDS)),
    st.builds(gone, subject=st.sampled_from(SUBJECTS)),
    st.builds(gone, subject=st.sampled_from(SUBJECTS), target_new=st.sampled_from(TARGETS)),
)
lines = st.lists(
    st.builds(Line, st.sampled_from("aab"), st.one_of(assertions, assertions, retractions)),
    min_size=1,
    max_size=9,
)


def own_id(row: Row, source: str) -> Row:
    """The row with the one id that its fact always has; some facts of a source share one."""
    number = (SUBJECTS.index(row["subject"]) * 2 + TARGETS.index(row["target_new"])) % 4
    return {**row, "id": f"{source}{number}"}


def told(lines: Sequence[Line], cuts: Sequence[bool], rule: Rule) -> list[str]:
    """What is active after readings that end where a cut is, and where the source changes."""
    world = World()
    portion: list[Line] = []
    for number, line in enumerate(lines):
        if portion and (portion[0].source != line.source or cuts[number]):
            world.read(*(p.row for p in portion), source=portion[0].source, rule=rule)
            portion = []
        portion.append(line)
    if portion:
        world.read(*(p.row for p in portion), source=portion[0].source, rule=rule)
    check(world)
    found = world.contents()
    world.database.close()
    return found


def same_however_split(lines: Sequence[Line], cuts: Sequence[bool], rule: Rule) -> None:
    assert told(lines, [True] * len(lines), rule) == told(lines, cuts, rule)


cuts = st.lists(st.booleans(), min_size=10, max_size=10)


@pytest.mark.parametrize("rule", ["newest", "refuse"])
@given(lines=lines, cuts=cuts, timed=st.booleans())
@BOUNDED
def test_how_rows_come_in_readings_does_not_matter(
    rule: Rule, lines: list[Line], cuts: list[bool], timed: bool
) -> None:
    if timed:
        lines = [Line(x.source, {**x.row, "asserted_at": at(n)}) for n, x in enumerate(lines)]
    same_however_split(lines, cuts, rule)


said = st.lists(
    st.tuples(st.sampled_from("ab"), assertions, st.integers(0, 20)), min_size=1, max_size=10
)


@given(said=said, cuts=cuts)
@BOUNDED
def test_nor_if_they_come_late(said: list[tuple[str, Row, int]], cuts: list[bool]) -> None:
    rows = [Line(s, {**own_id(row, s), "asserted_at": at(hour)}) for s, row, hour in said]
    same_however_split(rows, cuts, "newest")


@given(
    said=st.lists(st.tuples(st.sampled_from("ab"), assertions), min_size=1, max_size=8),
    cuts=cuts,
    data=st.data(),
)
@BOUNDED
def test_with_times_the_order_does_not_matter_either(
    said: list[tuple[str, Row]], cuts: list[bool], data: st.DataObject
) -> None:
    rows = [
        Line(source, {**own_id(row, source), "asserted_at": at(hour)})
        for hour, (source, row) in enumerate(said)
    ]
    shuffled = data.draw(st.permutations(rows))
    assert told(rows, [False] * len(rows), "newest") == told(shuffled, cuts, "newest")


def test_every_order_of_three_answers(world: World) -> None:
    rows = [says("X", t, asserted_at=at(h)) for h, t in enumerate(("Rome", "Oslo", "Bonn"))]
    for order in itertools.permutations(rows):
        other = World()
        for row in order:
            other.read(row)
        assert other.active() == {("X", "Bonn")}
