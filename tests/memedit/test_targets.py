"""How facts are put into batches; what z is stands in tests/equivalence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memedit.targets import _POSITIONS_BESIDE, fitting


@pytest.mark.parametrize(
    ("shapes", "rows", "widest", "expected"),
    [
        ([(4, 8)] * 9, 0, 0, 3),  # 12 rows of 8 positions, and 4 more for each row, are 144
        ([(50, 8)], 0, 0, 1),  # one fact alone may be larger than the budget
        ([(4, 8), (4, 8), (4, 5)], 0, 0, 2),  # half full: a narrow one waits
        ([(1, 8), (4, 5), (4, 5), (1, 5)], 0, 0, 3),  # until it is half full, they may join
        ([(4, 8)], 8, 10, 0),  # 12 rows of 10 and 4 would be too many
        ([(2, 8)], 8, 10, 1),
        ([(6, 1)] * 9, 0, 0, 5),  # a row costs more than its one position
        ([], 0, 0, 0),
    ],
)
def test_a_batch_is_bounded_by_its_padded_positions(
    shapes: list[tuple[int, int]], rows: int, widest: int, expected: int
) -> None:
    assert fitting(shapes, budget=150, rows=rows, widest=widest) == expected


@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 30)), min_size=1, max_size=60),
    st.integers(1, 400),
)
def test_every_fact_finds_a_batch_within_the_budget(
    shapes: list[tuple[int, int]], budget: int
) -> None:
    waiting = sorted(shapes, key=lambda shape: shape[1], reverse=True)
    while waiting:
        size = fitting(waiting, budget=budget)
        assert size >= 1
        batch, waiting = waiting[:size], waiting[size:]
        weight = sum(rows for rows, _ in batch) * (batch[0][1] + _POSITIONS_BESIDE)
        assert weight <= budget or size == 1
