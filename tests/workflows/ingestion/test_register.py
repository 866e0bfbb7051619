"""Registering a reading: all of it in one change, or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from memedit.errors import InputError
from memedit.progress import Silent
from tests.workflows.runs import write_rows
from workflows.ingestion import register as module
from workflows.ingestion.claims import Held
from workflows.ingestion.fact_log import HEAD, FactLog
from workflows.ingestion.head import Change, Head
from workflows.ingestion.merge import Merge
from workflows.ingestion.register import Registered, register, register_table
from workflows.ingestion.settings import IngestJob
from workflows.ingestion.source import SourceRow
from workflows.ingestion.source_files import FilesSource


def says(subject: str, target: str, **more: Any) -> dict[str, Any]:
    return {"subject": subject, "prompt": "{} is in", "target_new": target} | more


class Place:
    """A folder of files beside a registry."""

    def __init__(self, folder: Path) -> None:
        self.drop, self.registry = folder / "drop", folder / "registry"
        self.drop.mkdir()
        self.log = FactLog(str(self.registry), cache=folder / "cache")

    def put(self, name: str, *rows: dict[str, Any] | str) -> Path:
        return write_rows(self.drop / name, rows)

    def register(self, *, log: FactLog | None = None, **values: Any) -> Registered:
        source = {"path": str(self.drop), **values.pop("source", {})}
        job = IngestJob(registry=str(self.registry), source=source, **values)
        return register(job, log or self.log, run="r", progress=Silent())

    def active(self) -> set[str]:
        rows = self.log.select(self.log.head(), "SELECT * FROM state WHERE state = 'active'")
        return {row["target_new"] for row in rows}

    def rejects(self) -> list[dict[str, Any]]:
        return self.log.rejected(self.log.head(), limit=99)


def _taken_out(head: Head, merge: Merge) -> Change:
    """A person takes every fact out."""
    rows = merge.database.execute("SELECT source, fact FROM state").fetchall()
    held = [Held(source=s, fact=f, held="retracted", reason="by hand") for s, f in rows]
    merge.hold(held, run="h", rule="newest", priority=())
    return Change()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_is_new_is_registered_once(place: Place) -> None:
    place.put("1.jsonl", says("X", "Rome"), says("Y", "Bonn"))
    found = place.register()
    assert (found.read, found.rejected, found.snapshot) == (2, 0, "1.jsonl")
    assert (found.source, found.place) == ("files", str(place.drop))
    assert place.active() == {"Rome", "Bonn"}
    head = place.log.head()
    assert head.read["files"]["kind"] == "files"
    again = place.register()
    assert (again.read, again.snapshot) == (0, None)
    assert place.log.head() == head
    place.put("2.jsonl", says("X", "Oslo"))
    assert place.register().read == 1
    assert place.active() == {"Oslo", "Bonn"}
    row = place.log.select(place.log.head(), "FROM state WHERE target_new = 'Oslo'")[0]
    assert (row["place"], row["row"], row["run"]) == (str(place.drop / "2.jsonl"), 1, "r")
    assert row["snapshot"] == "2.jsonl"


def test_two_folders_are_two_sources_if_they_have_names(place: Place) -> None:
    place.put("1.jsonl", says("X", "Rome"))
    place.register(source={"name": "one"})
    place.register(source={"name": "two"})
    assert place.log.head().read.keys() == {"one", "two"}


class TestBadRows:
    def test_they_are_kept_with_their_reasons(self, place: Place) -> None:
        place.put("1.jsonl", says("X", "Rome"), "not json", says("Y", " "), {"subject": "\ud800"})
        found = place.register()
        assert (found.read, found.rejected) == (4, 3)
        rejects = place.rejects()
        assert [(r["row"], r["field"]) for r in rejects] == [
            (2, None),
            (3, "target_new"),
            (4, "prompt"),
        ]
        assert json.loads(rejects[1]["raw"]) == says("Y", " ")
        assert {r["place"] for r in rejects} == {str(place.drop / "1.jsonl")}
        assert {(r["run"], r["source"], r["snapshot"]) for r in rejects} == {
            ("r", "files", "1.jsonl")
        }
        assert place.active() == {"Rome"}

    def test_or_they_stop_it_before_anything_is_registered(self, place: Place) -> None:
        path = place.put("1.jsonl", says("X", "Rome"), says("Y", " "), "not json")
        with pytest.raises(InputError, match=r"whitespace.*\(1 more rows are wrong\)") as raised:
            place.register(on_bad_row="fail")
        error = raised.value
        assert (error.source, error.row, error.field) == (str(path), 2, "target_new")
        assert not (place.registry / HEAD).exists()

    @pytest.mark.parametrize("on_bad_row", ["reject", "fail"])
    def test_what_the_facts_do_not_allow_is_a_bad_row_too(
        self, place: Place, on_bad_row: str
    ) -> None:
        path = place.put("1.jsonl", says("X", "Rome", id="1"), says("X", "Oslo", id="2"))
        if on_bad_row == "fail":
            with pytest.raises(InputError, match="contradicts the row before") as raised:
                place.register(on_bad_row="fail", conflicts="refuse")
            assert (raised.value.source, raised.value.row) == (str(path), 2)
            assert not (place.registry / HEAD).exists()
            return
        assert place.register(conflicts="refuse").rejected == 1
        (reject,) = place.rejects()
        assert (reject["row"], reject["field"]) == (2, "target_new")
        assert json.loads(reject["raw"]) == says("X", "Oslo", id="2")

    def test_a_retraction_of_the_unknown(self, place: Place) -> None:
        place.put("1.jsonl", says("X", "Rome"), {"id": "9", "retracted": True})
        assert place.register().rejected == 1
        (reject,) = place.rejects()
        assert json.loads(reject["raw"]) == {"id": "9", "retracted": True}

    def test_they_get_a_second_chance_when_the_mapping_changes(self, place: Place) -> None:
        ada = {"subject": "Ada", "relation": "P19", "target_new": "Bath"}
        place.put("1.jsonl", says("X", "Rome"), ada)
        assert place.register().rejected == 1
        assert place.active() == {"Rome"}
        place.log.commit(_taken_out)
        assert place.register(source={"templates": {"P19": "{} was born in"}}).rejected == 0
        assert place.active() == {"Bath"}  # what was read before says nothing new

    def test_a_row_of_ten_megabytes(self, place: Place) -> None:
        place.put("1.jsonl", says("X", "Rome", note="x" * 10_000_000), says("Y", "Bonn"))
        assert place.register().rejected == 1
        assert place.active() == {"Bonn"}
        assert len(place.rejects()[0]["raw"]) < 70_000


class TestMostRetracted:
    def test_most_of_a_source_at_once_is_taken_for_a_mistake(self, place: Place) -> None:
        rows = [says(f"X{n}", "Rome") for n in range(30)]
        place.put("1.jsonl", *rows)
        complete: dict[str, Any] = {"source": {"complete": True}}
        place.register(**complete)
        place.put("1.jsonl", *rows[20:])
        before = place.log.head()
        with pytest.raises(InputError, match="20 of the 30 facts") as raised:
            place.register(**complete)
        assert raised.value.field == "most_retracted"
        assert place.log.head() == before
        place.register(most_retracted=100, **complete)
        assert place.log.head().counts == {"active": 10, "retracted": 20}

    def test_a_few_of_a_small_one_may_go(self, place: Place) -> None:
        rows = [says(f"X{n}", "Rome") for n in range(6)]
        complete: dict[str, Any] = {"source": {"complete": True}}
        place.put("1.jsonl", *rows)
        place.register(**complete)
        place.put("1.jsonl", *rows[5:])
        place.register(**complete)
        assert place.log.head().active == 1
        place.put("1.jsonl", says("Z", "Oslo"))
        with pytest.raises(InputError, match="1 of the 1"):
            place.register(**complete)


class TestScratch:
    def test_nothing_is_written_or_moved(self, place: Place) -> None:
        path = place.put("1.jsonl", says("X", "Rome"))
        scratch = place.log.scratch()
        assert place.register(log=scratch, source={"after": "delete"}).read == 1
        assert scratch.head().active == 1
        assert path.exists() and not place.registry.exists()


class TestAtTheSameTime:
    def test_what_another_run_has_read_meanwhile_is_not_registered_twice(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place.put("1.jsonl", says("X", "Rome"), "not json")
        collect = module._collect
        others = [place.register]

        def and_meanwhile(*arguments: Any) -> Any:
            found = collect(*arguments)
            if others:
                others.pop()()
            return found

        monkeypatch.setattr(module, "_collect", and_meanwhile)
        assert place.register().rejected == 0
        head = place.log.head()
        assert (head.sequence, len(place.rejects())) == (1, 1)

    def test_files_that_a_killed_run_has_left_are_put_away(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place.put("1.jsonl", says("X", "Rome"))
        with monkeypatch.context() as patch:
            patch.setattr(FilesSource, "settle", lambda self, mark: None)
            place.register(source={"after": "archive"})
        assert (place.drop / "1.jsonl").exists()
        assert place.register(source={"after": "archive"}).snapshot is None
        assert (place.drop / "archive" / "1.jsonl").exists()

    def test_a_file_that_the_other_run_had_not_seen_stays(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        delete = {"after": "delete"}
        place.put("1.jsonl", says("X", "Rome"), "not json")
        second = place.put("2.jsonl", says("Y", "Bonn"))
        aside = second.rename(place.drop.parent / "2.jsonl")
        collect = module._collect

        def and_meanwhile(*arguments: Any) -> Any:
            found = collect(*arguments)
            monkeypatch.undo()
            second.rename(aside)
            place.register(source=delete)
            aside.rename(second)
            return found

        monkeypatch.setattr(module, "_collect", and_meanwhile)
        aside.rename(second)
        found = place.register(source=delete)
        assert (found.read, found.snapshot, found.rejected) == (0, None, 0)
        assert list(place.drop.iterdir()) == [second]
        assert place.register(source=delete).read == 1
        assert place.active() == {"Rome", "Bonn"}
        assert list(place.drop.iterdir()) == []


class TestNames:
    def test_two_places_do_not_share_a_name_that_nobody_gave(
        self, place: Place, tmp_path: Path
    ) -> None:
        place.put("1.jsonl", says("X", "Rome"))
        place.register()
        other = {"path": str(write_rows(tmp_path / "other.jsonl", [says("Y", "Bonn")]))}
        with pytest.raises(InputError, match=r"give each source a `name`.*`name: files`") as raised:
            place.register(source=other)
        assert (raised.value.field, raised.value.source) == ("source.name", other["path"])
        assert place.register(source={"path": f"{place.drop}/"}).snapshot is None
        place.register(source={**other, "name": "files"})  # it has moved
        assert place.active() == {"Rome", "Bonn"}


class TestWrittenAnew:
    def test_a_fact_that_was_taken_out_stays_out(self, place: Place) -> None:
        place.put("1.jsonl", says("X", "Rome"), says("Y", "Bonn"))
        place.register()
        place.log.commit(_taken_out)
        place.put("1.jsonl", says("Z", "Oslo"), says("X", "Rome"), says("Y", "Lima"))
        assert place.register().read == 3
        assert place.active() == {"Oslo", "Lima"}
        place.put("2.jsonl", says("X", "Rome"))
        place.register()
        assert place.active() == {"Oslo", "Lima", "Rome"}


class TestRows:
    def test_another_condition_reads_all_of_a_table_again(
        self, place: Place, tmp_path: Path
    ) -> None:
        from deltalake import write_deltalake

        rows = [says("X", "Rome", year=1), says("Y", "Bonn", year=2)]
        write_deltalake(tmp_path / "table", pa.Table.from_pylist(rows))
        table: dict[str, Any] = {"kind": "delta", "path": str(tmp_path / "table")}
        assert place.register(source=table).read == 2
        assert place.register(source=table).snapshot is None
        later = table | {"where": "year > 1"}
        assert place.register(source=later).read == 1
        assert place.active() == {"Bonn"}
        assert place.register(source=later).snapshot is None

    def test_a_row_that_is_wrong_now_keeps_its_fact(self, place: Place) -> None:
        complete: dict[str, Any] = {"source": {"complete": True}}
        place.put("1.jsonl", says("X", "Rome", id="1"), says("Y", "Bonn"), says("Z", "Oslo"))
        place.register(**complete)
        place.put("1.jsonl", says("X", "", id="1"), "not json", says("V", "Lima"))
        found = place.register(**complete)
        assert found.notes == ("2 facts stay, though their rows were rejected now",)
        assert place.active() == {"Rome", "Bonn", "Lima"}


class TestRule:
    def test_it_belongs_to_the_registry(self, place: Place, tmp_path: Path) -> None:
        place.put("1.jsonl", says("X", "Rome"))
        other = str(write_rows(tmp_path / "other.jsonl", [says("X", "Oslo")]))
        place.register(source={"name": "a"})
        place.register(source={"name": "b", "path": other})
        assert place.active() == {"Oslo"}
        trusted: dict[str, Any] = {"conflicts": "priority", "priority": ("a", "b")}
        found = place.register(source={"name": "a"}, **trusted)
        assert (found.read, found.snapshot) == (0, None)
        assert place.active() == {"Rome"}
        head = place.log.head()
        assert (head.conflicts, head.priority) == ("priority", ("a", "b"))
        place.register(source={"name": "b", "path": other}, **trusted)
        assert place.log.head() == head
        rows = iter([[SourceRow(raw=says("X", "Bonn"), place="t", row=1)]])
        register_table(place.log, rows, source="manual", rule="newest", run="r")
        assert place.active() == {"Rome"}
        place.put("2.jsonl", says("Y", "Lima"))
        place.register(source={"name": "a"})
        assert place.active() == {"Bonn", "Lima"}
        assert place.log.head().conflicts == "newest"

    def test_of_a_registry_without_facts(self, place: Place) -> None:
        place.register(conflicts="refuse")
        assert not (place.registry / HEAD).exists()


class TestTables:
    def add(self, place: Place, *portions: list[dict[str, Any]]) -> int:
        def rows() -> Iterator[list[SourceRow]]:
            for number, portion in enumerate(portions):
                yield [
                    SourceRow(raw=raw, place=f"t{number}", row=n)
                    for n, raw in enumerate(portion, 1)
                ]

        head = register_table(place.log, rows(), source="manual", rule="refuse", run="r")
        return head.sequence

    def test_all_or_nothing(self, place: Place) -> None:
        with pytest.raises(InputError) as raised:
            self.add(place, [says("X", "Rome"), says("Y", "")])
        error = raised.value
        assert (error.source, error.row, error.field) == ("t0", 2, "target_new")
        with pytest.raises(InputError, match="contradicts"):
            self.add(place, [says("X", "Rome"), says("X", "Oslo")])
        assert not (place.registry / HEAD).exists()
        assert self.add(place, [says("X", "Rome")]) == 1
        assert place.log.head().read == {}

    def test_portions_are_read_by_several_processes_in_their_order(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(module, "_PORTION", 4)
        portions = [[says(f"X{n}", "Rome"), says(f"Y{n}", "Bonn")] for n in range(9)]
        assert self.add(place, *portions) == 1
        rows = place.log.select(place.log.head(), "SELECT * FROM state ORDER BY place, row")
        assert [(r["place"], r["row"], r["subject"]) for r in rows] == [
            (f"t{n}", row, f"{'XY'[row - 1]}{n}") for n in range(9) for row in (1, 2)
        ]
        with pytest.raises(InputError) as raised:
            self.add(place, *portions, [says("Z", "")], [{}])
        assert (raised.value.source, raised.value.row) == ("t9", 1)

    def test_a_few_rows_are_not_worth_a_process(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(module, "ProcessPoolExecutor", None)
        assert self.add(place, *([says(f"X{n}", "Rome")] for n in range(9))) == 1
        assert place.log.head().active == 9

    def test_no_row_at_all(self, place: Place) -> None:
        assert self.add(place) == 0
        assert not (place.registry / HEAD).exists()


class TestCutLines:
    """Whoever writes a file may be in the middle of its last line when it is read."""

    def append(self, path: Path, text: str) -> None:
        with path.open("a") as out:
            out.write(text)

    def test_a_retraction_that_was_cut_holds_once_it_is_whole(self, place: Place) -> None:
        path = place.put("1.jsonl", says("X", "Rome", id="x"), says("Y", "Bonn", id="y"))
        self.append(path, '{"id": "x", "retr')
        assert place.register().rejected == 1
        assert place.active() == {"Rome", "Bonn"}
        self.append(path, 'acted": true}\n')
        place.register()
        assert place.active() == {"Bonn"}

    def test_an_answer_that_was_cut_is_replaced_once_it_is_whole(self, place: Place) -> None:
        path = place.drop / "1.csv"
        path.write_text("subject,prompt,target_new\nX,{} is in,Rome\nY,{} is in,Fra")
        place.register()
        assert place.active() == {"Rome", "Fra"}
        self.append(path, "nce\n")
        place.register()
        assert place.active() == {"Rome", "France"}

    def test_a_whole_line_without_an_end_says_nothing_anew(self, place: Place) -> None:
        path = place.put("1.jsonl")
        self.append(path, json.dumps(says("X", "Rome")))
        place.register()
        place.put("2.jsonl", says("X", "Oslo"))
        place.register()
        assert place.active() == {"Oslo"}
        self.append(path, "\n" + json.dumps(says("Y", "Bonn")) + "\n")
        place.register()
        assert place.active() == {"Oslo", "Bonn"}

    def test_rows_before_a_broken_one_were_read(self, place: Place) -> None:
        path = place.drop / "1.csv"
        path.write_text("subject,prompt,target_new\nX,{} is in,Rome\nY,{} is in,Bonn\n")
        self.append(path, 'Z,"{} is')
        assert place.register().rejected == 1
        assert place.active() == {"Rome", "Bonn"}
        place.log.commit(_taken_out)
        self.append(path, ' in",Oslo\n')
        assert place.register().rejected == 0
        assert place.active() == {"Oslo"}


def test_a_template_that_was_wrong_can_be_corrected(place: Place) -> None:
    ada = {"id": "a", "subject": "Ada", "relation": "P19", "target_new": "Bath"}
    place.put("1.jsonl", ada)
    place.register(source={"templates": {"P19": "{} was bron in"}})
    place.register(source={"templates": {"P19": "{} was born in"}})
    rows = place.log.select(place.log.head(), "SELECT * FROM state WHERE state = 'active'")
    assert [row["prompt"] for row in rows] == ["{} was born in"]


def test_a_file_that_is_written_anew_does_not_undo_what_a_later_one_said(place: Place) -> None:
    rows = [says("X", "Rome"), says("Y", "Bonn")]
    (place.drop / "1.json").write_text(json.dumps(rows))
    place.register()
    place.put("2.jsonl", says("X", "Oslo"))
    place.register()
    (place.drop / "1.json").write_text(json.dumps([*rows, says("Z", "Kiel")]))
    place.register()
    assert place.active() == {"Oslo", "Bonn", "Kiel"}
    (place.drop / "1.json").write_text(json.dumps([says("X", "Bern"), *rows[1:]]))
    place.register()
    assert place.active() == {"Bern", "Bonn", "Kiel"}


def test_a_name_can_pass_on_to_another_kind_of_source(place: Place) -> None:
    from deltalake import write_deltalake

    table = pa.Table.from_pylist([says("X", "Rome"), says("Y", "Bonn")])
    write_deltalake(place.drop.parent / "lake", table)
    lake = {"kind": "delta", "path": str(place.drop.parent / "lake"), "name": "people"}
    place.register(source=lake)
    place.put("1.jsonl", says("X", "Oslo"))
    place.register(source={"name": "people"})
    assert place.active() == {"Oslo", "Bonn"}


def test_a_name_that_is_not_utf_8_is_told(place: Place) -> None:
    (Path(os.fsdecode(os.fsencode(place.drop) + b"/caf\xe9.jsonl"))).write_text("{}\n")
    with pytest.raises(InputError, match=r"not UTF-8: .*caf\\\\udce9"):
        place.register()
