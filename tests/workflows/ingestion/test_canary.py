"""Files of canaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memedit.errors import InputError
from tests.workflows.runs import write_rows
from workflows.ingestion.canary import Canary, read_canaries

GOOD = {"prompt": "The capital of Germany is", "expect": "Berlin"}


def read(folder: Path, *rows: Any) -> tuple[Canary, ...]:
    return read_canaries(str(write_rows(folder / "c.jsonl", rows)))


def test_all_that_a_canary_can_have(tmp_path: Path) -> None:
    full = {"prompt": "x", "expect": ["a", " b "], "forbid": ["c"], "tokens": 3}
    assert read(tmp_path, GOOD, "", full, {"prompt": "y", "forbid": "d"}) == (
        Canary(row=1, prompt=GOOD["prompt"], expect=("Berlin",), forbid=(), tokens=20),
        Canary(row=3, prompt="x", expect=("a", "b"), forbid=("c",), tokens=3),
        Canary(row=4, prompt="y", expect=(), forbid=("d",), tokens=20),
    )


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"prompt": "x"}, "expect", "neither expect nor forbid"),
        ({"prompt": "x", "expect": []}, "expect", "neither expect nor forbid"),
        ({"prompt": "x", "expect": ""}, "expect", "empty"),
        ({"prompt": "x", "expect": 3}, "expect", "expected text"),
        ({"prompt": "x", "expect": [["a"]]}, "expect", "expected text"),
        ({"prompt": "x", "forbid": "a\nb"}, "forbid", "control character"),
        ({"expect": "x"}, "prompt", "expected text"),
        ({"prompt": " ", "expect": "x"}, "prompt", "whitespace"),
        ({**GOOD, "expected": "x"}, "expected", "did you mean 'expect'"),
        ({**GOOD, "tokens": 0}, "tokens", "from 1 to 1000"),
        ({**GOOD, "tokens": 1001}, "tokens", "from 1 to 1000"),
        ({**GOOD, "tokens": True}, "tokens", "from 1 to 1000"),
        ({**GOOD, "tokens": "5"}, "tokens", "from 1 to 1000"),
        (json.dumps(["x"]), None, "expected an object"),
        ("{", None, "not JSON"),
        ('{"prompt": "\\ud800", "expect": "x"}', "prompt", "U+D800"),
    ],
)
def test_a_row_that_is_wrong_is_named(
    tmp_path: Path, row: Any, field: str | None, reason: str
) -> None:
    with pytest.raises(InputError) as raised:
        read(tmp_path, GOOD, row)
    error = raised.value
    assert (error.row, error.field) == (2, field)
    assert str(error.source) == str(tmp_path / "c.jsonl")
    assert reason in error.message


def test_a_file_without_rows_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row"):
        read(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_canaries(str(tmp_path / "none.jsonl"))
