"""Cron lines: those that Kubernetes takes, and what is said of the others."""

from __future__ import annotations

import pytest

from memedit.errors import InputError
from workflows.cron import check_cron


@pytest.mark.parametrize(
    "line",
    [
        "0 2 * * *",
        "*/15 0-6 1,15 * MON-FRI",
        "5/20 2 ? JAN,jul 0",
        "59 23 31 12 6",
        "0 0 29 2 *",
        "0 0 31 2 SUN",  # a day of the week is enough
        "1-59/2 * * * *",
        "@daily",
    ],
)
def test_lines_that_are_some(line: str) -> None:
    assert check_cron(line) == line


def test_needless_spaces_go() -> None:
    assert check_cron("  0\t2 *  * * ") == "0 2 * * *"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("", "has 0 fields"),
        ("0 2 * *", "has 4 fields"),
        ("0 0 2 * * *", "has 6 fields"),
        ("60 2 * * *", "0 to 59"),
        ("0 24 * * *", "0 to 23"),
        ("0 2 0 * *", "1 to 31"),
        ("0 2 * 13 *", "1 to 12"),
        ("0 2 * * 7", "Sunday is 0"),
        ("0 2 * * SON", "'SON' is no number or SUN to SAT"),
        ("0 2 * MON *", "'MON' is no number or JAN to DEC"),
        ("0 5-2 * * *", "ends before it begins"),
        ("*/0 2 * * *", "step"),
        ("*/x 2 * * *", "step"),
        ("0 2 *-3 * *", "write a number"),
        ("0, 2 * * *", "write a number"),
        ("-1 2 * * *", "write a number"),
        ("1.5 2 * * *", "write a number"),
        ("٣ 2 * * *", "write a number"),
        ("0 2 L * *", "'L' is no number"),
        ("0 2 * * 1#2", "write a number"),
        ("0 0 30 2 *", "never comes"),
        ("0 0 31 4,6,9,11 *", "never comes"),
        ("@nightly", "@hourly"),
        ("@every 1h", "@hourly"),
        ("@reboot", "@hourly"),
        ("CRON_TZ=Asia/Tokyo 0 2 * * *", "--time-zone"),
    ],
)
def test_lines_that_are_none(line: str, hint: str) -> None:
    with pytest.raises(InputError, match=r"\[schedule\]") as caught:
        check_cron(line)
    assert hint in str(caught.value)
