"""Which worker does which unit next, whatever fails on the way.

Attempts are counted per unit, with a growing wait between them; a unit that fails too often is
given up; at the end, units that take long elsewhere are issued once more. Knows numbers of units
and workers and a clock that it is told; knows no Ray and no work. The executor on Ray follows it,
and so does the simulation of large clusters in `benchmarks/`.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from statistics import median

_SEARCH_S = 0.1
"""How long no straggler is looked for after none was found."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is put up with; seconds."""

    attempts: int = 3
    """Times that a unit is tried before it is given up."""
    wait_s: float = 1.0
    """Before the second attempt; doubled before each further one."""
    longest_wait_s: float = 60.0
    stall_s: float = 1800.0
    """A worker that gives nothing for so long counts as hung."""
    straggler: float = 2.0
    """A unit is issued again at the end when it has run for so many times the median."""


@dataclass(kw_only=True)
class _Worker:
    units: deque[int]
    """What it was given, in that order; it does the first and the others wait."""
    since: float
    """When the first of them began, as far as is known."""
    heard: float
    """When it last gave anything."""


class Dispatch:
    """The state of one round of units over workers; every call takes the time `now` in seconds.

    Args:
        units: How many units; they are given out in their order.
        workers: How many workers there may be.
        rules: See `Rules`.
        sticky: Unit u belongs to worker u mod `workers`, and goes to another one only when its own
            is gone. Without it, any unit goes to any worker.
        copies: Whether a unit may be done twice at the same time.
    """

    def __init__(
        self,
        units: int,
        *,
        workers: int,
        rules: Rules | None = None,
        sticky: bool = False,
        copies: bool = False,
    ) -> None:
        self.rules, self.sticky, self.copies = rules or Rules(), sticky, copies
        self._workers: dict[int, _Worker] = {}
        count = workers if sticky else 1
        self._queues = [deque(range(first, units, count)) for first in range(count)]
        self._queued = units
        self._waiting: list[tuple[float, int]] = []
        self._done = bytearray(units)
        self._left = units
        self._attempts: dict[int, int] = {}
        self._suspects: set[int] = set()
        """What lost workers had been given: any may be what kills, so each is done alone."""
        self._durations: deque[float] = deque(maxlen=99)
        self._searched = -math.inf
        self.retried = 0
        """Attempts after a failure."""
        self.copied = 0
        """Units that were issued once more."""

    def ended(self) -> bool:
        """Whether every unit is done or given up."""
        return not self._left

    def is_done(self, unit: int) -> bool:
        """Whether a unit is done or given up."""
        return bool(self._done[unit])

    def joined(self, worker: int, now: float) -> None:
        """A worker, new or again, can take units."""
        self._workers[worker] = _Worker(units=deque(), since=now, heard=now)

    def take(self, worker: int, now: float) -> int | None:
        """The next unit for a worker, or None if there is nothing for it at present.

        A second unit is given ahead, so that it waits for no driver; the last ones are not, nor is
        anything beside a unit that a lost worker had: it would share the blame. While such a unit
        is next, nothing is given ahead.
        """
        state = self._workers[worker]
        while self._waiting and self._waiting[0][0] <= now:
            self._requeue(heapq.heappop(self._waiting)[1], front=True)
        ahead = self.sticky or self._queued > len(self._workers)
        if len(state.units) >= 1 + ahead or not self._suspects.isdisjoint(state.units):
            return None
        unit = self._next(worker)
        if unit is not None and state.units and unit in self._suspects:
            self._requeue(unit, front=True)
            return None
        if unit is None and not state.units:
            unit = self._straggler(now)
        if unit is None:
            return None
        if not state.units:
            state.since = state.heard = now
        state.units.append(unit)
        return unit

    def _next(self, worker: int) -> int | None:
        if not self.sticky:
            found = self._pop(self._queues[0])
        else:
            own = self._pop(self._queues[worker])
            orphans = (q for w, q in enumerate(self._queues) if w not in self._workers)
            found = (
                own
                if own is not None
                else next(
                    (unit for queue in orphans if (unit := self._pop(queue)) is not None), None
                )
            )
        return found

    def _pop(self, queue: deque[int]) -> int | None:
        while queue:
            self._queued -= 1
            if not self._done[unit := queue.popleft()]:
                return unit
        return None

    def _straggler(self, now: float) -> int | None:
        """What runs at one worker alone and has run long, the longest first."""
        if not self.copies or self._queued or self._waiting or not self._durations:
            return None
        if now - self._searched < _SEARCH_S:  # looks at every worker, and all would ask
            return None
        self._searched = now
        least = self.rules.straggler * median(self._durations)
        running: dict[int, list[float]] = {}
        for state in self._workers.values():
            for unit in state.units:  # what waits behind a long one waits as long
                running.setdefault(unit, []).append(state.since)
        alone = [
            (times[0], unit)
            for unit, times in running.items()
            if len(times) == 1 and not self._done[unit] and now - times[0] > least
        ]
        if not alone:
            return None
        self.copied += 1
        self._searched = -math.inf  # there may be another
        return min(alone)[1]

    def _requeue(self, unit: int, *, front: bool) -> None:
        if self._done[unit]:
            return
        queue = self._queues[unit % len(self._queues)]
        if front:
            queue.appendleft(unit)
        else:
            queue.append(unit)
        self._queued += 1

    def heard(self, worker: int, now: float) -> None:
        """A worker has given something: it is alive."""
        if worker in self._workers:
            self._workers[worker].heard = now

    def in_hand(self, worker: int) -> tuple[int, float] | None:
        """The unit that a worker is at, and since when, as far as is known."""
        state = self._workers.get(worker)
        return (state.units[0], state.since) if state is not None and state.units else None

    def done(self, worker: int, unit: int, now: float) -> bool:
        """A unit was done by a worker; whether nobody had done it before."""
        self._durations.append(now - self._workers[worker].since)
        self._let_go(worker, unit, now)
        return self._end(unit)

    def failed(self, worker: int, unit: int, now: float, *, for_good: bool = False) -> bool:
        """A unit has failed at a worker that goes on; whether the unit is given up now.

        Args:
            worker: The worker.
            unit: The unit.
            now: The time.
            for_good: It would fail everywhere, so it is not tried again.
        """
        self._let_go(worker, unit, now)
        return self._failed(unit, now, for_good=for_good)

    def lost(self, worker: int, now: float) -> list[int]:
        """A worker is gone, and what it was doing has failed; the units that are given up now.

        It may have died of the next unit before it was heard that the first was done. So the first
        is blamed, but from then on neither is given out beside another.
        """
        state = self._workers.pop(worker, None)
        if state is None:
            return []
        units = list(state.units)
        self._suspects.update(unit for unit in units if not self._done[unit])
        for unit in reversed(units[1:]):  # these it has not begun
            if not self._runs(unit):
                self._requeue(unit, front=True)
        return [unit for unit in units[:1] if self._failed(unit, now, for_good=False)]

    def _failed(self, unit: int, now: float, *, for_good: bool) -> bool:
        if self._done[unit]:
            return False
        attempts = self._attempts[unit] = self._attempts.get(unit, 0) + 1
        runs = self._runs(unit)  # elsewhere, and may end well
        if for_good or (attempts >= self.rules.attempts and not runs):
            return self._end(unit)
        if not runs:
            self.retried += 1
            wait_s = min(self.rules.longest_wait_s, self.rules.wait_s * 2.0 ** (attempts - 1))
            heapq.heappush(self._waiting, (now + wait_s, unit))
        return False

    def _end(self, unit: int) -> bool:
        first = not self._done[unit]
        self._done[unit] = 1
        self._suspects.discard(unit)
        self._left -= first
        return first

    def _let_go(self, worker: int, unit: int, now: float) -> None:
        state = self._workers[worker]
        state.units.remove(unit)
        state.since = state.heard = now

    def _runs(self, unit: int) -> bool:
        return any(unit in state.units for state in self._workers.values())

    def stalled(self, now: float) -> list[int]:
        """Workers that have work and have given nothing for too long."""
        return [
            worker
            for worker, state in self._workers.items()
            if state.units and now - state.heard >= self.rules.stall_s
        ]

    def attempts(self, unit: int) -> int:
        """How often a unit has failed."""
        return self._attempts.get(unit, 0)

    def pause_s(self, now: float) -> float:
        """How long nothing can be to do if no worker says anything; at least 0."""
        until = now + self.rules.stall_s
        for state in self._workers.values():
            if state.units:
                until = min(until, state.heard + self.rules.stall_s)
        if self._waiting:
            until = min(until, self._waiting[0][0])
        return max(0.0, until - now)
