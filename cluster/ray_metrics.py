"""Progress as metrics of Ray, which its machines offer to Prometheus.

| metric | labels | is |
| --- | --- | --- |
| `memedit_done_total` | run_id, stage, unit | facts, tokens, layers, files that are done |
| `memedit_expected` | run_id, stage, unit | how many there will be |
| `memedit_measure` | run_id, stage, measure | the latest loss, error, residual |
| `memedit_stage_seconds_total` | run_id, stage | seconds of finished stages |
| `memedit_units_total` | run_id, work, ended (`done`, `failed`) | units of work at workers |
| `memedit_retries_total` | run_id, work | attempts after the first that ended |
| `memedit_unit_seconds_total` | run_id, work | how long workers were at units that were done |
| `memedit_messages_total` | run_id | warnings, replaced workers among them |

Knows Ray's metrics; does not import Ray before it is connected.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from memedit.progress import Progress, UnitReport

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge


class Metered(Progress):
    """Passes everything on to another receiver, and counts it as soon as there is a Ray.

    What is told before (reading facts, checking the model) is counted then.
    """

    def __init__(self, progress: Progress, run_id: str) -> None:
        self._progress, self._run_id = progress, run_id
        self._units: dict[str, str] = {}
        self._began: dict[str, float] = {}
        self._waiting: list[tuple[str, float, dict[str, str]]] = []
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        """See `Progress`."""
        self._units[stage], self._began[stage] = unit, time.monotonic()
        if total is not None:
            self._tell("memedit_expected", total, stage=stage, unit=unit)
        self._progress.start(stage, total=total, unit=unit)

    def advance(self, stage: str, done: int = 1, **measures: float) -> None:
        """See `Progress`."""
        self._tell("memedit_done_total", done, stage=stage, unit=self._units.get(stage, ""))
        for measure, value in measures.items():
            self._tell("memedit_measure", value, stage=stage, measure=measure)
        self._progress.advance(stage, done, **measures)

    def finish(self, stage: str) -> None:
        """See `Progress`."""
        began = self._began.pop(stage, None)
        if began is not None:
            self._tell("memedit_stage_seconds_total", time.monotonic() - began, stage=stage)
        self._progress.finish(stage)

    def message(self, text: str, *, warning: bool = True) -> None:
        """See `Progress`."""
        if warning:
            self._tell("memedit_messages_total", 1)
        self._progress.message(text, warning=warning)

    def unit(self, report: UnitReport) -> None:
        """See `Progress`."""
        ended = "failed" if report.failure else "done"
        self._tell("memedit_units_total", 1, work=report.work, ended=ended)
        if report.attempt > 1:
            self._tell("memedit_retries_total", 1, work=report.work)
        if not report.failure:
            self._tell("memedit_unit_seconds_total", report.seconds, work=report.work)
        self._progress.unit(report)

    def _tell(self, name: str, value: float, **labels: str) -> None:
        self._waiting.append((name, value, {"run_id": self._run_id, **labels}))
        # Importing Ray here would settle how it starts, before that was decided.
        ray: Any = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        waiting, self._waiting = self._waiting, []
        for each, number, told in waiting:
            if each.endswith("_total"):
                if number > 0:
                    self._counter(each, tuple(told)).inc(number, tags=told)
            else:
                self._gauge(each, tuple(told)).set(number, tags=told)

    def _counter(self, name: str, labels: tuple[str, ...]) -> Counter:
        if name not in self._counters:
            from ray.util.metrics import Counter

            # Prometheus' client adds the `_total`.
            self._counters[name] = Counter(name.removesuffix("_total"), "", labels)
        return self._counters[name]

    def _gauge(self, name: str, labels: tuple[str, ...]) -> Gauge:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[name] = Gauge(name, "", labels)
        return self._gauges[name]
