from __future__ import annotations

import datetime

import pyarrow as pa
import pytest

from memedit.errors import InputError
from workflows.ingestion.source import Unreadable
from workflows.ingestion.where import PORTION, matching, portions, require_columns

ROWS = pa.table({"id": [1, 2, None, 4], "lang": ["en", "de", "en", None]})


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ("id > 1", [2, 4]),
        ("lang = 'en'", [1, None]),
        ("lang = 'en' AND id IS NOT NULL -- comment", [1]),
        ("lang IS NULL OR (id = 2)", [2, 4]),
        ("id = 1 OR TRUE", [1, 2, None, 4]),
        ("FALSE", []),
        ("\"lang\" LIKE 'd%'", [2]),
    ],
)
def test_rows_that_meet_the_condition_stay_in_order(where: str, ids: list[int | None]) -> None:
    assert matching(ROWS, where).column("id").to_pylist() == ids


def test_a_batch_gives_a_table_with_the_same_columns() -> None:
    [batch] = ROWS.to_batches()
    found = matching(batch, "id = 4")
    assert found.schema == batch.schema
    assert found.to_pylist() == [{"id": 4, "lang": None}]


def test_types_that_duckdb_would_change_stay() -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b"], pa.large_string()),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "many": [["p"], []],
            "parts": [{"k": 1}, {"k": 2}],
        }
    )
    found = matching(table, "parts.k = 2")
    assert found.schema == table.schema
    assert found.column("text").to_pylist() == ["b"]


@pytest.mark.parametrize(
    "where",
    [
        "",
        "id >",
        "id > 1; DROP TABLE batch",
        "1=1); SELECT (1",
        "1=1) UNION SELECT 1 FROM (SELECT 1 WHERE (1",
        "1=1) OR (1=1",
        "id > 1 LIMIT 1",
        "id > 1 ORDER BY id",
        "id > 1 FROM batch",
        "id, lang",
        "count(*) > 1",
        "lang",
        "CAST(lang AS INT) = 1",
        "id = $1",
        "id > 1 /*",
    ],
)
def test_what_is_not_one_condition(where: str) -> None:
    with pytest.raises(InputError, match="columns found: id, lang") as caught:
        matching(ROWS, where)
    assert caught.value.field == "source.where"


def test_an_unknown_column() -> None:
    with pytest.raises(InputError, match=r'"language" not found.*columns found: id, lang'):
        matching(ROWS, "language = 'en'")


@pytest.mark.parametrize(
    "where",
    [
        "EXISTS (SELECT * FROM read_csv('/etc/passwd'))",
        "EXISTS (SELECT * FROM '/etc/passwd')",
        "EXISTS (SELECT * FROM other)",
        "getenv('HOME') = 'x'",
    ],
)
def test_nothing_but_the_batch_is_seen(where: str) -> None:
    other = ROWS
    with pytest.raises(InputError):
        matching(other, where)


def test_moments_are_in_utc() -> None:
    moment = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    table = pa.table({"moment": pa.array([moment], pa.timestamp("us", "UTC"))})
    assert matching(table, "moment = TIMESTAMPTZ '2024-01-01 00:00:00'").num_rows == 1


def test_rows_are_numbered_before_the_condition_is_asked() -> None:
    rows = pa.table({"id": range(2 * PORTION + 5)})
    found = list(portions(rows.to_batches(), place="t", where=f"id % {PORTION} = 1"))
    assert [[(row.row, row.raw) for row in portion] for portion in found] == [
        [(2, {"id": 1})],
        [(PORTION + 2, {"id": PORTION + 1})],
        [(2 * PORTION + 2, {"id": 2 * PORTION + 1})],
    ]


def test_an_error_at_a_value_names_the_table() -> None:
    with pytest.raises(InputError, match=r"^t \[source\.where\]: .*Could not convert"):
        list(portions([ROWS], place="t", where="CAST(lang AS INT) = 1"))


def test_a_value_that_python_does_not_have_is_one_unreadable_row() -> None:
    beyond = pa.array([0, 1 << 62], pa.int64()).cast(pa.timestamp("s"))
    [rows] = portions([pa.table({"id": [1, 2], "at": beyond})], place="t", where=None)
    assert rows[0].raw == {"id": 1, "at": datetime.datetime(1970, 1, 1)}
    assert isinstance(rows[1].raw, Unreadable)
    assert rows[1].raw.field == "at"
    assert "'id': 2" in rows[1].raw.text


def test_a_column_that_is_gone() -> None:
    require_columns({"subject": "person"}, ["person", "city"], source="t")
    with pytest.raises(InputError, match=r"'persn'.*did you mean 'person'.*city, person") as caught:
        require_columns({"subject": "persn"}, ["person", "city"], source="t")
    assert caught.value.field == "source.columns.subject"
    assert caught.value.source == "t"
