"""The first stage of an edit: second moments over windows of text, counted by many workers.

Windows are counted wherever there is room, in units; each worker keeps its sums, and they are put
together by rows. From time to time what has been counted is kept, so that a run that is killed goes
on from there. Sums over tokens are taken in float64 in the order in which units finish.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from memedit.config import MomentSettings
from memedit.errors import LockError, MemeditError
from memedit.executor import Executor
from memedit.moments import SecondMoment, Spread
from memedit.progress import Progress, Silent
from memedit.reduction import reduce_rows
from memedit.tally import Held, held_units

TOKENS_PER_COUNT = 2048
"""Of one unit, which is also one batch."""
_COUNTS_PER_ROUND = 8
"""Convergence is looked at after this many batches, whoever counted them."""
KEEP_S = 300.0
"""What has been counted is kept so often, or less often where that takes long."""
KEEP_SHARE = 0.1
"""Of the time at most goes into keeping."""


class Kept(Protocol):
    """Where a collection that is under way is kept, by one run at a time."""

    def load(self) -> tuple[frozenset[int], Mapping[int, SecondMoment]]:
        """The units that were counted, and their moments by layer; nothing if there are none."""

    def save(self, units: Iterable[int], moments: Iterable[SecondMoment]) -> None:
        """Keep this in place of what was kept; all of it or nothing."""

    def forget(self) -> None:
        """The collection is finished."""


def collect_moments(
    executor: Executor,
    windows: Sequence[Sequence[int]],
    *,
    layers: tuple[int, ...],
    settings: MomentSettings,
    progress: Progress,
    kept: Kept | None = None,
) -> Iterator[SecondMoment]:
    """Second moments of `layers` over windows of token ids (MEMIT, Eq. 15), one after the other.

    Ends before all windows are counted once the estimated error of every layer is below
    `settings.tolerance`.
    """
    count_0 = settings.position_0 == "include"
    batches = _batches(windows, TOKENS_PER_COUNT)
    collection = _Collection(
        executor,
        [(unit, batch, layers, count_0) for unit, batch in enumerate(batches)],
        layers,
        kept,
        progress,
    )
    progress.start("stats", total=sum(map(len, windows)), unit="tokens")
    collection.count(settings.tolerance)
    for layer in layers:
        yield collection.moment(layer)
    collection.end()
    progress.finish("stats")


class _Collection:
    """What was counted in earlier runs, and what the workers have counted since."""

    def __init__(
        self,
        executor: Executor,
        units: Sequence[tuple[Any, ...]],
        layers: tuple[int, ...],
        kept: Kept | None,
        progress: Progress,
    ) -> None:
        self.executor, self.units, self.layers = executor, units, layers
        self.kept, self.progress = kept, progress
        self.before: frozenset[int] = frozenset()
        self.moments: Mapping[int, SecondMoment] = {}
        if kept is not None:
            self.before, self.moments = kept.load()
        self.wanted = set(self.before)
        self.next_save = time.monotonic() + KEEP_S

    def count(self, tolerance: float) -> None:
        """Count all units, or as many as it takes."""
        missing = [unit for unit in range(len(self.units)) if unit not in self.before]
        done = sum(len(window) for unit in self.before for window in self.units[unit][1])
        if done:
            self.progress.advance("stats", done, reused=done)
        spreads = {layer: moment.spread for layer, moment in self.moments.items()}
        step = _COUNTS_PER_ROUND if tolerance > 0 else self._round()
        while missing:
            error = max((spread.error for spread in spreads.values()), default=float("inf"))
            if error < tolerance:
                break
            now, missing = missing[:step], missing[step:]
            found = self._count(now, self.progress)
            self.wanted.update(now)
            for unit in now:
                for layer, part in found[unit].items():
                    spreads[layer] = spreads[layer].merge(part) if layer in spreads else part
            error = max(spread.error for spread in spreads.values())
            self.progress.advance("stats", 0, error=error)
            if self.kept is not None and time.monotonic() >= self.next_save:
                self._save(self.kept)

    def _round(self) -> int:
        """So many units at once that workers rarely wait for each other."""
        return 64 * self.executor.n_workers

    def _count(self, units: Sequence[int], progress: Progress) -> dict[int, dict[int, Spread]]:
        """Let workers add some units to their sums; the spread of each by layer."""
        counted: dict[int, dict[int, Spread]] = {}
        # Sticky, and merged by unit: the same sums whenever the number of workers is the same.
        for _, (unit, tokens, parts) in self.executor.map(
            "count", [self.units[unit] for unit in units], sticky=True
        ):
            if unit not in counted:
                progress.advance("stats", tokens)
            counted[unit] = parts
        return counted

    def _held(self) -> list[Held]:
        """The workers' parts, once nothing is missing in them."""
        while True:
            held: list[Held] = self.executor.broadcast("held", "moments")
            missing = self.wanted - self.before - held_units(held)
            if not missing:
                return held
            # A worker has died, and with it what it had counted.
            self._count(sorted(missing), Silent())

    def moment(self, layer: int) -> SecondMoment:
        """The moment of a layer over all that was counted."""
        while True:
            held = self._held()
            known = self.moments.get(layer)
            small = [] if known is None else [replace(known, sum_II=known.sum_II[:0])]
            small += [part.facts[layer] for part in held if layer in part.facts]
            merged = functools.reduce(SecondMoment.merge, small)
            width = merged.sum_II.shape[1]
            sum_II = reduce_rows(
                self.executor,
                held,
                "moments",
                layer,
                (width, width),
                onto=None if known is None else known.sum_II,  # read anew each time
            )
            if sum_II is not None:
                return replace(merged, sum_II=sum_II)

    def _save(self, kept: Kept) -> None:
        """Keep what there is, and let the workers begin anew; where that fails, they go on."""
        began = time.monotonic()
        try:
            kept.save(self.wanted, (self.moment(layer) for layer in self.layers))
        except LockError as error:
            self.progress.message(f"what is counted is kept no longer: {error}")
            self.kept = None
        except MemeditError as error:  # later, perhaps
            self.progress.message(f"what was counted could not be kept: {error}")
        else:
            try:
                self.before, self.moments = kept.load()
            except MemeditError:
                self.before = frozenset()
            if self.before == self.wanted:
                self.executor.broadcast("forget", "moments")
            else:  # something else is there now; the workers have the most of it
                self.before, self.moments = frozenset(), {}
        now = time.monotonic()
        self.next_save = now + max(KEEP_S, (now - began) / KEEP_SHARE)

    def end(self) -> None:
        """Nothing of it is needed any more."""
        self.executor.broadcast("forget", "moments")
        if self.kept is not None:
            self.kept.forget()


def _batches(windows: Sequence[Sequence[int]], tokens: int) -> list[list[Sequence[int]]]:
    """Windows of similar length together, so that little of a batch is padding."""
    batches: list[list[Sequence[int]]] = []
    for window in sorted(windows, key=len, reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > tokens:
            batches.append([])
        batches[-1].append(window)
    return batches
