"""A run of z vectors on many workers, event by event, that follows the real `Dispatch`.

Knows workers that die, units that straggle, and a driver that handles one event after the other, as
`cluster.ray_executor` does: for each event it looks at every worker again. Units come in two
batches, each of which gives its z vectors when it ends. Does not know where times come from.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log, sqrt

from cluster.dispatch import Dispatch, Rules

LOOK_S = 1.0
"""How often the driver looks round while a worker has nothing to do, as on Ray."""
BATCHES = 2
"""In a unit; z vectors come batch by batch."""


@dataclass(frozen=True, kw_only=True)
class DriverCosts:
    """Seconds of the driver, by what they are for; 0 is a driver that takes no time."""

    event_s: float = 0.0
    """Each event: waiting, getting what is there, and a share of handing units out."""
    reference_s: float = 0.0
    """Each call that is waited for, at each event."""
    worker_s: float = 0.0
    """Each worker, at each event: looking whether it can take something, has stalled, is free."""
    idle_s: float = 0.0
    """Each worker without work, at each event once no unit waits: the search for stragglers."""
    unit_s: float = 0.0
    """Each unit: given out and done."""
    keep_s: float = 0.0
    """Each z vector that is stored."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What goes wrong."""

    lives_s: float = float("inf")
    """Mean time until a worker dies, exponentially distributed."""
    restart_s: float = 60.0
    """From a death until the next worker is ready."""
    stragglers: float = 0.0
    """The share of attempts that take long."""
    slowness: float = 10.0
    """How many times as long."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The facts of a unit and the seconds that it takes on average."""

    facts: int
    mean_s: float


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What came out; seconds."""

    makespan_s: float
    useful_s: float
    """The work of every unit once, without trouble."""
    efficiency: float
    """Useful work / (workers · makespan)."""
    driver_share: float
    """The share of the makespan in which the driver was busy."""
    deaths: int
    retried: int
    copied: int
    twice: int
    """Units that two workers have done to the end."""
    again: int
    """z vectors that came a second time."""
    given_up: int
    done: int


@dataclass(kw_only=True)
class _Worker:
    dies_s: float
    life: int = 0
    alive: bool = False
    running: bool = False
    free_s: float = 0.0
    waiting: deque[tuple[int, int, float]] = field(default_factory=deque)
    """(unit, first batch that is missing, when it arrived)."""


class Simulation:
    """One run; `run` may be called once.

    Args:
        units: The work, in the order in which it is given out.
        workers: How many; all are ready at 0 s.
        spread: Standard deviation of a unit's time over its mean (lognormal).
        trouble: See `Trouble`.
        costs: See `DriverCosts`.
        rules: Of the dispatch.
        seed: Of all that is drawn; equal arguments give equal results.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        workers: int,
        spread: float = 0.0,
        trouble: Trouble | None = None,
        costs: DriverCosts | None = None,
        rules: Rules | None = None,
        seed: int = 0,
    ) -> None:
        self.units, self.trouble = units, trouble or Trouble()
        self.costs = costs or DriverCosts()
        self.chance = random.Random(seed)
        self.dispatch = Dispatch(len(units), workers=workers, rules=rules, copies=True)
        self._sigma = sqrt(log(1.0 + spread * spread))
        # A unit is as much work wherever it is done; only straggling is drawn at each attempt.
        self._work_s = [unit.mean_s * self._factor() for unit in units]
        self._known = bytearray(len(units))
        """Batches whose z vectors the driver has."""
        self._holders: Counter[int] = Counter()
        """How many workers hold a unit that is not done."""
        self._open = len(units)
        self._workers = [_Worker(dies_s=0.0) for _ in range(workers)]
        self._held: list[list[int]] = [[] for _ in range(workers)]
        """What the driver has given each worker."""
        self._idle: set[int] = set()
        """Workers without anything, as far as the driver knows."""
        self._calls = 0
        self._events: list[tuple[float, int, str, int, int, int, int]] = []
        """(when, number, kind, worker, its life, unit, batch)."""
        self._numbered = 0
        self._driver_s = 0.0
        self._driver_free_s = 0.0
        self._deaths = self._twice = self._again = self._given_up = 0

    def _factor(self) -> float:
        sigma = self._sigma
        return exp(self.chance.gauss(-0.5 * sigma * sigma, sigma)) if sigma else 1.0

    def run(self) -> Simulated:
        """Follow the dispatch until every unit is done."""
        for worker in range(len(self._workers)):
            self._join(worker, 0.0)
        while not self.dispatch.ended():
            next_s = self._events[0][0] if self._events else float("inf")
            if self._idle:  # the driver does not sleep for longer than that
                pause_s = min(LOOK_S, self.dispatch.pause_s(self._driver_free_s))
                look_s = self._driver_free_s + max(pause_s, 1e-3)
                if look_s < next_s:
                    self._feed_idle(self._handle(look_s))
                    continue
            self._step()
        makespan_s, useful_s = self._driver_free_s, sum(self._work_s)
        return Simulated(
            makespan_s=makespan_s,
            useful_s=useful_s,
            efficiency=useful_s / (len(self._workers) * makespan_s),
            driver_share=self._driver_s / makespan_s,
            deaths=self._deaths,
            retried=self.dispatch.retried,
            copied=self.dispatch.copied,
            twice=self._twice,
            again=self._again,
            given_up=self._given_up,
            done=sum(map(self.dispatch.is_done, range(len(self.units)))) - self._given_up,
        )

    # --- What happens at the workers ------------------------------------------------------------

    def _push(
        self, at_s: float, kind: str, worker: int, life: int, unit: int = 0, batch: int = 0
    ) -> None:
        self._numbered += 1
        heapq.heappush(self._events, (at_s, self._numbered, kind, worker, life, unit, batch))

    def _join(self, number: int, now_s: float) -> None:
        """A worker, new or again, is ready."""
        worker = self._workers[number]
        worker.life += 1
        worker.alive, worker.running, worker.free_s = True, False, now_s
        worker.waiting.clear()
        lives_s = self.trouble.lives_s
        endless = lives_s == float("inf")
        worker.dies_s = lives_s if endless else now_s + self.chance.expovariate(1 / lives_s)
        if not endless:
            self._push(worker.dies_s, "death", number, worker.life)
        self.dispatch.joined(number, now_s)
        self._idle.add(number)
        self._feed_all(now_s)

    def _begin(self, number: int, unit: int, batch: int, at_s: float) -> None:
        """A worker starts with a unit, or with what was missing of it."""
        worker = self._workers[number]
        worker.running = True
        slow = self.trouble.slowness if self.chance.random() < self.trouble.stragglers else 1.0
        each_s = self._work_s[unit] / BATCHES * slow
        for ahead, which in enumerate(range(batch, BATCHES), start=1):
            ends_s = at_s + ahead * each_s
            if ends_s < worker.dies_s:
                self._push(ends_s, "batch", number, worker.life, unit, which)

    def _step(self) -> None:
        """The next event: first what it means to the worker, then what the driver makes of it."""
        at_s, _, kind, number, life, unit, batch = heapq.heappop(self._events)
        worker = self._workers[number]
        if kind == "join":
            self._join(number, self._handle(at_s))
            return
        if life != worker.life:
            return
        if kind == "death":
            worker.alive = False
            worker.life += 1
            self._lost(number, self._handle(at_s))
            return
        ends = batch == BATCHES - 1
        if ends:
            worker.running, worker.free_s = False, at_s
            if worker.waiting:
                following, first, came_s = worker.waiting.popleft()
                self._begin(number, following, first, max(at_s, came_s))
        self._got(number, unit, batch, at_s, ends=ends)

    # --- What the driver does -------------------------------------------------------------------

    def _handle(self, at_s: float, *, events: int = 1, more_s: float = 0.0) -> float:
        """Let the driver handle events that have happened; when it has done so."""
        costs, workers = self.costs, len(self._workers)
        each_s = costs.event_s + costs.reference_s * self._calls + costs.worker_s * workers
        if self._idle and self._open == len(self._holders):  # no unit waits
            each_s += costs.idle_s * len(self._idle)
        spent_s = events * each_s + more_s
        self._driver_s += spent_s
        self._driver_free_s = max(self._driver_free_s, at_s) + spent_s
        return self._driver_free_s

    def _got(self, number: int, unit: int, batch: int, at_s: float, *, ends: bool) -> None:
        facts = self.units[unit].facts
        some = facts // BATCHES if batch else facts - facts // BATCHES
        new = batch >= self._known[unit]
        self._again += 0 if new else some
        # Each z vector is an event, and so is the end of a unit.
        more_s = new * some * self.costs.keep_s + ends * self.costs.unit_s
        now_s = self._handle(at_s, events=some + ends, more_s=more_s)
        self._known[unit] = max(self._known[unit], batch + 1)
        self.dispatch.heard(number, now_s)
        if ends:
            self._let_go(number, unit)
            self._ended(number, unit, now_s)
            self._feed(number, now_s)
            self._feed_idle(now_s)

    def _ended(self, number: int, unit: int, now_s: float) -> None:
        if self.dispatch.done(number, unit, now_s):
            self._open -= 1
            self._holders.pop(unit, None)
        else:
            self._twice += 1

    def _lost(self, number: int, now_s: float) -> None:
        self._deaths += 1
        for unit in list(self._held[number]):
            self._let_go(number, unit)
        self._idle.discard(number)
        for unit in self.dispatch.lost(number, now_s):
            self._given_up += 1
            self._open -= 1
            self._holders.pop(unit, None)
        self._push(now_s + self.trouble.restart_s, "join", number, 0)
        self._feed_all(now_s)

    def _let_go(self, number: int, unit: int) -> None:
        self._held[number].remove(unit)
        self._calls -= 1
        if not self._held[number]:
            self._idle.add(number)
        if self._holders[unit] > 1:
            self._holders[unit] -= 1
        else:
            del self._holders[unit]

    def _feed_all(self, now_s: float) -> None:
        for number, worker in enumerate(self._workers):
            if worker.alive and len(self._held[number]) < 2:
                self._feed(number, now_s)

    def _feed_idle(self, now_s: float) -> None:
        """What one worker without work cannot have, none can."""
        for number in sorted(self._idle):
            if not self._feed(number, now_s):
                break

    def _feed(self, number: int, now_s: float) -> bool:
        """Give a worker what the dispatch has for it; whether there was anything."""
        worker, fed = self._workers[number], False
        while worker.alive and (unit := self.dispatch.take(number, now_s)) is not None:
            fed = True
            known = self._known[unit]
            if known == BATCHES:  # another attempt has given all there was to give
                self._ended(number, unit, now_s)
                continue
            self._held[number].append(unit)
            self._calls += 1
            self._idle.discard(number)
            self._holders[unit] += 1
            if worker.running:
                worker.waiting.append((unit, known, now_s))
            else:
                self._begin(number, unit, known, max(now_s, worker.free_s))
        return fed
