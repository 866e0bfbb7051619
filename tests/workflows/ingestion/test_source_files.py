"""Files as a source: which are meant, which are new, and what of them is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memedit.errors import InputError
from memedit.files import LocalFiles
from tests.s3.objects import Objects
from tests.s3.server import SeaweedServer
from tests.workflows.runs import write_rows
from workflows.ingestion import source_files
from workflows.ingestion.source import Reading, SourceRow, Unreadable
from workflows.ingestion.source_files import FilesSource
from workflows.ingestion.source_settings import FilesSettings


def says(subject: str, target: str, **more: Any) -> dict[str, Any]:
    return {"subject": subject, "prompt": "{} is in", "target_new": target} | more


class Drop:
    """A folder of files, and how far it was read."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.settings = folder, settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mark: Mapping[str, Any] | None = None
        self.reading: Reading | None = None
        self.more: dict[str, Any] = {}

    def put(self, name: str, *rows: Any) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_rows(path, rows)

    @property
    def source(self) -> FilesSource:
        settings = {"path": str(self.folder)} | self.settings
        return FilesSource(settings=FilesSettings(**settings), **self.more)

    def rows(self) -> list[SourceRow]:
        """What is read since the last time; the mark goes through JSON, as in the registry."""
        self.reading = self.source.read(self.mark)
        if self.reading is None:
            return []
        found = [row for portion in self.reading.rows for row in portion]
        self.mark = json.loads(json.dumps(self.reading.mark))
        return found

    def targets(self) -> list[str]:
        """The targets that are read and were not read before."""
        return [row.raw["target_new"] for row in self.rows() if not row.again]


@pytest.fixture
def drop(tmp_path: Path) -> Drop:
    return Drop(tmp_path / "drop")


def targets(path: str, **settings: Any) -> list[str]:
    reading = FilesSource(settings=FilesSettings(path=path, **settings)).read(None)
    if reading is None:
        return []
    return [row.raw["target_new"] for portion in reading.rows for row in portion]


class TestPlaces:
    @pytest.fixture
    def place(self, drop: Drop) -> Path:
        drop.put("b.jsonl", says("X", "B"))
        drop.put("a.jsonl", says("X", "A"))
        drop.put("day=1/c.jsonl", says("X", "C"))
        drop.put("day=1/deep/d.ndjson", says("X", "D"))
        drop.put("notes.txt", "no table")
        return drop.folder

    @pytest.mark.parametrize(
        ("path", "found"),
        [
            ("", "ABCD"),
            ("/", "ABCD"),
            ("/a.jsonl", "A"),
            ("/*.jsonl", "AB"),
            ("/?.jsonl", "AB"),
            ("/[b-z].jsonl", "B"),
            ("/*/*.jsonl", "C"),
            ("/day=*/c.jsonl", "C"),
            ("/**/*.jsonl", "ABC"),
            ("/**/*.ndjson", "D"),
            ("/day=1/**", "CD"),
            ("/day=1", "CD"),
            ("/nothing*.jsonl", ""),
        ],
    )
    def test_a_folder_a_file_or_a_glob(self, place: Path, path: str, found: str) -> None:
        assert targets(f"{place}{path}") == list(found)

    def test_relative_to_the_working_directory(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(place)
        assert targets("a.jsonl") == ["A"]
        assert targets("*.jsonl") == ["A", "B"]
        assert targets(".") == list("ABCD")
        assert targets("day=1/*.jsonl") == ["C"]

    def test_hidden_and_half_written_files_are_not_meant(self, drop: Drop) -> None:
        for name in (
            *(".a.jsonl", "_b.jsonl", "c.jsonl.tmp", "d.jsonl.PART", "e.jsonl.crdownload"),
            *("_temporary/f.jsonl", ".git/g.jsonl", "archive/h.jsonl", "x/archive/i.jsonl"),
        ):
            drop.put(name, says("X", "Rome"))
        assert drop.rows() == []
        drop.put("archive.jsonl", says("X", "Oslo"))
        assert drop.targets() == ["Oslo"]

    @pytest.mark.parametrize("name", ["none", "none/f.jsonl", "none/*.jsonl", "f.jsonl"])
    def test_what_is_not_there_is_named(self, drop: Drop, name: str) -> None:
        with pytest.raises(InputError, match="no such") as raised:
            targets(f"{drop.folder}/{name}")
        assert "drop/" in str(raised.value.source)

    def test_an_empty_folder_has_nothing_new_yet(self, drop: Drop) -> None:
        assert drop.rows() == []
        assert drop.reading is None

    def test_the_name_of_the_source(self, drop: Drop) -> None:
        assert drop.source.name == "files"
        drop.settings = {"name": "people"}
        assert drop.source.name == "people"

    def test_on_s3(self, s3: str, s3_server: SeaweedServer) -> None:
        objects = Objects(s3_server)

        def put(name: str, *rows: dict[str, Any]) -> None:
            objects.put(f"{s3}/drop/{name}", "".join(json.dumps(r) + "\n" for r in rows).encode())

        put("day=1/a.jsonl", says("X", "Rome"))
        put("b.jsonl", says("X", "Oslo"))
        put("_b.jsonl", says("X", "Bonn"))
        for path, found in (
            ("drop", ["Oslo", "Rome"]),
            ("drop/*.jsonl", ["Oslo"]),
            ("drop/b.jsonl", ["Oslo"]),
            ("drop/*/*.jsonl", ["Rome"]),
        ):
            assert targets(f"{s3}/{path}") == found
        source = FilesSource(settings=FilesSettings(path=f"{s3}/drop"))
        reading = source.read(None)
        assert reading is not None
        rows = [row for portion in reading.rows for row in portion]
        assert rows[1].raw["day"] == "1"
        assert rows[0].place == f"{s3}/drop/b.jsonl"
        mark = json.loads(json.dumps(reading.mark))
        assert source.read(mark) is None
        put("b.jsonl", says("X", "Oslo"), says("Y", "Lima"))
        again = source.read(mark)
        assert again is not None
        assert [row.again for portion in again.rows for row in portion] == [True, False]
        deleting = FilesSource(settings=FilesSettings(path=f"{s3}/drop", after="delete"))
        deleting.settle(mark)  # what has changed since stays
        assert objects.names(f"{s3}/drop") == ["_b.jsonl", "b.jsonl"]
        objects.delete(f"{s3}/drop/b.jsonl")
        assert source.read(mark) is None
        with pytest.raises(InputError, match="no such file or folder"):
            source.read(None)  # misspelt?


class TestFormats:
    def test_all_give_the_same_rows(self, drop: Drop) -> None:
        rows = [says("X", "Rome", id="1"), says("Y", "Oslo", id="2")]
        drop.put("a.jsonl", *rows)
        (drop.folder / "b.json").write_text(json.dumps(rows))
        pq.write_table(pa.Table.from_pylist(rows), drop.folder / "c.parquet")
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (drop.folder / "d.csv").write_text("\n".join(lines))
        found = drop.rows()
        assert [row.raw for row in found] == rows * 4
        assert [row.row for row in found] == [1, 2, 1, 2, 1, 2, 2, 3]
        assert [Path(row.place).name for row in found[::2]] == [
            *("a.jsonl", "b.json", "c.parquet", "d.csv"),
        ]
        assert drop.rows() == []

    def test_partitions_are_columns(self, drop: Drop) -> None:
        drop.put("relation=P%2019/day=1/a.jsonl", {"subject": "Ada"}, {"day": "own"})
        assert [row.raw for row in drop.rows()] == [
            {"relation": "P 19", "day": "1", "subject": "Ada"},
            {"relation": "P 19", "day": "own"},
        ]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.ndjson"])
    def test_an_empty_file_has_no_row(self, drop: Drop, name: str) -> None:
        (drop.folder / name).write_text("[]" if name == "a.json" else "")
        assert drop.rows() == []
        assert drop.reading is not None
        drop.put("b.jsonl", says("X", "Rome"))
        assert drop.targets() == ["Rome"]

    def test_rows_that_their_format_does_not_allow(self, drop: Drop) -> None:
        drop.put("a.jsonl", says("X", "Rome"), "{", "7", '{"subject": "\\ud800"}')
        found = drop.rows()
        assert isinstance(found[1].raw, Unreadable)
        assert [row.raw for row in found[2:]] == [7, {"subject": "\ud800"}]

    @pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.json"])
    def test_a_file_that_cannot_be_read_is_one_bad_row(self, drop: Drop, name: str) -> None:
        (drop.folder / name).write_bytes(b"PAR1\xff this is not PAR1")
        drop.put("b.jsonl", says("X", "Rome"))
        bad, good = drop.rows()
        assert isinstance(bad.raw, Unreadable)
        assert (bad.row, bad.place) == (0, str(drop.folder / name))
        assert bad.raw.reason.startswith("the file cannot be read: ")
        assert good.raw["target_new"] == "Rome"
        assert drop.rows() == []
        path = drop.put("a.jsonl", says("Y", "Oslo"))
        if name == "a.json":
            path.with_suffix(".json").write_text(json.dumps([says("Y", "Oslo")]))
            path.unlink()
            assert drop.targets() == ["Oslo"]  # mended

    def test_or_the_end_where_bad_rows_are(self, drop: Drop) -> None:
        (drop.folder / "a.parquet").write_bytes(b"PAR1 this is not PAR1")
        drop.more = {"on_bad_file": "fail"}
        with pytest.raises(InputError, match="not a readable Parquet file") as raised:
            drop.rows()
        assert raised.value.source is not None

    def test_nor_is_half_a_file_all_that_the_source_says(self, drop: Drop) -> None:
        drop.settings = {"complete": True}
        (drop.folder / "a.parquet").write_bytes(b"PAR1 this is not PAR1")
        with pytest.raises(InputError, match="not a readable Parquet file"):
            drop.rows()


class TestColumns:
    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_one_that_is_gone_is_named(self, drop: Drop, suffix: str) -> None:
        path = drop.folder / f"a.{suffix}"
        if suffix == "csv":
            path.write_text("persn,city\nAda,Bath\n")
        else:
            pq.write_table(pa.table({"persn": ["Ada"], "city": ["Bath"]}), path)
        drop.settings = {"columns": {"subject": "person", "target_new": "city"}}
        drop.more = {"on_bad_file": "fail"}
        with pytest.raises(InputError, match=r"no column 'person'.*gives for subject") as raised:
            drop.rows()
        assert raised.value.field == "person"
        assert str(raised.value.source) == str(path)
        assert "persn" in raised.value.message

    def test_one_that_is_a_folder(self, drop: Drop) -> None:
        (drop.folder / "kind=P19").mkdir()
        (drop.folder / "kind=P19" / "a.csv").write_text("subject,target_new\nAda,Bath\n")
        drop.settings = {"columns": {"relation": "kind"}}
        (row,) = drop.rows()
        assert row.raw == {"kind": "P19", "subject": "Ada", "target_new": "Bath"}

    def test_one_that_occurs_twice(self, drop: Drop) -> None:
        (drop.folder / "a.csv").write_text("subject,subject\nAda,Eva\n")
        (row,) = drop.rows()
        assert isinstance(row.raw, Unreadable)
        assert "'subject' occurs twice" in row.raw.reason

    def test_retractions_need_no_target(self, drop: Drop) -> None:
        (drop.folder / "a.csv").write_text("id,retracted\n4,true\n")
        (row,) = drop.rows()
        assert row.raw == {"id": "4", "retracted": "true"}


class TestWhere:
    def test_only_rows_that_meet_the_condition(self, drop: Drop) -> None:
        rows = [says("X", "Rome", year=1), says("Y", "Oslo", year=2), says("Z", "Bonn")]
        drop.put("a.jsonl", rows[0], "{", *rows[1:])
        drop.settings = {"where": "year > 1"}
        found = drop.rows()
        assert [row.row for row in found] == [2, 3]
        drop.put("a.jsonl", rows[0], "{", *rows[1:], says("V", "Lima", year=7))
        assert [(row.row, row.again) for row in drop.rows()] == [(2, True), (3, True), (5, False)]

    def test_partitions_lists_and_mixed_columns(self, drop: Drop) -> None:
        rows = [says("X", "Rome", n=1, more=["a"]), says("Y", "Oslo", n="two", more={"a": 2**70})]
        drop.put("day=7/a.jsonl", *rows)
        drop.settings = {"where": "day = '7' AND n = 'two' AND more LIKE '%a%'"}
        assert drop.targets() == ["Oslo"]

    def test_a_column_that_a_row_does_not_have_is_null(
        self, drop: Drop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source_files, "PORTION", 1)
        where = "city IS NULL AND (year IS NULL OR year > 1)"
        drop.settings = {"where": where, "columns": {"relation": "city"}}
        drop.put("a.jsonl", says("X", "Rome", year=1), says("Y", "Oslo"), says("Z", "Bonn", Year=2))
        drop.put("b.jsonl", {}, says("V", "Lima"), says("W", "Kyiv", city="x"))
        assert [row.raw.get("target_new") for row in drop.rows()] == ["Oslo", "Bonn", None, "Lima"]

    def test_columns_that_are_not_the_sources_are_not_shown(self, drop: Drop) -> None:
        drop.put("a.jsonl", {"subject": "X", "year": 1})
        drop.settings, drop.more = {"where": "yeer > 1"}, {"on_bad_file": "fail"}
        with pytest.raises(InputError, match=r"columns found: subject, year$"):
            drop.rows()

    @pytest.mark.parametrize("where", ["yeer > 1", "1; DROP TABLE x", "year >", "true) OR (true"])
    def test_what_is_no_condition(self, drop: Drop, where: str) -> None:
        drop.put("a.jsonl", says("X", "Rome", year=1))
        drop.settings, drop.more = {"where": where}, {"on_bad_file": "fail"}
        with pytest.raises(InputError) as raised:
            drop.rows()
        assert raised.value.field == "source.where"

    def test_half_a_character_does_not_stop_it(self, drop: Drop) -> None:
        drop.put("a.jsonl", says("X", "Rome", year=2), '{"subject": "\\ud800", "year": 2}')
        drop.settings = {"where": "year > 1"}
        assert len(drop.rows()) == 2


class TestNew:
    def test_only_new_files_are_read(self, drop: Drop, monkeypatch: pytest.MonkeyPatch) -> None:
        drop.put("a.jsonl", says("X", "Rome"))
        assert drop.targets() == ["Rome"]
        opened: list[str] = []
        really = LocalFiles.open
        monkeypatch.setattr(
            LocalFiles, "open", lambda self, name: opened.append(name) or really(self, name)
        )
        assert drop.rows() == [] and drop.reading is None
        drop.put("b.jsonl", says("Y", "Oslo"))
        assert drop.targets() == ["Oslo"]
        assert set(opened) == {"b.jsonl"}
        assert drop.reading is not None and drop.reading.snapshot == "b.jsonl"

    def test_lines_that_were_appended_are_new(self, drop: Drop) -> None:
        path = drop.put("a.jsonl", says("X", "Rome"), "", says("Y", "Oslo"))
        drop.rows()
        with path.open("a") as file:
            file.write(json.dumps(says("Z", "Bonn")) + "\n")
        assert [(row.row, row.again) for row in drop.rows()] == [(1, True), (3, True), (4, False)]
        assert drop.rows() == []

    def test_a_file_that_was_touched_says_nothing_new(self, drop: Drop) -> None:
        path = drop.put("a.jsonl", says("X", "Rome"), says("Y", "Oslo"))
        drop.rows()
        os.utime(path, ns=(1, 1))
        assert [row.again for row in drop.rows()] == [True, True]
        assert drop.rows() == []

    def test_what_was_written_anew_is_said_anew(self, drop: Drop) -> None:
        known = False
        for place in ("Rome", "Oslo", "Rome"):
            drop.put("a.jsonl", says("X", place), says("Y", "Lima"))
            rows = drop.rows()
            assert [row.raw["target_new"] for row in rows] == [place, "Lima"]
            assert not any(row.again for row in rows)
            assert {row.rewritten for row in rows} == {known}
            known = True
        drop.put("b.jsonl", says("X", "Bonn"))
        assert not any(row.rewritten for row in drop.rows())

    def test_a_file_that_comes_back_is_not_new(self, drop: Drop) -> None:
        path = drop.put("a.jsonl", says("X", "Rome"))
        drop.put("b.jsonl", says("Y", "Oslo"))
        drop.rows()
        aside = path.rename(drop.folder.parent / "a.jsonl")
        assert drop.rows() == []
        drop.put("c.jsonl", says("Z", "Bonn"))
        assert drop.targets() == ["Bonn"]
        aside.rename(path)
        assert drop.rows() == []
        path.rename(aside)
        drop.settings = {"where": "true"}
        drop.rows()
        aside.rename(path)
        assert [row.again for row in drop.rows()] == [True]

    def test_a_file_that_goes_after_it_was_listed(
        self, drop: Drop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = drop.put("a.jsonl", says("X", "Rome"))
        drop.put("b.jsonl", says("Y", "Oslo"))
        really = LocalFiles.fingerprint

        def gone(self: LocalFiles, name: str) -> list[Any]:
            path.unlink(missing_ok=True)
            return really(self, name)

        monkeypatch.setattr(LocalFiles, "fingerprint", gone)
        assert drop.targets() == ["Oslo"]

    def test_another_file_with_an_old_name(self, drop: Drop) -> None:
        path = drop.put("a.jsonl", says("X", "Rome"), says("Y", "Oslo"))
        drop.rows()
        path.unlink()
        assert drop.rows() == []
        drop.put("b.jsonl", says("Z", "Bonn"))
        assert drop.targets() == ["Bonn"]
        drop.put("a.jsonl", says("V", "Lima"))
        assert drop.targets() == ["Lima"]

    def test_one_that_changes_while_it_is_read_is_read_again(self, drop: Drop) -> None:
        drop.put("a.jsonl", says("X", "Rome"))
        reading = drop.source.read(None)
        assert reading is not None
        for _ in reading.rows:
            with (drop.folder / "a.jsonl").open("a") as file:
                file.write(json.dumps(says("Y", "Oslo")) + "\n")
        drop.mark = json.loads(json.dumps(reading.mark))
        assert drop.targets() == ["Oslo"]
        assert drop.rows() == []

    def test_one_that_goes_while_it_is_read(self, drop: Drop) -> None:
        path = drop.put("a.jsonl", says("X", "Rome"))
        reading = drop.source.read(None)
        assert reading is not None
        for _ in reading.rows:
            path.unlink()
        drop.mark = json.loads(json.dumps(reading.mark))
        assert drop.rows() == []

    def test_portions(self, drop: Drop, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(source_files, "PORTION", 2)
        drop.put("a.jsonl", *(says(f"X{n}", "Rome") for n in range(5)))
        reading = drop.source.read(None)
        assert reading is not None
        assert [len(portion) for portion in reading.rows] == [2, 2, 1]
        assert reading.mark["files"]["a.jsonl"][1] == 5

    @pytest.mark.parametrize(
        ("settings", "more"),
        [
            ({"columns": {"target_new": "city"}}, {}),
            ({"where": "true"}, {}),
            ({}, {"templates": {"P19": ["{} was born in"]}}),
        ],
    )
    def test_where_it_is_read_otherwise_now_all_is_read_again(
        self, drop: Drop, settings: dict[str, Any], more: dict[str, Any]
    ) -> None:
        drop.put("a.jsonl", says("X", "Rome"), {"subject": "Ada", "city": "Bath"})
        drop.rows()
        drop.settings, drop.more = settings, more
        assert [row.again for row in drop.rows()] == [True, True]
        assert drop.rows() == []

    def test_names_of_what_was_read(self, drop: Drop) -> None:
        for n in range(5):
            drop.put(f"{n}.jsonl", says("X", "Rome"))
        drop.rows()
        assert drop.reading is not None
        assert drop.reading.snapshot == "0.jsonl, 1.jsonl, 2.jsonl and 2 more"
        assert not drop.reading.complete


class TestComplete:
    @pytest.fixture
    def drop(self, tmp_path: Path) -> Drop:
        found = Drop(tmp_path / "drop", complete=True)
        found.put("a.jsonl", says("X", "Rome"))
        found.put("b.jsonl", says("Y", "Oslo"))
        assert found.targets() == ["Rome", "Oslo"]
        return found

    def test_all_is_read_where_anything_is_new(self, drop: Drop) -> None:
        assert drop.rows() == []
        drop.put("c.jsonl", says("Z", "Bonn"))
        assert drop.targets() == ["Rome", "Oslo", "Bonn"]
        assert drop.reading is not None and drop.reading.complete

    def test_a_file_that_is_gone_is_something_new(self, drop: Drop) -> None:
        (drop.folder / "a.jsonl").unlink()
        assert drop.targets() == ["Oslo"]
        (drop.folder / "b.jsonl").unlink()
        assert drop.rows() == []
        assert drop.reading is not None and drop.reading.snapshot == "no file"
        assert drop.rows() == []
        assert drop.reading is None


class TestAfter:
    def settled(self, drop: Drop, after: str) -> list[str]:
        drop.settings = {"after": after}
        drop.rows()
        assert drop.mark is not None
        drop.source.settle(drop.mark)
        return sorted(p.relative_to(drop.folder).as_posix() for p in drop.folder.rglob("*.jsonl"))

    def test_files_stay(self, drop: Drop) -> None:
        drop.put("a.jsonl", says("X", "Rome"))
        assert self.settled(drop, "keep") == ["a.jsonl"]

    def test_files_are_removed(self, drop: Drop) -> None:
        drop.put("a.jsonl", says("X", "Rome"))
        drop.put("x/b.jsonl", says("X", "Rome"))
        drop.put("_c.jsonl", says("X", "Rome"))
        assert self.settled(drop, "delete") == ["_c.jsonl"]
        assert drop.rows() == []

    def test_files_are_moved_and_none_is_lost(self, drop: Drop) -> None:
        for target in ("Rome", "Oslo", "Bonn"):
            drop.put("a.jsonl", says("X", target))
            drop.put("x/b.jsonl", says("Y", target))
            found = self.settled(drop, "archive")
        assert found == [
            *("archive/a.1.jsonl", "archive/a.2.jsonl", "archive/a.jsonl"),
            *("x/archive/b.1.jsonl", "x/archive/b.2.jsonl", "x/archive/b.jsonl"),
        ]
        assert "Bonn" in (drop.folder / "archive" / "a.2.jsonl").read_text()
        assert drop.rows() == []

    @pytest.mark.parametrize("after", ["archive", "delete"])
    def test_a_file_that_could_not_be_read_stays(self, drop: Drop, after: str) -> None:
        drop.put("a.jsonl", says("X", "Rome"))
        bad = drop.folder / "b.parquet"
        bad.write_bytes(b"PAR1 this is not PAR1")
        self.settled(drop, after)
        assert bad.exists() and not (drop.folder / "a.jsonl").exists()
        drop.put("c.jsonl", says("Y", "Oslo"))
        self.settled(drop, after)
        assert bad.exists() and not (drop.folder / "c.jsonl").exists()
        pq.write_table(pa.Table.from_pylist([says("Z", "Bonn")]), bad)
        assert drop.targets() == ["Bonn"]
        assert drop.mark is not None
        drop.source.settle(drop.mark)
        assert not bad.exists()

    def test_what_has_changed_since_stays(self, drop: Drop) -> None:
        path = drop.put("a.jsonl", says("X", "Rome"))
        drop.settings = {"after": "delete"}
        drop.rows()
        with path.open("a") as file:
            file.write(json.dumps(says("Y", "Oslo")) + "\n")
        assert drop.mark is not None
        drop.source.settle(drop.mark)
        assert path.exists()
        assert drop.targets() == ["Rome", "Oslo"]

    def test_a_single_file_that_was_put_away_may_come_again(self, drop: Drop) -> None:
        path = drop.put("a.jsonl", says("X", "Rome"))
        drop.settings = {"path": str(path), "after": "archive"}
        drop.rows()
        assert drop.mark is not None
        drop.source.settle(drop.mark)
        assert not path.exists()
        assert (drop.folder / "archive" / "a.jsonl").exists()
        assert drop.rows() == []
        drop.put("a.jsonl", says("X", "Oslo"))
        assert drop.targets() == ["Oslo"]

    def test_one_that_should_have_stayed_is_missed(self, drop: Drop) -> None:
        path = drop.put("a.jsonl", says("X", "Rome"))
        drop.settings = {"path": str(path)}
        drop.rows()
        path.unlink()
        with pytest.raises(InputError, match="no such file"):
            drop.rows()
