from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.table import Table

from memedit.errors import InputError
from tests.s3.server import SeaweedServer
from workflows.ingestion.source import Reading
from workflows.ingestion.source_iceberg import IcebergSource
from workflows.ingestion.source_settings import IcebergSettings

NAME = "facts.people"


def some(*ids: int, name: str = "x") -> pa.Table:
    names = pa.array([f"{name}{i}" for i in ids], pa.string())
    return pa.table({"id": pa.array(ids, pa.int64()), "name": names})


class Lake:
    """A catalog in a SQLite file with one table in it."""

    def __init__(self, folder: Path, warehouse: str | None = None, **properties: str) -> None:
        self.folder = folder
        self.file = folder / "a catalog? 100%.db"
        self.uri = f"sqlite:///{folder}/a catalog%3F 100%25.db"
        warehouse = warehouse or f"file://{folder}/warehouse"
        self.catalog: Catalog = load_catalog(
            "prod",
            type="sql",
            uri=self.uri,
            warehouse=warehouse,
            **properties,
        )
        self.catalog.create_namespace("facts")
        self.table = self.make()

    def make(self) -> Table:
        return self.catalog.create_table(NAME, schema=some().schema)

    def source(self, **settings: Any) -> IcebergSource:
        given = {"catalog": str(self.file), "table": NAME} | settings
        return IcebergSource(IcebergSettings(**given))

    def read(self, since: Mapping[str, Any] | None = None, **settings: Any) -> Reading:
        reading = self.source(**settings).read(since)
        assert reading is not None
        return reading

    def rename_operation(self, name: str) -> None:
        """Let the current snapshot say that it was another operation, as other engines write."""
        path = Path(self.table.metadata_location.removeprefix("file://"))
        metadata = json.loads(path.read_text())
        [current] = [
            s for s in metadata["snapshots"] if s["snapshot-id"] == metadata["current-snapshot-id"]
        ]
        current["summary"]["operation"] = name
        path.write_text(json.dumps(metadata))


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path)


def rows(reading: Reading) -> list[tuple[int, int, str]]:
    found = [row for portion in reading.rows for row in portion]
    assert {row.place for row in found} <= {NAME}
    return [(row.row, row.raw["id"], row.raw["name"]) for row in found]


def test_the_first_reading_is_the_whole_table_with_older_files_first(lake: Lake) -> None:
    for number in (3, 1, 2):
        lake.table.append(some(number))
    reading = lake.read()
    assert rows(reading) == [(1, 3, "x3"), (2, 1, "x1"), (3, 2, "x2")]
    assert reading.complete and reading.notes == ()
    current = lake.table.current_snapshot()
    assert current is not None
    assert reading.snapshot == f"snapshot {current.snapshot_id}"
    assert json.loads(json.dumps(reading.mark)) == {
        "table_uuid": str(lake.table.metadata.table_uuid),
        "snapshot": current.snapshot_id,
    }


def test_then_only_what_was_appended_in_its_order(lake: Lake) -> None:
    lake.table.append(some(1))
    mark = lake.read().mark
    assert lake.source().read(mark) is None
    for number in (9, 7, 8):
        lake.table.append(some(number))
    reading = lake.read(mark)
    assert rows(reading) == [(1, 9, "x9"), (2, 7, "x7"), (3, 8, "x8")]
    assert not reading.complete and reading.notes == ()
    assert lake.source().read(reading.mark) is None


def test_a_table_without_a_snapshot_has_nothing_new(lake: Lake) -> None:
    assert lake.source().read(None) is None


def test_a_table_from_which_all_was_deleted_is_read_as_empty(lake: Lake) -> None:
    lake.table.append(some(1))
    mark = lake.read().mark
    lake.table.delete("id = 1")
    reading = lake.read(mark)
    assert reading.complete and rows(reading) == []


def test_a_table_that_was_made_anew_and_is_empty_is_read_as_empty(lake: Lake) -> None:
    lake.table.append(some(1))
    mark = lake.read().mark
    lake.catalog.drop_table(NAME)
    lake.table = lake.make()
    reading = lake.read(mark, expired="fail")
    assert reading.complete and rows(reading) == []
    mark = json.loads(json.dumps(reading.mark))
    assert lake.source().read(mark) is None
    lake.table.append(some(2))
    reading = lake.read(mark, expired="fail")
    assert reading.complete and reading.notes == () and rows(reading) == [(1, 2, "x2")]


@pytest.mark.parametrize("change", ["delete", "overwrite"])
def test_what_is_more_than_an_append_needs_the_whole_table(lake: Lake, change: str) -> None:
    lake.table.append(some(1, 2))
    mark = lake.read().mark
    lake.table.append(some(3))
    if change == "delete":
        lake.table.delete("id = 1")
        left = [2, 3]
    else:
        lake.table.overwrite(some(5))
        left = [5]
    reading = lake.read(mark)
    assert reading.complete
    assert sorted(i for _, i, _ in rows(reading)) == left
    [note] = reading.notes
    assert "did more than add rows" in note and "read the whole table" in note


def test_a_compaction_changes_nothing(lake: Lake) -> None:
    lake.table.append(some(1, 2))
    mark = lake.read().mark
    lake.table.append(some(3))
    # An overwrite of one snapshot, with as many rows as before.
    with lake.table.transaction() as change, change.update_snapshot().overwrite() as new:
        from pyiceberg.io.pyarrow import _dataframe_to_data_files

        for task in lake.table.scan().plan_files():
            new.delete_data_file(task.file)
        for file in _dataframe_to_data_files(lake.table.metadata, some(1, 2, 3), io=lake.table.io):
            new.append_data_file(file)
    lake.rename_operation("replace")
    reading = lake.read(mark)
    assert not reading.complete
    assert rows(reading) == [(1, 3, "x3")]
    assert lake.source().read(reading.mark) is None


def test_a_replacement_that_loses_rows_is_not_believed(lake: Lake) -> None:
    lake.table.append(some(1, 2))
    mark = lake.read().mark
    lake.table.delete("id = 1")
    lake.rename_operation("replace")
    reading = lake.read(mark)
    assert reading.complete and rows(reading) == [(1, 2, "x2")]
    assert "(replace) did more than add rows" in reading.notes[0]


def test_an_expired_snapshot(lake: Lake) -> None:
    lake.table.append(some(1))
    mark = lake.read().mark
    lake.table.append(some(2))
    lake.table.maintenance.expire_snapshots().by_id(mark["snapshot"]).commit()
    reading = lake.read(mark)
    assert reading.complete and len(rows(reading)) == 2
    assert f"snapshot {mark['snapshot']}, which was read last, has expired" in reading.notes[0]
    with pytest.raises(InputError, match=r"has expired.*`expired: rescan`") as caught:
        lake.read(mark, expired="fail")
    assert (caught.value.source, caught.value.field) == (NAME, "source.expired")


def test_a_rollback(lake: Lake) -> None:
    lake.table.append(some(1))
    first = lake.table.current_snapshot()
    assert first is not None
    lake.table.append(some(2))
    mark = lake.read().mark
    lake.table.manage_snapshots().rollback_to_snapshot(first.snapshot_id).commit()
    reading = lake.read(mark)
    assert reading.complete and rows(reading) == [(1, 1, "x1")]
    assert "not in the history" in reading.notes[0]
    with pytest.raises(InputError, match="not in the history"):
        lake.read(mark, expired="fail")


def test_another_table_of_the_same_name(lake: Lake) -> None:
    lake.table.append(some(1))
    mark = lake.read().mark
    lake.catalog.drop_table(NAME)
    lake.table = lake.make()
    lake.table.append(some(2))
    reading = lake.read(mark, expired="fail")
    assert reading.complete and rows(reading) == [(1, 2, "x2")]
    assert "another one than was read last" in reading.notes[0]


def test_a_column_that_is_gone(lake: Lake) -> None:
    lake.table.append(some(1))
    columns = {"subject": "name"}
    mark = lake.read(columns=columns).mark
    with lake.table.update_schema() as update:
        update.rename_column("name", "names")
    lake.table.append(some(2).rename_columns(["id", "names"]))
    with pytest.raises(InputError, match=r"no column 'name'.*did you mean 'names'") as caught:
        lake.read(mark, columns=columns)
    assert (caught.value.source, caught.value.field) == (NAME, "source.columns.subject")
    # What was written under the old name comes under the new one.
    [first, _] = [row.raw for portion in lake.read().rows for row in portion]
    assert first == {"id": 1, "names": "x1"}


def test_a_new_column_is_empty_in_older_rows(lake: Lake) -> None:
    lake.table.append(some(1))
    with lake.table.update_schema() as update:
        from pyiceberg.types import StringType

        update.add_column("city", StringType())
    [[row]] = lake.read(columns={"object": "city"}).rows
    assert row.raw == {"id": 1, "name": "x1", "city": None}


def test_a_condition_keeps_the_numbers_of_the_table(lake: Lake) -> None:
    lake.table.append(some(1, 2, 3))
    lake.table.append(some(4, 5, 6))
    assert [r[:2] for r in rows(lake.read(where="id % 2 = 0"))] == [(2, 2), (4, 4), (6, 6)]


@pytest.mark.parametrize("where", ["nme = 'x'", "id > 1; SELECT 1"])
def test_a_wrong_condition_is_told_before_rows_are_read(lake: Lake, where: str) -> None:
    lake.table.append(some(1))
    with pytest.raises(InputError) as caught:
        lake.source(where=where).read(None)
    assert (caught.value.source, caught.value.field) == (NAME, "source.where")


def test_large_files_come_in_portions(lake: Lake) -> None:
    lake.table.append(some(*range(25_000)))
    portions = list(lake.read().rows)
    assert [len(portion) for portion in portions] == [10_000, 10_000, 5_000]
    assert portions[2][-1].row == 25_000


def test_a_table_is_read_as_it_was_when_it_was_opened(lake: Lake) -> None:
    lake.table.append(some(1))
    reading = lake.read()
    lake.table.overwrite(some(2))
    assert rows(reading) == [(1, 1, "x1")]


def test_a_file_that_goes_while_it_is_read(lake: Lake) -> None:
    lake.table.append(some(1))
    reading = lake.read()
    for file in lake.folder.rglob("*.parquet"):
        file.unlink()
    with pytest.raises(InputError, match=r"^facts\.people: a file is gone.*run again"):
        list(reading.rows)


def test_reading_writes_nothing(lake: Lake) -> None:
    lake.table.append(some(1))
    before = {path: path.stat().st_mtime_ns for path in lake.folder.rglob("*")}
    list(lake.read().rows)
    lake.source().settle(lake.read().mark)
    assert {path: path.stat().st_mtime_ns for path in lake.folder.rglob("*")} == before


# --- Names and catalogs ------------------------------------------------------------------------


def test_names(lake: Lake) -> None:
    assert lake.source().name == "iceberg:facts.people"
    assert lake.source(name="people").name == "people"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("facts.peple", "no table 'peple' in the namespace 'facts'; did you mean 'people'"),
        ("fakts.people", "no namespace 'fakts'"),
        ("people", "must be `namespace.table`"),
    ],
)
def test_no_such_table(lake: Lake, table: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        lake.source(table=table).read(None)
    assert caught.value.field == "source.table"


def test_no_such_catalog(lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, but long enough to be taken for one" * 9)
    for catalog, message in {
        str(tmp_path / "none.db"): "none.db .source.catalog.: no such file",
        str(tmp_path / "text.db"): "text.db .source.catalog.: not an Iceberg catalog in SQLite",
        "nowhere": "neither a SQLite file nor a catalog",
        "postgresql://user:secret-word@host/db": "is a location",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            lake.source(catalog=catalog).read(None)
        assert "secret-word" not in str(caught.value)
    assert not (tmp_path / "none.db").exists()


def test_a_catalog_by_name(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    lake.table.append(some(1))
    (lake.folder / ".pyiceberg.yaml").write_text(
        f"catalog:\n  prod:\n    type: sql\n    uri: '{lake.uri}'\n"
    )
    monkeypatch.setenv("PYICEBERG_HOME", str(lake.folder))
    assert rows(lake.read(catalog="prod")) == [(1, 1, "x1")]
    with pytest.raises(InputError, match="did you mean 'prod'"):
        lake.read(catalog="prot")


def test_a_catalog_by_its_properties(lake: Lake) -> None:
    lake.table.append(some(1))
    assert rows(lake.read(catalog={"type": "sql", "name": "prod", "uri": lake.uri}))


def test_two_catalogs_in_one_file(lake: Lake) -> None:
    second = load_catalog("test", **lake.catalog.properties)
    second.create_namespace("facts")
    second.create_table("facts.others", schema=some().schema).append(some(4))
    [[row]] = lake.read(table="facts.others").rows
    assert row.raw["id"] == 4
    second.create_table(NAME, schema=some().schema, location=f"{lake.folder}/elsewhere")
    with pytest.raises(InputError, match=r"catalogs prod, test in this file.*name: prod"):
        lake.read()


@pytest.mark.parametrize(
    "properties",
    [
        {"type": "rest", "uri": "http://me:secret-word@127.0.0.1:9", "token": "secret-word"},
        {"uri": "ftp://me:secret-word@127.0.0.1"},
        {"uri": "ftp://me:secret%2Dword@127.0.0.1"},
        {"type": "secret-word-type", "token": "secret-word"},
        {"py-catalog-impl": "secret-word.x", "token": "secret-word"},
        {"type": "sql"},
    ],
)
def test_wrong_properties_are_told_without_secrets(
    lake: Lake, properties: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(InputError) as caught:
        lake.read(catalog=properties)
    assert caught.value.field == "source.catalog"
    assert "secret-word" not in str(caught.value) and "secret%2Dword" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_without_the_package(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyiceberg", "pyiceberg.table"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'memedit\[iceberg\]'"):
        lake.source().read(None)


def test_a_warehouse_at_s3(s3: str, s3_server: SeaweedServer, tmp_path: Path) -> None:
    lake = Lake(
        tmp_path,
        warehouse=s3,
        **{
            "s3.endpoint": s3_server.endpoint,
            "s3.access-key-id": s3_server.access_key,
            "s3.secret-access-key": s3_server.secret_key,
            "s3.region": "us-east-1",
        },
    )
    lake.table.append(some(1))
    reading = lake.read()
    assert rows(reading) == [(1, 1, "x1")]
    lake.table.append(some(2))
    assert rows(lake.read(reading.mark)) == [(1, 2, "x2")]
