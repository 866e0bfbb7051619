"""The live picture of a run: on a terminal, in a plain log, or as JSON lines.

Implements `memedit.progress.Progress` three times and counts the seconds of each stage. Knows
terminals and streams; knows nothing of what the stages do. Every receiver here is a context
manager: leaving it gives the terminal back, whatever happened inside.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from rich import progress as bars
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column
from rich.text import Text

from memedit.errors import InputError
from memedit.outcome import STAGES
from memedit.progress import Progress, UnitReport

Clock = Callable[[], float]

_MEASURES = {"loss": "z loss", "error": "est. error"}
"""What a person calls a measure; others keep their name."""


def duration(seconds: float) -> str:
    """A time for reading: `0.42 s`, `12.3 s`, `3 min 05 s`, `1 h 02 min`."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _clock_time(seconds: float) -> str:
    """A short form for the live line: `0:52`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _count(done: int, total: int | None, unit: str) -> str:
    if not done and total is None:
        return ""
    of = "" if total is None else f"/{total:,}"
    return f"{done:,}{of} {unit}".rstrip()


def _rate(speed: float | None) -> str:
    if not speed:
        return ""
    if speed >= 1e6:
        return f"{speed:.2g}/s"
    if speed < 0.1:
        return f"{1 / speed:,.0f} s each"
    return f"{speed:.2g}/s" if speed < 10 else f"{speed:,.0f}/s"


def _speed(done: float, measures: Mapping[str, float], seconds: float) -> float | None:
    """Units a second over the whole stage, without those that were there already.

    Over the whole: units come in bursts, a batch at a time.
    """
    fresh = done - measures.get("reused", 0)
    return fresh / seconds if fresh > 0 and seconds > 0 else None


def _measures(values: Mapping[str, float]) -> str:
    def number(value: float) -> str:
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"

    names = {name: _MEASURES.get(name, name.replace("_", " ")) for name in values}
    return "  ".join(f"{names[name]} {number(value)}" for name, value in values.items())


@dataclass
class _Stage:
    """What is known of a stage that has begun."""

    started: float
    total: int | None
    unit: str
    done: int = 0
    measures: dict[str, float] = field(default_factory=dict)
    told: float = 0.0
    """When the last line about it was written."""

    def add(self, done: int, measures: Mapping[str, float]) -> None:
        self.done += done
        self.measures.update(measures)


class Receiver(Progress):
    """A `Progress` that is also a context manager; leaving it closes the picture."""

    def close(self, *, failed: bool = False) -> None:
        """End the picture; stages still open are shown as stopped. May be called twice."""

    def unit(self, report: UnitReport) -> None:
        """Not for people, who see the stages."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)


class RichProgress(Receiver):
    """A picture that is redrawn in place: a line per stage, ticked when it is over."""

    def __init__(self, stream: TextIO, *, console: Console | None = None) -> None:
        self._console = console or Console(file=stream)
        self._open: dict[str, bars.TaskID] = {}
        self._bars = bars.Progress(
            _Mark(self._console),
            _Name(),
            _Bar(),
            _Done(),
            _Rate(),
            _Time(),
            _Last(),
            console=self._console,
            refresh_per_second=5,
            # Results own stdout; a live picture on stderr must not swallow them.
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        """Add the stage's line; the first one starts the picture."""
        if stage in self._open:
            self.finish(stage)
        self._bars.start()
        self._open[stage] = self._bars.add_task(
            stage, total=total, unit=unit, measures={}, state="running"
        )

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        """Move the stage's bar and show the latest measures."""
        task = self._open.get(stage)
        if task is None:
            return
        known = {**self._bars.tasks[self._bars.task_ids.index(task)].fields["measures"], **measures}
        self._bars.update(task, advance=done, measures=known)

    def finish(self, stage: str) -> None:
        """Tick the stage's line and freeze its time."""
        self._end(stage, "done")

    def message(self, text: str, *, warning: bool = True) -> None:
        """Print a line above the picture."""
        line = Text(f"! {text}", style="yellow") if warning else Text(text, style="dim")
        self._console.print(line, soft_wrap=True)

    def close(self, *, failed: bool = False) -> None:
        """Stop drawing and show the cursor again."""
        for stage in list(self._open):
            self._end(stage, "failed" if failed else "done")
        self._bars.stop()

    def _end(self, stage: str, state: str) -> None:
        task = self._open.pop(stage, None)
        if task is not None:
            self._bars.update(task, state=state)
            self._bars.stop_task(task)


class _Mark(bars.ProgressColumn):
    """A spinner, a tick or a cross; letters where the stream has no such signs."""

    def __init__(self, console: Console) -> None:
        self._signs = console.encoding.lower().startswith("utf")
        self._spinner = Spinner("dots" if self._signs else "line", style="cyan")
        super().__init__()

    def render(self, task: bars.Task) -> Any:
        state = task.fields["state"]
        if state == "running":
            return self._spinner.render(task.get_time())
        tick, cross = ("✓", "✗") if self._signs else ("+", "x")
        return Text(tick, style="green") if state == "done" else Text(cross, style="bold red")


class _Name(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        style = {"running": "bold", "failed": "bold red"}.get(task.fields["state"], "")
        return Text(task.description, style=style)


class _Bar(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Any:
        if task.fields["state"] != "running":
            return Text("")
        return ProgressBar(
            total=task.total,
            completed=task.completed,
            width=14,
            pulse=task.total is None,
            animation_time=task.get_time(),
        )


class _Cell(bars.ProgressColumn):
    """Text that is cut, not wrapped, where the terminal is narrow."""

    def __init__(self, *, ratio: int | None = None) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=ratio))


class _Done(_Cell):
    def render(self, task: bars.Task) -> Text:
        total = None if task.total is None else int(task.total)
        return Text(_count(int(task.completed), total, task.fields["unit"]))


class _Rate(_Cell):
    def render(self, task: bars.Task) -> Text:
        return Text(_rate(_task_speed(task)), style="dim")


class _Time(_Cell):
    def render(self, task: bars.Task) -> Text:
        elapsed = task.elapsed or 0.0
        if task.fields["state"] != "running":
            return Text(duration(elapsed))
        speed = _task_speed(task)
        left = (task.total or 0) - task.completed
        if left > 0 and speed:
            return Text(f"{_clock_time(left / speed)} left", style="cyan")
        return Text(_clock_time(elapsed), style="cyan")


def _task_speed(task: bars.Task) -> float | None:
    return _speed(task.completed, task.fields["measures"], task.elapsed or 0.0)


class _Last(_Cell):
    def render(self, task: bars.Task) -> Text:
        return Text(_measures(task.fields["measures"]), style="dim")


class _LineProgress(Receiver):
    """Common to the two receivers that write lines: what is open, and when to speak."""

    def __init__(self, stream: TextIO, *, every_s: float, clock: Clock = time.monotonic) -> None:
        self._stream, self._every_s, self._clock = stream, every_s, clock
        self._open: dict[str, _Stage] = {}

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        """Write that the stage begins."""
        if stage in self._open:
            self.finish(stage)
        now = self._clock()
        self._open[stage] = state = _Stage(started=now, total=total, unit=unit, told=now)
        self._tell("start", stage, state, 0.0)

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        """Count; write a line when the last one is old enough."""
        state = self._open.get(stage)
        if state is None:
            return
        state.add(done, measures)
        now = self._clock()
        if now - state.told >= self._every_s:
            state.told = now
            self._tell("advance", stage, state, now - state.started)

    def finish(self, stage: str) -> None:
        """Write that the stage is over, with its seconds."""
        state = self._open.pop(stage, None)
        if state is not None:
            self._tell("finish", stage, state, self._clock() - state.started)

    def close(self, *, failed: bool = False) -> None:
        """Write a last line about each stage that is still open."""
        for stage, state in list(self._open.items()):
            del self._open[stage]
            seconds = self._clock() - state.started
            self._tell("stopped" if failed else "finish", stage, state, seconds)

    @abstractmethod
    def _tell(self, event: str, stage: str, state: _Stage, seconds: float) -> None:
        """Write what has happened to a stage."""

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class PlainProgress(_LineProgress):
    """Lines for a log file or a pipe: start and end of a stage, and one about every ten seconds."""

    def __init__(
        self, stream: TextIO, *, every_s: float = 10.0, clock: Clock = time.monotonic
    ) -> None:
        super().__init__(stream, every_s=every_s, clock=clock)

    def message(self, text: str, *, warning: bool = True) -> None:
        """Write the text as a line of its own."""
        self._write(f"! {text}" if warning else text)

    def _tell(self, event: str, stage: str, state: _Stage, seconds: float) -> None:
        rate = _speed(state.done, state.measures, seconds)
        count = _count(state.done, state.total, state.unit)
        last = _measures(state.measures)
        if event == "start":
            parts = ["started", "" if state.total is None else f"{state.total:,} {state.unit}"]
        elif event == "advance":
            left = (state.total - state.done) / rate if state.total and rate else None
            until = "" if left is None else f"{_clock_time(max(left, 0.0))} left"
            parts = [count, _rate(rate), until, last]
        else:
            word = "done" if event == "finish" else "stopped"
            parts = [f"{word} in {duration(seconds)}", count, _rate(rate), last]
        self._write(f"{stage}: " + ", ".join(p.strip() for p in parts if p.strip()))


class JsonProgress(_LineProgress):
    """One JSON object a line, for machines; a stage speaks at most once a second."""

    def __init__(
        self,
        stream: TextIO,
        run_id: str,
        *,
        every_s: float = 1.0,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(stream, every_s=every_s, clock=clock)
        self._run_id = run_id

    def message(self, text: str, *, warning: bool = True) -> None:
        """Write the text with level `warning` or `info`."""
        self._emit(level="warning" if warning else "info", event="message", message=text)

    def unit(self, report: UnitReport) -> None:
        """Write a line about every unit, so that a slow or failing one can be found."""
        told = {k: v for k, v in asdict(report).items() if v is not None}
        told["seconds"] = round(report.seconds, 3)
        self._emit(level="warning" if report.failure else "info", event="unit", **told)

    def _tell(self, event: str, stage: str, state: _Stage, seconds: float) -> None:
        self._emit(
            level="error" if event == "stopped" else "info",
            event=event,
            stage=stage,
            done=state.done,
            total=state.total,
            unit=state.unit,
            seconds=round(seconds, 3),
            measures={k: v if math.isfinite(v) else None for k, v in state.measures.items()},
        )

    def _emit(self, **values: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, **values, "run_id": self._run_id}
        self._write(json.dumps(line, ensure_ascii=False, allow_nan=False))


class Timed(Receiver):
    """Passes everything on to another receiver and counts the seconds of each stage."""

    def __init__(self, progress: Progress, *, clock: Clock = time.monotonic) -> None:
        self._progress, self._clock = progress, clock
        self._began = clock()
        self._running: dict[str, float] = {}
        self._spent = dict.fromkeys(STAGES, 0.0)

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds of every stage so far (0 for one that did not run), and `total` since creation.

        A stage that ran twice, such as `evaluate` before and after, counts both.
        """
        now = self._clock()
        spent = dict(self._spent)
        for stage, began in self._running.items():
            spent[stage] = spent.get(stage, 0.0) + now - began
        return {k: round(v, 4) for k, v in {**spent, "total": now - self._began}.items()}

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        """Start the stage's watch."""
        self._stop(stage)
        self._running[stage] = self._clock()
        self._progress.start(stage, total=total, unit=unit)

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        """Pass on."""
        self._progress.advance(stage, done, **measures)

    def finish(self, stage: str) -> None:
        """Stop the stage's watch."""
        self._stop(stage)
        self._progress.finish(stage)

    def message(self, text: str, *, warning: bool = True) -> None:
        """Pass on."""
        self._progress.message(text, warning=warning)

    def unit(self, report: UnitReport) -> None:
        """Pass on."""
        self._progress.unit(report)

    def close(self, *, failed: bool = False) -> None:
        """Stop all watches and close the receiver behind, where it can be closed."""
        for stage in list(self._running):
            self._stop(stage)
        if isinstance(self._progress, Receiver):
            self._progress.close(failed=failed)

    def _stop(self, stage: str) -> None:
        began = self._running.pop(stage, None)
        if began is not None:
            self._spent[stage] = self._spent.get(stage, 0.0) + self._clock() - began


LogFormat = Literal["auto", "rich", "plain", "json"]


def progress_for(log_format: str, stream: TextIO, run_id: str) -> Receiver:
    """The receiver for `--log-format`: `auto` draws on a terminal and writes lines elsewhere.

    Raises:
        InputError: The format is none of `auto`, `rich`, `plain`, `json`.
    """
    if log_format == "auto":
        drawable = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
        log_format = "rich" if drawable else "plain"
    if log_format == "rich":
        return RichProgress(stream)
    if log_format == "plain":
        return PlainProgress(stream)
    if log_format == "json":
        return JsonProgress(stream, run_id)
    raise InputError(
        f"{log_format!r} is no log format; choose auto, rich, plain or json", field="log_format"
    )
