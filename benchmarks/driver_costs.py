"""What the driver of a run takes for an event, measured on the real `Dispatch` and the real store.

Knows which calls `cluster.ray_executor` makes for each event. What Ray itself takes is not measured
here: it is given.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.simulation import DriverCosts
from cluster.artifacts import Artifacts
from cluster.dispatch import Dispatch
from memedit.targets import Target

_REPEATS = 5


def driver_costs(
    workers: int, *, event_s: float, reference_s: float, slot_s: float, keep_s: float
) -> DriverCosts:
    """The costs with so many workers.

    Args:
        workers: How many the driver looks after.
        event_s: What Ray takes for each event, however many calls are waited for.
        reference_s: What Ray takes beyond that for each call that is waited for.
        slot_s: What the executor's own loops take for each worker.
        keep_s: See `measured_keep_s`.
    """
    take_s, pause_s, stalled_s = _full(workers)
    return DriverCosts(
        event_s=event_s,
        reference_s=reference_s,
        worker_s=slot_s + take_s + (pause_s + stalled_s) / workers,
        idle_s=_idle(workers),
        unit_s=_unit(workers),
        keep_s=keep_s,
    )


def _each_s(call: Callable[[], object], calls: int) -> float:
    """Seconds of one of so many calls, in the repeat that was disturbed least."""
    taken = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - started) / calls)
    return min(taken)


def _busy(workers: int, units: int) -> Dispatch:
    dispatch = Dispatch(units, workers=workers, copies=True)
    for worker in range(workers):
        dispatch.joined(worker, 0.0)
        while dispatch.take(worker, 0.0) is not None:
            pass
    return dispatch


def _full(workers: int) -> tuple[float, float, float]:
    """Asking for a worker that has enough; how long to pause; who has stalled."""
    dispatch = _busy(workers, 4 * workers)
    return (
        _each_s(lambda: dispatch.take(0, 1.0), 2000),
        _each_s(lambda: dispatch.pause_s(1.0), max(1, 20_000 // workers)),
        _each_s(lambda: dispatch.stalled(1.0), max(1, 20_000 // workers)),
    )


def _idle(workers: int) -> float:
    """Asking for a worker without work when no unit waits and half of the workers run one."""
    if workers < 2:
        return 0.0
    dispatch = _busy(workers, workers)
    for worker in range(workers):
        for unit in list(dispatch._workers[worker].units)[: workers % 2 or worker % 2]:
            dispatch.done(worker, unit, 1.0)
    idle = next(worker for worker in range(workers) if not dispatch._workers[worker].units)
    return _each_s(lambda: dispatch.take(idle, 1.0), max(1, 20_000 // workers))


def _unit(workers: int) -> float:
    """Giving a unit out and taking note of its end."""
    calls = 2000
    dispatch = _busy(workers, (_REPEATS * calls + 2) * 2 + 4 * workers)
    held = dispatch._workers[0].units

    def turn() -> None:
        dispatch.heard(0, 1.0)
        dispatch.done(0, held[0], 1.0)
        dispatch.take(0, 1.0)

    return _each_s(turn, calls)


def measured_keep_s(width: int, *, calls: int = 100) -> float:
    """Storing one z vector of so many numbers durably, on the disk of the temporary folder."""
    target = Target(
        case_id="", z_O=torch.zeros(width), h_norm=1.0, delta_norm=1.0, losses=(), converged=True
    )
    with tempfile.TemporaryDirectory() as folder:
        artifacts, digests = Artifacts(Path(folder)), iter(range(_REPEATS * calls))
        return _each_s(lambda: artifacts.keep_target(f"{next(digests):064x}"[::-1], target), calls)
