from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from memedit.errors import InputError
from tests.s3.fixtures import use_aws_environment
from tests.s3.server import Identity, SeaweedServer
from workflows.ingestion.source import Reading
from workflows.ingestion.source_delta import DeltaSource
from workflows.ingestion.source_settings import DeltaSettings

FEED = {"delta.enableChangeDataFeed": "true"}


def some(*ids: int, name: str = "x") -> pa.Table:
    names = pa.array([f"{name}{i}" for i in ids], pa.string())
    return pa.table({"id": pa.array(ids, pa.int64()), "name": names})


class Lake:
    """A Delta table with rows 1 to 3 in version 0."""

    def __init__(self, path: str, *, feed: bool = True) -> None:
        self.path = path
        write_deltalake(path, some(1, 2, 3), configuration=FEED if feed else {})

    @property
    def table(self) -> DeltaTable:
        return DeltaTable(self.path)

    def append(self, *ids: int) -> None:
        write_deltalake(self.path, some(*ids), mode="append")

    def vacuum(self) -> None:
        self.table.vacuum(0, dry_run=False, enforce_retention_duration=False, full=True)

    def source(self, **settings: Any) -> DeltaSource:
        return DeltaSource(DeltaSettings(**{"path": self.path} | settings))

    def read(self, since: Mapping[str, Any] | None = None, **settings: Any) -> Reading:
        reading = self.source(**settings).read(since)
        assert reading is not None
        return reading

    def rows(self, reading: Reading) -> list[tuple[int, str]]:
        """Id and name of each row; the row numbers must go through."""
        found = [row for portion in reading.rows for row in portion]
        assert {row.place for row in found} <= {self.path}
        assert [row.row for row in found] == list(range(1, len(found) + 1))
        assert all(row.raw.keys() == {"id", "name"} for row in found)
        return [(row.raw["id"], row.raw["name"]) for row in found]


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "a table"))


@pytest.fixture
def without_feed(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "plain"), feed=False)


def test_the_first_reading_is_the_whole_table_with_older_files_first(lake: Lake) -> None:
    lake.append(9)
    lake.append(5)
    reading = lake.read()
    assert [i for i, _ in lake.rows(reading)] == [1, 2, 3, 9, 5]
    assert reading.complete and reading.notes == ()
    assert reading.snapshot == "version 2"
    assert json.loads(json.dumps(reading.mark)) == {
        "table_id": str(lake.table.metadata().id),
        "version": 2,
    }
    assert lake.source().read(reading.mark) is None


def test_rows_that_were_added_come_by_version(lake: Lake) -> None:
    mark = lake.read().mark
    for number in (9, 4, 7):
        lake.append(number)
    reading = lake.read(mark)
    assert not reading.complete and reading.notes == ()
    assert reading.snapshot == "version 3"
    assert lake.rows(reading) == [(9, "x9"), (4, "x4"), (7, "x7")]
    assert lake.source().read(reading.mark) is None


@pytest.mark.parametrize("change", ["delete", "update", "overwrite", "merge", "restore"])
def test_where_rows_were_taken_back_the_whole_table_is_read(lake: Lake, change: str) -> None:
    lake.append(4)
    mark = lake.read().mark
    lake.append(5)
    expected = {1: "x1", 2: "x2", 3: "x3", 4: "x4", 5: "x5"}
    if change == "delete":
        lake.table.delete("id = 3")
        del expected[3]
    elif change == "update":
        lake.table.update(predicate="id = 2", updates={"name": "'new'"})
        expected[2] = "new"
    elif change == "overwrite":
        write_deltalake(lake.path, some(3, 4), mode="overwrite")
        expected = {3: "x3", 4: "x4"}
    elif change == "restore":
        lake.table.restore(0)
        expected = {1: "x1", 2: "x2", 3: "x3"}
    else:
        same = "s.id = t.id"
        merge = lake.table.merge(some(2, 7, name="m"), same, source_alias="s", target_alias="t")
        merge.when_matched_update_all().when_not_matched_insert_all().execute()
        expected |= {2: "m2", 7: "m7"}
    reading = lake.read(mark, expired="fail")
    assert reading.complete
    assert reading.notes == ("read the whole table: rows were changed or deleted since version 1",)
    assert sorted(lake.rows(reading)) == sorted(expected.items())
    assert lake.source().read(reading.mark) is None


def test_versions_that_change_no_row_give_none(lake: Lake) -> None:
    lake.append(4)
    mark = lake.read().mark
    lake.table.optimize.compact()
    lake.vacuum()
    reading = lake.read(mark)
    assert not reading.complete and lake.rows(reading) == []
    assert reading.mark["version"] > mark["version"]


@pytest.mark.parametrize("where", ["nme = 'x'", "_change_type = 'insert'", "id > 1; SELECT 1"])
def test_a_wrong_condition_is_told_before_rows_are_read(lake: Lake, where: str) -> None:
    with pytest.raises(InputError) as caught:
        lake.source(where=where).read(None)
    assert (caught.value.source, caught.value.field) == (lake.path, "source.where")


def test_all_changes_in_portions(lake: Lake) -> None:
    mark = lake.read().mark
    lake.append(*range(25_000))
    assert [len(p) for p in lake.read(mark).rows] == [10_000, 10_000, 5_000]
    assert [len(p) for p in lake.read().rows] == [3, 10_000, 10_000, 5_000]


# --- What needs the whole table ----------------------------------------------------------------


def test_a_table_without_a_feed(without_feed: Lake) -> None:
    mark = without_feed.read().mark
    assert without_feed.source().read(mark) is None
    without_feed.append(4)
    reading = without_feed.read(mark, expired="fail")
    assert reading.complete and len(without_feed.rows(reading)) == 4
    assert "no change data feed; `delta.enableChangeDataFeed = true`" in reading.notes[0]


def test_a_feed_that_began_later(without_feed: Lake) -> None:
    mark = without_feed.read().mark
    without_feed.append(4)
    without_feed.table.alter.set_table_properties(FEED)
    without_feed.append(5)
    reading = without_feed.read(mark)
    assert reading.complete and len(without_feed.rows(reading)) == 5
    assert "began after version 0" in reading.notes[0]
    without_feed.append(6)
    assert without_feed.rows(without_feed.read(reading.mark)) == [(6, "x6")]


def test_a_feed_that_was_off_for_a_while(lake: Lake) -> None:
    mark = lake.read().mark
    lake.table.alter.set_table_properties({"delta.enableChangeDataFeed": "false"})
    lake.table.delete("id = 1")
    lake.table.alter.set_table_properties(FEED)
    reading = lake.read(mark, expired="fail")
    assert reading.complete and len(lake.rows(reading)) == 2
    assert "was off at some time since version 0" in reading.notes[0]


def test_files_that_were_vacuumed(lake: Lake) -> None:
    mark = lake.read().mark
    lake.table.update(predicate="id = 2", updates={"name": "'new'"})
    lake.vacuum()
    reading = lake.read(mark)
    assert reading.complete and len(lake.rows(reading)) == 3
    assert "the changes since version 0, which was read last, are gone" in reading.notes[0]
    with pytest.raises(InputError, match=r"are gone.*`expired: rescan`") as caught:
        lake.read(mark, expired="fail")
    assert (caught.value.source, caught.value.field) == (lake.path, "source.expired")


def test_versions_that_are_gone(lake: Lake) -> None:
    mark = lake.read().mark
    lake.append(4)
    lake.append(5)
    lake.table.create_checkpoint()
    for version in (0, 1):
        (Path(lake.path) / "_delta_log" / f"{version:020}.json").unlink()
    reading = lake.read(mark)
    assert reading.complete and len(lake.rows(reading)) == 5
    assert "are gone" in reading.notes[0]
    with pytest.raises(InputError, match="are gone"):
        lake.read(mark, expired="fail")


def test_another_table_at_the_same_place(lake: Lake, tmp_path: Path) -> None:
    mark = lake.read().mark
    Path(lake.path).rename(tmp_path / "old")
    again = Lake(lake.path)
    reading = again.read(mark, expired="fail")
    assert reading.complete and len(again.rows(reading)) == 3
    assert "another one than was read last" in reading.notes[0]


def test_a_version_that_went_back(lake: Lake) -> None:
    lake.append(4)
    mark = lake.read().mark
    (Path(lake.path) / "_delta_log" / f"{1:020}.json").unlink()
    reading = lake.read(mark, expired="fail")
    assert reading.complete and len(lake.rows(reading)) == 3
    assert "it is at version 0, but was read at 1 before" in reading.notes[0]


def test_an_empty_table(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "t"))
    lake.table.delete()
    reading = lake.read()
    assert reading.complete and lake.rows(reading) == []


def test_a_table_is_read_as_it_was_when_it_was_opened(lake: Lake) -> None:
    reading = lake.read()
    lake.append(4)
    write_deltalake(lake.path, some(8), mode="overwrite")
    assert len(lake.rows(reading)) == 3


def test_a_file_that_goes_while_it_is_read(lake: Lake) -> None:
    reading = lake.read()
    for file in Path(lake.path).glob("*.parquet"):
        file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        list(reading.rows)


def test_a_column_that_is_gone(lake: Lake) -> None:
    columns = {"subject": "name"}
    mark = lake.read(columns=columns).mark
    other = some(1).rename_columns(["id", "names"])
    write_deltalake(lake.path, other, mode="overwrite", schema_mode="overwrite")
    with pytest.raises(InputError, match=r"no column 'name'.*did you mean 'names'") as caught:
        lake.read(mark, columns=columns)
    assert (caught.value.source, caught.value.field) == (lake.path, "source.columns.subject")


def test_a_new_column_is_empty_in_older_rows(lake: Lake) -> None:
    mark = lake.read().mark
    lake.append(4)
    more = some(5).append_column("city", pa.array(["Rome"]))
    write_deltalake(lake.path, more, mode="append", schema_mode="merge")
    for since, cities in ((None, [None] * 4 + ["Rome"]), (mark, [None, "Rome"])):
        [*rows] = [row for portion in lake.read(since).rows for row in portion]
        assert [row.raw["city"] for row in rows] == cities


def test_partitions_are_columns_and_older_files_come_first(tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    for number, lang in enumerate(["b c", "a/%", "b c", "é", None]):
        table = pa.table({"lang": pa.array([lang], pa.string()), "id": [number]})
        write_deltalake(path, table, mode="append", partition_by=["lang"], configuration=FEED)
    reading = DeltaSource(DeltaSettings(path=path)).read(None)
    assert reading is not None
    raws = [row.raw for portion in reading.rows for row in portion]
    assert [(raw["id"], raw["lang"]) for raw in raws] == [
        (0, "b c"),
        (1, "a/%"),
        (2, "b c"),
        (3, "é"),
        (4, None),
    ]


def test_a_table_that_pyarrow_does_not_know(lake: Lake) -> None:
    """Deletion vectors are a feature that the readers in order of files do not have."""
    lake.table.alter.add_feature(_deletion_vectors(), allow_protocol_versions_increase=True)
    assert sorted(i for i, _ in lake.rows(lake.read())) == [1, 2, 3]


def _deletion_vectors() -> Any:
    from deltalake import TableFeatures

    return TableFeatures.DeletionVectors


# --- Places ------------------------------------------------------------------------------------


def test_names(lake: Lake) -> None:
    assert lake.source().name == f"delta:{lake.path}"
    assert lake.source(name="people").name == "people"


def test_no_such_table(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in {"none": "no such folder", "empty": "not a Delta table"}.items():
        source = DeltaSource(DeltaSettings(path=str(tmp_path / name)))
        with pytest.raises(InputError, match=message) as caught:
            source.read(None)
        assert caught.value.field == "source.path"
    assert not (tmp_path / "none").exists()


def test_a_broken_log(lake: Lake) -> None:
    (Path(lake.path) / "_delta_log" / f"{1:020}.json").write_text("{]")
    with pytest.raises(InputError, match="cannot be read"):
        lake.read()


def test_without_the_package(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(InputError, match=r"pip install 'memedit\[delta\]'"):
        lake.read()


def test_a_key_in_the_location_is_not_shown() -> None:
    source = DeltaSource(DeltaSettings(path="s3://AKIA:secret-word@bucket/t"))
    assert "secret-word" not in source.name
    with pytest.raises(InputError, match="keys come from the environment") as caught:
        source.read(None)
    assert "secret-word" not in str(caught.value)


# --- S3 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_a_table_at_s3(
    s3: str, s3_server: SeaweedServer, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv(variable, s3_server.endpoint)
    allow = {"AWS_ALLOW_HTTP": "true"}
    write_deltalake(s3, some(1, 2), configuration=FEED, storage_options=allow)
    source = DeltaSource(DeltaSettings(path=s3))
    reading = source.read(None)
    assert reading is not None
    assert [row.raw["id"] for portion in reading.rows for row in portion] == [1, 2]
    DeltaTable(s3, storage_options=allow).delete("id = 2")
    reading = source.read(reading.mark)
    assert reading is not None and reading.complete
    [[row]] = reading.rows
    assert (row.raw, row.place) == ({"id": 1, "name": "x1"}, s3)
    write_deltalake(s3, some(3), mode="append", storage_options=allow)
    reading = source.read(reading.mark)
    assert reading is not None and not reading.complete
    [[row]] = reading.rows
    assert row.raw == {"id": 3, "name": "x3"}
    assert source.read(reading.mark) is None


def test_errors_at_s3_are_told_without_keys(
    s3: str, s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Identity(access_key=s3_server.access_key, secret_key="wrong-and-secret")
    for identity, path, message in (
        (s3_server.admin, s3, "not a Delta table"),
        (s3_server.admin, "s3://no-such-bucket/t", "cannot be read: .*NoSuchBucket$"),
        (wrong, s3, "access denied; check the AWS keys: .*SignatureDoesNotMatch$"),
    ):
        use_aws_environment(monkeypatch, s3_server.environment(identity=identity))
        with pytest.raises(InputError, match=message) as caught:
            DeltaSource(DeltaSettings(path=path)).read(None)
        assert caught.value.field == "source.path"
        for secret in (identity.secret_key, identity.access_key, "\x1b"):
            assert secret not in str(caught.value)
