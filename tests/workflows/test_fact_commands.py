"""The commands over facts: list, add, retract, restore, why, rejects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from memedit.progress import Silent
from tests.workflows.runs import Ran, memedit, write_rows
from workflows.facts import read_facts
from workflows.ingestion.fact_log import HEAD, FactLog
from workflows.ingestion.register import register
from workflows.ingestion.settings import IngestJob


def says(name: str, subject: str, target: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "subject": subject, "prompt": "{} is in", "target_new": target} | more


ROWS = (says("1", "Eiffel Tower", "Rome"), says("2", "Louvre", "Oslo"), says("3", "Nile", "Peru"))


class Place:
    """A registry, and the commands over its facts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.registry = folder, folder / "registry"

    def run(self, command: str, *arguments: object) -> Ran:
        return memedit(
            "facts", command, "--registry", self.registry, *arguments, "--cache", self.folder / "c"
        )

    def json(self, command: str, *arguments: object) -> dict[str, Any]:
        return self.run(command, *arguments, "--json").result

    def add(self, *rows: dict[str, Any] | str, more: tuple[object, ...] = ()) -> dict[str, Any]:
        return self.json("add", write_rows(self.folder / "facts.jsonl", rows), *more)

    def ids(self, *arguments: object) -> list[str]:
        return [fact["id"] for fact in self.json("list", *arguments)["facts"]]

    def ingest(
        self,
        *rows: dict[str, Any] | str,
        conflicts: Literal["newest", "priority"] = "newest",
        priority: tuple[str, ...] = (),
        **source: Any,
    ) -> None:
        path = write_rows(self.folder / "source.jsonl", rows)
        job = IngestJob(
            registry=str(self.registry),
            source={"path": str(path), "name": "table"} | source,
            conflicts=conflicts,
            priority=priority,
        )
        log = FactLog(str(self.registry), cache=self.folder / "c")
        register(job, log, run="night-1", progress=Silent())


@pytest.fixture
def empty(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def place(empty: Place) -> Place:
    empty.add(*ROWS)
    return empty


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("rejects",), ("why", "x"), ("retract", "x"), ("restore", "x")],
    ids=lambda a: a[0],
)
def test_a_registry_without_facts_is_named(empty: Place, arguments: tuple[str, ...]) -> None:
    ran = empty.run(*arguments, "--json")
    assert ran.code == 2
    assert "nothing was ingested or added" in ran.error["message"]
    assert ran.error["source"] == str(empty.registry)
    assert not empty.registry.exists()


class TestList:
    def test_facts_with_their_places(self, place: Place) -> None:
        found = place.json("list")
        assert (found["matching"], found["states"]) == (3, {"active": 3})
        fact = found["facts"][0]
        assert (fact["id"], fact["subject"], fact["target_new"]) == ("1", "Eiffel Tower", "Rome")
        assert (fact["source"], fact["place"], fact["row"]) == (
            *("manual", str(place.folder / "facts.jsonl"), 1),
        )
        assert fact["valid_from"] and fact["valid_to"] is None

    def test_some_of_them(self, place: Place) -> None:
        place.ingest(says("9", "Nile", "Chad"))
        place.json("retract", "2")
        assert place.ids() == ["1", "9"]
        assert place.ids("--state", "superseded") == ["3"]
        assert place.ids("--state", "retracted") == ["2"]
        assert place.ids("--state", "any") == ["1", "2", "3", "9"]
        assert place.ids("--contains", "TOWER") == place.ids("--contains", "rom") == ["1"]
        assert place.ids("--contains", "%") == []
        assert place.ids("--said-by", "table") == ["9"]
        assert place.ids("--said-by", "manual' OR 'a'='a") == []
        found = place.json("list", "--limit", 1)
        assert (len(found["facts"]), found["matching"]) == (1, 2)

    def test_all_of_them_as_a_fact_table(self, place: Place) -> None:
        out = place.folder / "out.jsonl"
        found = place.json("list", "--out", out, "--limit", 1)
        assert (found["written"], found["out"]) == (3, str(out))
        requests = read_facts(out).requests
        assert sorted((r.case_id, r.target_new) for r in requests) == [
            *(("1", "Rome"), ("2", "Oslo"), ("3", "Peru")),
        ]

    def test_for_people(self, place: Place) -> None:
        text = place.run("list").stdout
        assert "Eiffel Tower" in text
        assert "3 of 3 shown; in the registry: 3 active" in text


class TestAdd:
    def test_what_changed(self, empty: Place) -> None:
        found = empty.add(*ROWS)
        assert (found["what"], found["changed"], found["active"]) == ("added", 3, 3)
        assert {f["state"] for f in found["facts"]} == {"active"}
        found = empty.add(*ROWS)
        assert (found["changed"], found["active"]) == (0, 3)
        found = empty.add(says("4", "Nile", "Chad"))
        assert {(f["id"], f["state"]) for f in found["facts"]} == {
            *(("3", "superseded"), ("4", "active")),
        }

    def test_under_a_name(self, empty: Place) -> None:
        empty.add(*ROWS, more=("--name", "people"))
        assert empty.ids("--said-by", "people") == ["1", "2", "3"]

    def test_all_or_nothing(self, empty: Place) -> None:
        path = write_rows(empty.folder / "f.jsonl", [ROWS[0], says("2", "Louvre", " ")])
        error = empty.run("add", path, "--json").error
        assert (error["source"], error["row"], error["field"]) == (str(path), 2, "target_new")
        assert not (empty.registry / HEAD).exists()

    def test_what_stands_may_be_protected(self, place: Place) -> None:
        path = write_rows(place.folder / "f.jsonl", [says("4", "Nile", "Chad")])
        ran = place.run("add", path, "--conflicts", "refuse", "--json")
        assert ran.code == 2
        assert "contradicts the fact 3 (Peru)" in ran.error["message"]
        assert place.ids() == ["1", "2", "3"]

    @pytest.mark.parametrize("rows", [[], ["", " "]])
    def test_an_empty_file(self, empty: Place, rows: list[str]) -> None:
        ran = empty.run("add", write_rows(empty.folder / "f.jsonl", rows), "--json")
        assert ran.code == 2 and "no row in it" in ran.error["message"]

    def test_retractions_may_be_added(self, place: Place) -> None:
        found = place.add({"id": "2", "retracted": True})
        assert [(f["id"], f["state"]) for f in found["facts"]] == [("2", "retracted")]


class TestRetractAndRestore:
    def test_out_and_back(self, place: Place) -> None:
        found = place.json("retract", "1", "2", "--why", "not so")
        assert (found["what"], found["changed"], found["active"]) == ("retracted", 2, 1)
        (fact,) = place.json("list", "--state", "retracted", "--contains", "Tower")["facts"]
        assert fact["reason"] == "not so"
        assert place.json("restore", "1")["active"] == 2
        assert place.ids() == ["1", "3"]

    def test_another_source_does_not_step_in(self, place: Place) -> None:
        place.ingest(says("9", "Nile", "Chad"))
        found = place.json("retract", "9")
        assert (found["changed"], found["active"]) == (2, 2)
        assert place.ids() == ["1", "2"]
        place.json("restore", "9")
        assert place.ids() == ["1", "2", "9"]

    def test_all_that_was_taken_out_with_it_comes_back(self, place: Place) -> None:
        place.ingest(says("9", "Nile", "Chad"))
        place.json("retract", "9")
        assert place.json("restore", "9")["changed"] == 2
        place.ingest(says("9", "Nile", "Chad"), {"id": "9", "retracted": True})
        assert place.json("list", "--contains", "Nile")["facts"][0]["target_new"] == "Peru"

    def test_by_the_rule_of_the_registry(self, place: Place) -> None:
        place.ingest(says("9", "Nile", "Chad"), conflicts="priority", priority=("manual",))
        assert place.ids() == ["1", "2", "3"]
        place.json("retract", "3")
        place.json("restore", "3")
        assert place.ids() == ["1", "2", "3"]

    def test_a_source_that_still_lists_it_does_not_bring_it_back(self, empty: Place) -> None:
        empty.ingest(*ROWS, complete=True)
        empty.json("retract", "2")
        empty.ingest(*ROWS, says("4", "Ob", "Peru"), complete=True)
        assert empty.ids() == ["1", "3", "4"]

    @pytest.mark.parametrize(
        ("command", "name", "reason"),
        [
            ("retract", "nobody", "no fact 'nobody'"),
            ("restore", "nobody", "no fact 'nobody'"),
            ("retract", "2", "is retracted already"),
            ("restore", "1", "was not taken out by hand"),
        ],
    )
    def test_what_cannot_be(self, place: Place, command: str, name: str, reason: str) -> None:
        place.json("retract", "2")
        before = place.json("list", "--state", "any")
        ran = place.run(command, "3" if command == "retract" else "2", name, "--json")
        assert (ran.code, ran.error["field"]) == (2, "ids")
        assert reason in ran.error["message"]
        assert place.json("list", "--state", "any") == before

    def test_an_id_that_meant_something_else_before(self, place: Place) -> None:
        place.add(says("1", "Ob", "Peru"), says("5", "Eiffel Tower", "Bonn"))
        assert place.json("retract", "1")["changed"] == 1
        assert place.ids() == ["2", "3", "5"]

    def test_what_the_source_took_back_is_not_restored(self, place: Place) -> None:
        place.add({"id": "2", "retracted": True})
        ran = place.run("restore", "2", "--json")
        assert "memedit facts add" in ran.error["message"]
        assert "is retracted already" in place.run("retract", "2", "--json").error["message"]


class TestWhy:
    def test_all_that_is_known(self, place: Place) -> None:
        place.json("retract", "3", "--why", "a test")
        (fact,) = place.json("why", "3")["facts"]
        assert (fact["subject"], fact["state"], fact["reason"]) == ("Nile", "retracted", "a test")
        assert [e["state"] for e in fact["history"]] == ["active", "retracted"]
        assert [e["sequence"] for e in fact["history"]] == [1, 2]
        assert fact["versions"] == []
        assert "a test" in place.run("why", "3").stdout

    def test_by_subject_from_every_source(self, place: Place) -> None:
        place.ingest(says("9", "Nile", "Chad", relation="P17"))
        told = place.json("why", "Nile")["facts"]
        assert [(f["id"], f["source"], f["state"]) for f in told] == [
            *(("3", "manual", "superseded"), ("9", "table", "active")),
        ]
        assert told[0]["superseded_by"] == told[1]["fact"]
        assert (told[1]["relation"], told[1]["run"]) == ("P17", "night-1")

    def test_what_is_not_known(self, place: Place) -> None:
        ran = place.run("why", "Amazon", "--json")
        assert (ran.code, ran.error["field"]) == (2, "what")


class TestRejects:
    def test_rows_with_their_reasons(self, empty: Place) -> None:
        bad = says("2", "Louvre", " ")
        empty.ingest(ROWS[0], bad, "{half")
        found = empty.json("rejects")["rejects"]
        assert [(r["row"], r["field"], r["source"], r["run"]) for r in found] == [
            *((2, "target_new", "table", "night-1"), (3, None, "table", "night-1")),
        ]
        assert len(empty.json("rejects", "--limit", 1)["rejects"]) == 1
        assert "whitespace" in empty.run("rejects").stdout
        out = empty.folder / "out.jsonl"
        assert empty.json("rejects", "--out", out)["written"] == 2
        first, second = out.read_text().splitlines()
        assert (json.loads(first), second) == (bad, "{half")

    def test_none(self, place: Place) -> None:
        assert place.json("rejects")["rejects"] == []
        assert "no row was rejected" in place.run("rejects").stdout
