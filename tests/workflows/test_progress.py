from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from memedit.errors import InputError
from memedit.outcome import STAGES
from memedit.progress import UnitReport
from workflows.progress import (
    JsonProgress,
    PlainProgress,
    RichProgress,
    Timed,
    duration,
    progress_for,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.417, "0.42 s"),
        (9.999, "10.0 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.9, "1 h 00 min"),
        (7320, "2 h 02 min"),
    ],
)
def test_durations_read_well_at_every_size(seconds, text):
    assert duration(seconds) == text


def test_plain_writes_start_end_and_a_line_every_ten_seconds():
    out, clock = io.StringIO(), Clock()
    with PlainProgress(out, clock=clock) as progress:
        progress.start("targets", total=100, unit="facts")
        for _ in range(5):
            clock.now += 4
            progress.advance("targets", 10, loss=0.25)
        progress.finish("targets")
    assert out.getvalue().splitlines() == [
        "targets: started, 100 facts",
        "targets: 30/100 facts, 2.5/s, 0:28 left, z loss 0.25",
        "targets: done in 20.0 s, 50/100 facts, 2.5/s, z loss 0.25",
    ]


def test_plain_says_which_stage_was_stopped_by_an_error():
    out = io.StringIO()
    with pytest.raises(ValueError), PlainProgress(out, clock=Clock()) as progress:
        progress.start("solve")
        raise ValueError
    assert out.getvalue().splitlines()[-1] == "solve: stopped in 0.00 s"


def test_json_lines_are_strict_and_complete_and_not_too_many():
    out, clock = io.StringIO(), Clock()
    with JsonProgress(out, "run-1", clock=clock) as progress:
        progress.start("stats", total=1000, unit="tokens")
        for _ in range(100):
            clock.now += 0.1
            progress.advance("stats", 10, error=float("nan"))
        progress.message("two facts\nlook up the sink")
        progress.finish("stats")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(x, parse_constant=refuse) for x in out.getvalue().splitlines()]
    assert [x["event"] for x in lines[:2]] == ["start", "advance"]
    assert 8 <= sum(x["event"] == "advance" for x in lines) <= 10
    assert all(x["run_id"] == "run-1" and x["time"] and x["level"] for x in lines)
    assert lines[-1] | {"time": ""} == {
        "time": "",
        "level": "info",
        "event": "finish",
        "stage": "stats",
        "done": 1000,
        "total": 1000,
        "unit": "tokens",
        "seconds": 10.0,
        "measures": {"error": None},
        "run_id": "run-1",
    }
    assert lines[-2]["level"] == "warning" and "sink" in lines[-2]["message"]


def test_a_unit_is_a_line_for_machines_only():
    failed = UnitReport(
        work="targets", unit_id=7, worker="worker 2 of 8", seconds=1.23456, attempt=1, failure="hit"
    )
    out, plain = io.StringIO(), io.StringIO()
    for progress in (JsonProgress(out, "run-1"), PlainProgress(plain)):
        Timed(progress).unit(failed)
        Timed(progress).unit(replace(failed, attempt=2, failure=None))
        progress.message("see http://head:8265", warning=False)
    first, second, third = map(json.loads, out.getvalue().splitlines())
    assert (first["event"], first["level"], first["failure"]) == ("unit", "warning", "hit")
    assert (second["unit_id"], second["attempt"], second["seconds"]) == (7, 2, 1.235)
    assert (second["level"], second["run_id"]) == ("info", "run-1") and "failure" not in second
    assert third["level"] == "info"
    assert plain.getvalue() == "see http://head:8265\n"


def _drawn(width: int = 80) -> tuple[io.StringIO, RichProgress]:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=width, color_system=None, legacy_windows=False
    )
    return out, RichProgress(out, console=console)


def _last_picture(out: io.StringIO) -> str:
    return out.getvalue().split("\x1b[2K")[-1]


def test_rich_keeps_finished_stages_as_ticked_lines_with_their_seconds():
    out, progress = _drawn()
    with progress:
        progress.start("load")
        progress.finish("load")
        progress.start("targets", total=8, unit="facts")
        progress.advance("targets", 8, loss=0.21)
        progress.finish("targets")
    lines = [x.rstrip() for x in _last_picture(out).splitlines()]
    assert lines[0].startswith("✓ load") and lines[0].endswith(" s")
    assert lines[1].startswith("✓ targets") and "8/8 facts" in lines[1]
    assert "z loss 0.21" in lines[1]


def test_what_was_there_already_is_no_speed():
    out, clock = io.StringIO(), Clock()
    with PlainProgress(out, clock=clock) as progress:
        progress.start("targets", total=6_040, unit="facts")
        progress.advance("targets", 6_000, reused=6_000)
        clock.now += 10
        progress.advance("targets", 20, loss=0.5)
        clock.now += 10
        progress.finish("targets")
    assert out.getvalue().splitlines()[1:] == [
        "targets: 6,020/6,040 facts, 2/s, 0:10 left, reused 6,000  z loss 0.5",
        "targets: done in 20.0 s, 6,020/6,040 facts, 1/s, reused 6,000  z loss 0.5",
    ]


def test_rich_fits_the_terminal_while_it_runs():
    out, progress = _drawn(80)
    with progress:
        progress.start("targets", total=1_000_000, unit="facts")
        progress.advance("targets", 500_000, loss=0.123456, error=0.0123456)
        progress._bars.refresh()
        picture = _last_picture(out)
    assert "500,000/1,000,000 facts" in picture
    assert all(len(x) <= 80 for x in picture.splitlines())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_rich_gives_the_terminal_back_whatever_happens(error):
    out, progress = _drawn()
    with pytest.raises(error), progress:
        progress.start("targets", total=8)
        assert "\x1b[?25l" in out.getvalue(), "the cursor is hidden while it draws"
        raise error
    assert out.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"
    assert "✗ targets" in out.getvalue()
    assert not progress._bars.live.is_started


def test_rich_prints_messages_as_they_are():
    out, progress = _drawn()
    with progress:
        progress.start("load")
        progress.message("column [bold] is odd")
    assert "! column [bold] is odd" in out.getvalue()


def test_rich_needs_no_unicode():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(file=stream, force_terminal=True, width=80)
    with RichProgress(stream, console=console) as progress:
        progress.start("stats", total=2, unit="tokens")
        progress.advance("stats", 1)
        progress._bars.refresh()
        progress.finish("stats")
    stream.flush()
    assert b"stats" in raw.getvalue()


@pytest.mark.parametrize("log_format", ["rich", "plain", "json"])
def test_a_stage_that_was_never_started_does_no_harm(log_format):
    with progress_for(log_format, io.StringIO(), "r") as progress:
        progress.advance("solve", 3)
        progress.finish("solve")


def test_timed_counts_stages_adds_repeats_and_passes_on():
    out, clock = io.StringIO(), Clock()
    with Timed(PlainProgress(out, clock=clock), clock=clock) as timed:
        for seconds in (2.0, 3.0):
            timed.start("evaluate")
            clock.now += seconds
            timed.finish("evaluate")
        timed.start("solve")
        clock.now += 1
        assert timed.timings_s["solve"] == 1.0, "a running stage counts as well"
        timed.message("hello")
    assert timed.timings_s["evaluate"] == 5.0
    assert timed.timings_s["total"] == 6.0
    assert set(timed.timings_s) == {*STAGES, "total"}
    assert "! hello" in out.getvalue()
    assert "solve: done" in out.getvalue(), "closing it closes the receiver behind it"


def test_the_factory_draws_on_terminals_only(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress_for("auto", Terminal(), "r"), RichProgress)
    assert isinstance(progress_for("auto", io.StringIO(), "r"), PlainProgress)
    assert isinstance(progress_for("json", Terminal(), "r"), JsonProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_for("auto", Terminal(), "r"), PlainProgress)
    with pytest.raises(InputError, match="choose auto"):
        progress_for("yaml", io.StringIO(), "r")
