"""Rows out of the batches of a table: the columns there must be, and the condition that is met.

Knows Arrow, and SQL conditions, which DuckDB evaluates; does not know where a batch comes from, nor
what a row means.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memedit.errors import InputError
from workflows.ingestion.source import SourceRow, Unreadable
from workflows.wording import did_you_mean

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

FIELD = "source.where"
PORTION = 10_000
"""Rows that are Python objects at the same time."""


def matching(batch: pa.RecordBatch | pa.Table, where: str) -> pa.Table:
    """The rows that meet a condition, in their order; columns keep their types.

    Args:
        batch: Some rows.
        where: An SQL condition over its columns, in the dialect of DuckDB.

    Raises:
        InputError: It is not one condition, names a column that is not there, or fails at a value.
    """
    import pyarrow as pa

    table = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
    return _taken(table, numbers(table, where))


def require_columns(wanted: Mapping[str, str], found: Sequence[str], *, source: object) -> None:
    """Check that a table has each column that a fact takes something from.

    Args:
        wanted: Field of a fact -> column.
        found: The table's columns.
        source: The table.

    Raises:
        InputError: One is gone, or never was there.
    """
    for name, column in wanted.items():
        if column not in found:
            raise InputError(
                f"no column {column!r} in the table: gone, renamed or misspelt"
                + did_you_mean(column, found),
                source=source,
                field=f"source.columns.{name}",
            )


def require_condition(where: str | None, schema: pa.Schema, *, source: object) -> None:
    """Check a condition before any row is read.

    Raises:
        InputError: It cannot be one over these columns.
    """
    if where is not None:
        try:
            matching(schema.empty_table(), where)
        except InputError as error:
            raise _in(source, error) from None


def portions(
    batches: Iterable[pa.RecordBatch | pa.Table],
    *,
    place: str,
    where: str | None,
) -> Iterator[list[SourceRow]]:
    """All rows of some batches that meet a condition, numbered through from 1 before it is asked.

    Args:
        batches: The rows, in their order.
        place: What the rows' place is called.
        where: An SQL condition.

    Raises:
        InputError: The condition fails at a value.
    """
    first = 1
    for batch in batches:
        for start in range(0, batch.num_rows, PORTION):
            part = batch.slice(start, PORTION)
            rows = _rows(part, place=place, first=first, where=where)
            first += part.num_rows
            if rows:
                yield rows


def _rows(
    batch: pa.RecordBatch | pa.Table,
    *,
    place: str,
    first: int,
    where: str | None,
) -> list[SourceRow]:
    import pyarrow as pa

    table = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
    found = list(range(table.num_rows))
    if where is not None:
        try:
            found = numbers(table, where)
        except InputError as error:
            raise _in(place, error) from None
        table = _taken(table, found)
    return [
        SourceRow(raw=raw, place=place, row=first + number)
        for number, raw in zip(found, _values(table), strict=True)
    ]


def _values(table: pa.Table) -> list[Any]:
    """Python's values of each row; `Unreadable` for one that has a value Python has no type for."""
    import pyarrow as pa

    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(table.slice(n, 1)) for n in range(table.num_rows)]


def _value(row: pa.Table) -> Any:
    import pyarrow as pa

    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            [values[name]] = column.to_pylist()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            values[name], wrong[name] = "…", str(error)
    if not wrong:
        return values
    field, reason = next(iter(wrong.items()))
    return Unreadable(
        reason=f"a value that cannot be read: {reason}", text=str(values), field=field
    )


def _in(source: object, error: InputError) -> InputError:
    return InputError(error.message, source=source, field=error.field)


# --- Conditions --------------------------------------------------------------------------------


@functools.cache
def _database() -> duckdb.DuckDBPyConnection:
    """An empty database of this module's own, from which no file, network or variable is seen."""
    import duckdb

    database = duckdb.connect(
        ":memory:",
        config={
            "enable_external_access": False,
            "python_enable_replacements": False,
            "threads": 1,  # a batch is too small for more
        },
    )
    database.execute("SET GLOBAL TimeZone = 'UTC'")  # not the machine's
    database.execute("SET GLOBAL lock_configuration = true")
    return database


def numbers(table: pa.Table, where: str) -> list[int]:
    """0-based numbers of the rows that meet a condition, ascending.

    Raises:
        InputError: As `matching`.
    """
    import duckdb
    import pyarrow as pa

    taken = {name.casefold() for name in table.column_names}
    number = "row number"
    while number in taken:
        number += "_"
    numbered = table.append_column(number, pa.array(range(table.num_rows), pa.int64()))
    query = f'SELECT "{number}" FROM batch WHERE (\n{where}\n)'
    with _database().cursor() as database:
        try:
            # Alone and in brackets it must be one statement: so no bracket closes the other one,
            # and nothing (FROM, LIMIT, a second statement) follows the expression.
            for text in (f"SELECT\n{where}\n", query):
                if len(database.extract_statements(text)) != 1:
                    raise _no_condition("more than one statement", table)
            database.register("batch", numbered)
            return sorted(number for (number,) in database.execute(query).fetchall())
        except duckdb.Error as error:
            text = str(error).partition("\n\n")[0].replace("\n", "; ")
            raise _no_condition(text, table) from None


def _no_condition(reason: str, table: pa.Table) -> InputError:
    return InputError(
        f"not an SQL condition over the columns: {reason}; columns found: "
        + (", ".join(table.column_names) or "none"),
        field=FIELD,
    )


def _taken(table: pa.Table, numbers: list[int]) -> pa.Table:
    import pyarrow as pa

    if len(numbers) == table.num_rows:
        return table
    mask = [False] * table.num_rows
    for number in numbers:
        mask[number] = True
    return table.filter(pa.array(mask, pa.bool_()))
