"""The embedded scheduler: when it fires, and what a clock that is set does to it."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from memedit.errors import GateError, InputError
from memedit.progress import Silent
from tests.heard import Heard
from workflows.cron import MACROS
from workflows.ingestion.every import Schedule, repeat

BERLIN = ZoneInfo("Europe/Berlin")


class Machine:
    """A clock that goes on while somebody sleeps.

    Args:
        start: The time in UTC.
        jumps: Number of a nap -> seconds by which the clock is set after it.
        naps: After that many somebody stops the schedule.
    """

    def __init__(self, start: str, *, jumps: dict[int, float] | None = None, naps: int = 10_000):
        self.time = datetime.fromisoformat(start).replace(tzinfo=UTC)
        self.jumps = dict(jumps or {})
        self.naps = naps
        self.asked: list[float] = []

    def now(self) -> datetime:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        if len(self.asked) > self.naps:
            raise KeyboardInterrupt
        self.pass_by(seconds)
        if jump := self.jumps.pop(len(self.asked), None):
            self.pass_by(jump)

    def pass_by(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


def fires(
    line: str,
    machine: Machine,
    *,
    zone: str = "UTC",
    takes: list[float] | None = None,
    progress: Silent | None = None,
) -> list[str]:
    """The times at which runs began, in UTC, until the machine has slept enough."""
    began: list[str] = []
    durations = iter(takes or [])

    def run() -> None:
        began.append(f"{machine.time:%Y-%m-%d %H:%M:%S}")
        machine.pass_by(next(durations, 1))

    repeat(line, zone, run, now=machine.now, sleep=machine.sleep, progress=progress or Silent())
    return began


def times(line: str, zone: str, start: str, count: int) -> list[str]:
    """The next times of a schedule on the clocks of its zone."""
    schedule = Schedule.of(line, zone)
    moment = datetime.fromisoformat(start).astimezone(UTC)
    shown = []
    for _ in range(count):
        moment = schedule.after(moment)
        shown.append(moment.astimezone(schedule.zone).isoformat(timespec="minutes"))
    return shown


def test_it_runs_at_each_time_and_sleeps_in_short_pieces() -> None:
    machine = Machine("2026-01-01T01:30:10", naps=2 * 60 * 25)
    assert fires("0 2 * * *", machine) == ["2026-01-01 02:00:00", "2026-01-02 02:00:00"]
    assert max(machine.asked) <= 30


def test_it_tells_when_the_next_run_is_on_the_clock_of_the_zone() -> None:
    heard = Heard()
    fires("0 2 * * *", Machine("2026-07-01T00:00:00", naps=2), zone="Europe/Berlin", progress=heard)
    assert heard.texts == [
        "the next run is at 2026-07-02 02:00 CEST (Europe/Berlin)",
        "the schedule was stopped; no run was going",
    ]


def test_a_start_at_the_very_minute_waits_for_the_next() -> None:
    assert fires("* * * * *", Machine("2026-01-01T02:00:00", naps=2)) == ["2026-01-01 02:01:00"]


@pytest.mark.parametrize(
    "error", [GateError("score is 12"), ValueError("what"), ZeroDivisionError()]
)
def test_a_run_that_fails_is_told_and_the_schedule_goes_on(error: Exception) -> None:
    machine, heard, runs = Machine("2026-01-01T00:00:30", naps=10), Heard(), 0

    def run() -> None:
        nonlocal runs
        runs += 1
        raise error

    repeat("* * * * *", "UTC", run, now=machine.now, sleep=machine.sleep, progress=heard)
    assert runs == 5
    told = [text for text in heard.texts if "the run failed, and the schedule goes on" in text]
    assert len(told) == 5
    assert (str(error) or "ZeroDivisionError") in told[0]


def test_keys_in_an_error_are_not_told() -> None:
    machine, heard = Machine("2026-01-01T00:00:30", naps=1), Heard()

    def run() -> None:
        raise InputError("cannot read s3://AKIA:hidden@bucket/facts")

    repeat("* * * * *", "UTC", run, now=machine.now, sleep=machine.sleep, progress=heard)
    assert "s3://***@bucket/facts" in "\n".join(heard.texts)
    assert "hidden" not in "\n".join(heard.texts)


def test_an_interrupted_run_is_not_taken_for_a_failed_one() -> None:
    machine = Machine("2026-01-01T00:00:00")

    def run() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repeat("* * * * *", "UTC", run, now=machine.now, sleep=machine.sleep, progress=Silent())


def test_runs_missed_during_a_long_one_are_made_up_for_once() -> None:
    heard = Heard()
    machine = Machine("2026-01-01T00:00:00", naps=40)
    began = fires("*/5 * * * *", machine, takes=[17 * 60 + 20], progress=heard)
    assert began[:3] == ["2026-01-01 00:05:00", "2026-01-01 00:22:20", "2026-01-01 00:25:00"]
    late = [text for text in heard.texts if "late" in text]
    assert late == [
        "the run of 2026-01-01 00:10 UTC is late; this one makes up for all that were missed since"
    ]


def test_a_machine_that_slept_makes_up_once() -> None:
    machine = Machine("2026-01-01T00:00:00", jumps={3: 5 * 3600}, naps=130)
    assert fires("0 * * * *", machine) == ["2026-01-01 05:01:30", "2026-01-01 06:00:00"]


@pytest.mark.parametrize("back", [-1.5, -40.0, -600.0, -86_400.0])
def test_a_clock_that_goes_back_gives_no_minute_a_second_run(back: float) -> None:
    # The second nap is the first one after the run.
    machine = Machine("2026-01-01T00:59:40", jumps={2: back}, naps=2 * 60 * 26)
    began = fires("0 * * * *", machine)
    assert began[0] == "2026-01-01 01:00:00"
    assert len(set(began)) == len(began) > 1


def test_a_clock_that_goes_back_during_a_run_gives_no_minute_a_second_run() -> None:
    machine = Machine("2026-01-01T00:04:50", naps=40)
    began = fires("*/5 * * * *", machine, takes=[1, -7 * 60, 1])
    assert began[:3] == ["2026-01-01 00:05:00", "2026-01-01 00:10:00", "2026-01-01 00:15:00"]


def test_a_late_run_counts_for_its_own_minute_too() -> None:
    machine = Machine("2026-01-01T00:00:00", naps=30)
    began = fires("*/5 * * * *", machine, takes=[300.2, -1])
    # The second began at 00:10:00.2, and when it was over it was 00:09:59.2 again.
    assert began[:3] == ["2026-01-01 00:05:00", "2026-01-01 00:10:00", "2026-01-01 00:15:00"]


def test_a_clock_that_was_years_ahead_does_not_silence_the_schedule() -> None:
    heard = Heard()
    machine = Machine("2036-01-01T00:30:00", jumps={2: -10 * 365 * 86_400}, naps=70)
    began = fires("0 * * * *", machine, progress=heard)
    assert [time[:4] for time in began] == ["2026"]
    assert [text[:23] for text in heard.texts[:2]] == [
        "the next run is at 2036",
        "the next run is at 2026",
    ]


def test_a_skipped_hour_runs_right_after_it() -> None:
    assert times("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00+00:00", 2) == [
        "2026-03-29T03:00+02:00",
        "2026-03-30T02:30+02:00",
    ]
    machine = Machine("2026-03-29T00:30:00", naps=200)
    assert fires("30 2 * * *", machine, zone="Europe/Berlin") == ["2026-03-29 01:00:00"]


def test_a_doubled_hour_runs_once() -> None:
    assert times("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00+00:00", 2) == [
        "2026-10-25T02:30+02:00",
        "2026-10-26T02:30+01:00",
    ]
    machine = Machine("2026-10-25T00:00:00", naps=2 * 60 * 4)
    assert fires("30 2 * * *", machine, zone="Europe/Berlin") == ["2026-10-25 00:30:00"]


def test_a_start_within_the_second_of_two_hours_waits_for_tomorrow() -> None:
    moment = datetime(2026, 10, 25, 2, 10, tzinfo=BERLIN, fold=1)
    due = Schedule.of("30 2 * * *", "Europe/Berlin").after(moment.astimezone(UTC))
    assert due == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


def test_stars_go_on_by_real_time_when_clocks_change() -> None:
    assert times("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:45+00:00", 4) == [
        "2026-10-25T02:00+01:00",
        "2026-10-25T02:30+01:00",
        "2026-10-25T03:00+01:00",
        "2026-10-25T03:30+01:00",
    ]
    assert times("0 * * * *", "Europe/Berlin", "2026-03-28T23:30+00:00", 3) == [
        "2026-03-29T01:00+01:00",
        "2026-03-29T03:00+02:00",
        "2026-03-29T04:00+02:00",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # 2026-01-01 is a Thursday.
        ("@hourly", ["2026-01-01T01:00", "2026-01-01T02:00"]),
        ("@daily", ["2026-01-02T00:00", "2026-01-03T00:00"]),
        ("@midnight", ["2026-01-02T00:00", "2026-01-03T00:00"]),
        ("@weekly", ["2026-01-04T00:00", "2026-01-11T00:00"]),
        ("@monthly", ["2026-02-01T00:00", "2026-03-01T00:00"]),
        ("@yearly", ["2027-01-01T00:00", "2028-01-01T00:00"]),
        ("@annually", ["2027-01-01T00:00", "2028-01-01T00:00"]),
        ("5/20 2 ? JAN,jul 0", ["2026-01-04T02:05", "2026-01-04T02:25", "2026-01-04T02:45"]),
        ("0 0 * * 5/1", ["2026-01-02T00:00", "2026-01-03T00:00", "2026-01-09T00:00"]),
        ("7-7/20 4 ? * ?", ["2026-01-01T04:07", "2026-01-02T04:07"]),
        ("0 0 ?/10 * *", ["2026-01-11T00:00", "2026-01-21T00:00", "2026-01-31T00:00"]),
        ("0 0 13 * FRI", ["2026-01-02T00:00", "2026-01-09T00:00", "2026-01-13T00:00"]),
        ("0 0 29 2 *", ["2028-02-29T00:00", "2032-02-29T00:00"]),
    ],
)
def test_every_way_to_write_a_line(line: str, expected: list[str]) -> None:
    found = times(line, "UTC", "2026-01-01T00:00+00:00", len(expected))
    assert [text.removesuffix("+00:00") for text in found] == expected


def test_every_macro_has_a_meaning() -> None:
    for macro in MACROS:
        Schedule.of(macro, "UTC")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("0 2 * *", "has 4 fields"),
        ("@reboot", "is not known"),
        ("0 0 31 2 *", "never comes"),
        ("TZ=UTC 0 2 * * *", "--time-zone"),
    ],
)
def test_a_line_that_is_none_is_refused_before_anything_runs(line: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as caught:
        repeat(line, "UTC", _never, sleep=_never, progress=Silent())
    assert caught.value.field == "every"


@pytest.mark.parametrize(
    ("zone", "hint"),
    [
        ("Europe/Berln", "did you mean 'Europe/Berlin'"),
        ("europe/berlin", "did you mean 'Europe/Berlin'"),
        ("Europe", "no time zone"),
        ("", "write UTC"),
        ("/etc/passwd", "no time zone"),
        ("../UTC", "no time zone"),
    ],
)
def test_a_time_zone_that_is_none_is_refused(zone: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as caught:
        repeat("@daily", zone, _never, sleep=_never, progress=Silent())
    assert caught.value.field == "time_zone"


def test_the_real_clock_and_real_sleep() -> None:
    """Real time, but 600 times as fast; stopped from within the third wait."""
    begin, real = datetime.now(UTC), time.monotonic()
    runs: list[datetime] = []

    def now() -> datetime:
        return begin + 600 * timedelta(seconds=time.monotonic() - real)

    def sleep(seconds: float) -> None:
        if len(runs) == 2:
            raise KeyboardInterrupt
        time.sleep(seconds / 600)

    repeat("* * * * *", "UTC", lambda: runs.append(now()), now=now, sleep=sleep, progress=Silent())
    assert len(runs) == 2
    assert runs[0] < runs[1]


def test_the_clock_by_default_is_the_one_on_the_wall() -> None:
    heard = Heard()
    year = datetime.now(UTC).year

    def sleep(seconds: float) -> None:
        assert 0 < seconds <= 30
        raise KeyboardInterrupt

    repeat("@yearly", "UTC", _never, sleep=sleep, progress=heard)
    assert heard.texts[0] in {
        f"the next run is at {following}-01-01 00:00 UTC" for following in (year + 1, year + 2)
    }


def _never(*_: object) -> None:
    raise AssertionError("called")
