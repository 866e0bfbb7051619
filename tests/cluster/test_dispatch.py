"""Who does what next, whatever fails: the state machine alone, with toy workers and a toy clock."""

from __future__ import annotations

import heapq
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatch import Dispatch, Rules

RULES = Rules(attempts=3, wait_s=1.0, longest_wait_s=4.0, stall_s=50.0, straggler=2.0)


def dispatch(units: int, workers: int, **options: bool) -> Dispatch:
    made = Dispatch(units, workers=workers, rules=RULES, **options)
    for worker in range(workers):
        made.joined(worker, 0.0)
    return made


def test_units_go_out_in_their_order_and_one_ahead() -> None:
    made = dispatch(8, 2)
    assert [made.take(0, 0.0), made.take(0, 0.0), made.take(0, 0.0)] == [0, 1, None]
    assert [made.take(1, 0.0), made.take(1, 0.0)] == [2, 3]
    assert made.done(0, 0, 1.0)
    assert made.take(0, 1.0) == 4
    assert made.done(1, 2, 1.0) and made.take(1, 1.0) == 5
    # The last ones go to whoever is free.
    assert made.done(0, 1, 2.0) and made.take(0, 2.0) is None
    assert made.done(0, 4, 3.0) and made.take(0, 3.0) == 6 and made.take(0, 3.0) is None
    for worker, unit in ((1, 3), (1, 5), (0, 6)):
        assert made.done(worker, unit, 4.0) and not made.ended()
    assert made.take(0, 4.0) == 7
    assert made.done(0, 7, 5.0) and made.ended()


def test_a_failure_waits_longer_each_time_and_is_given_up() -> None:
    made = dispatch(1, 1)
    assert made.take(0, 0.0) == 0
    assert not made.failed(0, 0, 0.0)
    assert made.take(0, 0.5) is None and made.pause_s(0.5) == 0.5
    assert made.take(0, 1.0) == 0
    assert not made.failed(0, 0, 1.0)
    assert made.take(0, 2.9) is None and made.take(0, 3.0) == 0
    assert made.failed(0, 0, 3.0) and made.ended()
    assert made.attempts(0) == 3 and made.retried == 2


def test_what_fails_for_good_is_not_tried_again() -> None:
    made = dispatch(2, 1)
    assert made.take(0, 0.0) == 0
    assert made.failed(0, 0, 0.0, for_good=True)
    assert made.take(0, 0.0) == 1 and made.done(0, 1, 1.0) and made.ended()


def test_only_what_a_lost_worker_was_doing_has_failed() -> None:
    made = dispatch(6, 2)
    assert [made.take(0, 0.0), made.take(0, 0.0)] == [0, 1]
    assert made.lost(0, 1.0) == [] and made.lost(0, 1.0) == []
    assert (made.attempts(0), made.attempts(1)) == (1, 0)
    assert made.take(1, 1.0) == 1  # it had not begun
    made.joined(0, 2.0)
    assert made.take(0, 2.0) == 0
    assert made.lost(0, 2.0) == []
    made.joined(0, 5.0)
    assert made.take(0, 5.0) == 0
    assert made.lost(0, 5.0) == [0]


def test_what_a_lost_worker_had_is_done_alone_so_that_the_right_unit_is_blamed() -> None:
    made = dispatch(8, 1)
    now = 0.0
    deaths = []
    while not made.ended():
        made.joined(0, now)
        had: list[int] = []
        while (unit := made.take(0, now)) is not None:
            had.append(unit)
            if unit == 3:  # it kills before anyone hears that the one before it was done
                deaths.append(list(had))
                assert made.lost(0, now) == ([3] if len(deaths) == 4 else [])
                break
            if len(had) == 2:
                assert made.done(0, had.pop(0), now)
        else:
            for unit in had:
                assert made.done(0, unit, now)
        now += 10.0
    assert deaths == [[2, 3], [3], [3], [3]]
    assert (made.attempts(2), made.attempts(3)) == (1, 3)


def test_what_a_lost_worker_had_waits_for_a_worker_without_work() -> None:
    made = dispatch(9, 2)
    assert [made.take(0, 0.0), made.take(0, 0.0), made.take(1, 0.0)] == [0, 1, 2]
    assert made.lost(0, 1.0) == []
    assert made.take(1, 1.0) is None  # it has 2, and 1 is next
    assert made.done(1, 2, 2.0) and [made.take(1, 2.0), made.take(1, 2.0)] == [0, None]
    assert made.done(1, 0, 3.0) and [made.take(1, 3.0), made.take(1, 3.0)] == [1, None]
    assert made.done(1, 1, 4.0) and [made.take(1, 4.0), made.take(1, 4.0)] == [3, 4]


def test_a_worker_without_a_word_is_hung_and_one_that_speaks_is_not() -> None:
    made = dispatch(4, 2)
    assert made.take(0, 0.0) == 0 and made.take(1, 0.0) is not None
    made.heard(1, 30.0)
    assert made.stalled(49.0) == [] and made.pause_s(49.0) == 1.0
    assert made.stalled(50.0) == [0]
    assert made.stalled(80.0) == [0, 1]
    assert made.lost(0, 80.0) == [] and made.stalled(80.0) == [1]


def test_a_worker_with_nothing_to_do_is_not_hung() -> None:
    made = dispatch(1, 2)
    assert made.take(0, 0.0) == 0 and made.take(1, 0.0) is None
    made.heard(0, 49.0)
    assert made.stalled(60.0) == []


def test_sticky_units_stay_and_those_of_the_dead_move() -> None:
    made = dispatch(6, 2, sticky=True)
    assert [made.take(1, 0.0), made.take(1, 0.0)] == [1, 3]
    assert [made.take(0, 0.0), made.take(0, 0.0)] == [0, 2]
    assert made.done(0, 0, 1.0) and made.done(0, 2, 1.0)
    assert made.take(0, 1.0) == 4 and made.take(0, 1.0) is None
    assert made.lost(1, 1.0) == []
    assert made.done(0, 4, 2.0)
    assert [made.take(0, 2.0), made.take(0, 2.0)] == [1, None]  # 1 has waited
    assert made.done(0, 1, 2.5) and made.take(0, 2.5) == 3
    made.joined(1, 3.0)
    assert made.take(1, 3.0) == 5


def test_stragglers_are_done_twice_and_count_once() -> None:
    made = dispatch(4, 2, copies=True)
    assert made.take(0, 0.0) == 0
    now = 0.0
    for unit in (1, 2, 3):
        assert made.take(1, now) == unit
        now += 1.0
        assert made.done(1, unit, now)
    assert made.take(1, 1.5) is None  # not long yet
    assert made.take(1, 3.0) == 0 and made.copied == 1
    assert made.take(1, 9.0) is None  # not a third time
    assert made.done(1, 0, 4.0) and made.ended()
    assert not made.done(0, 0, 5.0)
    assert made.is_done(0)


def test_without_copies_nothing_is_done_twice() -> None:
    made = dispatch(2, 2)
    assert made.take(0, 0.0) == 0 and made.take(1, 0.0) == 1
    assert made.done(1, 1, 1.0)
    assert made.take(1, 1000.0) is None


@given(
    units=st.integers(0, 40),
    workers=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    sticky=st.booleans(),
    copies=st.booleans(),
    trouble=st.sampled_from([0.0, 0.1, 0.4]),
)
@settings(deadline=None, max_examples=300)
def test_every_unit_ends_once_whatever_happens(
    units: int, workers: int, seed: int, sticky: bool, copies: bool, trouble: float
) -> None:
    chance = random.Random(seed)
    made = Dispatch(
        units, workers=workers, rules=RULES, sticky=sticky, copies=copies and not sticky
    )
    ended: Counter[int] = Counter()
    running: dict[int, list[int]] = {}
    suspects: set[int] = set()
    events: list[tuple[float, int, str, int]] = []
    now = 0.0

    def feed(worker: int) -> None:
        while (unit := made.take(worker, now)) is not None:
            running[worker].append(unit)
            if len(running[worker]) == 1:
                plan(worker)
            assert len(running[worker]) == 1 or suspects.isdisjoint(running[worker])

    def plan(worker: int) -> None:
        what = "die" if chance.random() < trouble / 2 else "fail"
        what = what if chance.random() < trouble else "done"
        heapq.heappush(events, (now + chance.choice([1, 1, 1, 20]), worker, what, 0))

    for worker in range(workers):
        made.joined(worker, now)
        running[worker] = []
    for _ in range(10_000):
        for worker in running:
            feed(worker)
        if made.ended():
            break
        if not events:
            now += max(made.pause_s(now), 0.01)
            continue
        at, worker, what, _ = heapq.heappop(events)
        now = max(now, at)
        if what == "back":
            made.joined(worker, now)
            running[worker] = []
            continue
        if what == "die":
            ended.update(made.lost(worker, now))
            had = running.pop(worker)
            if sticky or not copies:  # a copy may run beside another already
                suspects.update(had)
            heapq.heappush(events, (now + 3, worker, "back", 0))
            continue
        unit = running[worker].pop(0)
        if what == "done":
            ended[unit] += made.done(worker, unit, now)
        elif made.failed(worker, unit, now):
            ended[unit] += 1
        if running[worker]:
            plan(worker)
    assert made.ended()
    assert ended == Counter(range(units))


@pytest.mark.parametrize("sticky", [False, True])
def test_nothing_to_do_is_done(sticky: bool) -> None:
    assert dispatch(0, 2, sticky=sticky).ended()


def test_what_runs_elsewhere_is_not_given_up() -> None:
    made = Dispatch(2, workers=2, rules=Rules(attempts=1, straggler=2.0), copies=True)
    for worker in (0, 1):
        made.joined(worker, 0.0)
    assert made.take(0, 0.0) == 0 and made.take(1, 0.0) == 1
    assert made.done(1, 1, 1.0)
    assert made.take(1, 5.0) == 0  # a copy
    assert made.lost(0, 6.0) == [] and not made.ended()
    assert made.done(1, 0, 7.0) and made.ended()


def test_a_copy_that_is_lost_last_is_given_up() -> None:
    made = Dispatch(2, workers=2, rules=Rules(attempts=1, straggler=2.0), copies=True)
    for worker in (0, 1):
        made.joined(worker, 0.0)
    assert made.take(0, 0.0) == 0 and made.take(1, 0.0) == 1
    assert made.done(1, 1, 1.0) and made.take(1, 5.0) == 0
    assert made.lost(0, 6.0) == []
    assert made.lost(1, 6.0) == [0] and made.ended()
