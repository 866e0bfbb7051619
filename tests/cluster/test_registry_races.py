"""Two commands on one registry at the same moment, in every order that matters.

A step is one call of the store. What must hold at the end, whatever the order: what CURRENT and the
pins name is there, whole, with all that it needs; and nothing has a manifest that is not whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.current import Current
from cluster.registry import Registry
from cluster.retention import Collected, Rules, collect
from cluster.store import ABSENT
from memedit.errors import InputError, LockError
from tests.cluster.made_versions import days_ago, publish
from tests.cluster.memory_store import MemoryStore, interleave, steps_of

Command = Callable[[Registry], Any]


def _made() -> dict[str, tuple[bytes, str]]:
    store = MemoryStore()
    for age, (run_id, needs) in enumerate(
        [("new", None), ("delta", "base"), ("base", None), ("old", None)]
    ):
        publish(store, run_id, needs=needs, created=days_ago(age + 1))
    Registry(store).move("new", expected=ABSENT, by="publish")
    return store.objects


MADE = _made()


def a_registry(**options: Any) -> Registry:
    """CURRENT is at `new`; `old`, and `delta` upon `base`, are not worth keeping."""
    store = MemoryStore(dict(MADE), **options)
    return Registry(store)


def check(registry: Registry) -> None:
    """What must hold whenever no command is running."""
    store = registry.store
    claimed = list(registry.pins())
    if current := registry.current():
        claimed.append(current.version)
    for run_id in claimed:
        registry.require_whole(run_id)
    assert [v.problems for v in registry.versions() if not v.unfinished and v.problems] == []
    assert not store.sizes("holds")


def gc(registry: Registry) -> Collected:
    return collect(registry, Rules(keep=0))


def remove(registry: Registry) -> list[str]:
    """What gc does once it has made its plan."""
    with registry.store.lock():
        return registry.remove(["delta", "base", "old"])


def rollback(to: str) -> Command:
    def command(registry: Registry) -> Current:
        seen = registry.current()
        assert seen is not None
        return registry.move(to, expected=seen.token, by="rollback")

    return command


def pin(run_id: str) -> Command:
    return lambda registry: registry.pin(run_id)


def there_and_back(registry: Registry) -> Current:
    """CURRENT goes to `old` and on to `delta`, while `old` is pinned and given up again."""
    registry.pin("old")
    rollback("old")(registry)
    registry.unpin("old")
    return rollback("delta")(registry)  # type: ignore[no-any-return]


NEEDING: dict[str, tuple[Command, str]] = {
    "rollback": (rollback("old"), "old"),
    "rollback to a delta": (rollback("delta"), "base"),
    "pin": (pin("old"), "old"),
    "pin of a delta": (pin("delta"), "base"),
}


@pytest.mark.slow
@pytest.mark.parametrize("needing", NEEDING)
@pytest.mark.parametrize("first", ["removal", "the other"])
def test_one_begins_then_the_other_then_both_go_on(needing: str, first: str) -> None:
    """Every pair of points at which the two can be interrupted."""
    command, needed = NEEDING[needing]
    lengths = []
    for alone in (remove, command):
        registry = a_registry()
        lengths.append(len(steps_of(_memory(registry), lambda: alone(registry))))  # noqa: B023
    outcomes = set()
    order = (0, 1) if first == "removal" else (1, 0)
    for i in range(lengths[order[0]] + 1):
        for j in range(1, lengths[order[1]] + 1):
            registry = a_registry()
            schedule = [order[0]] * i + [order[1]] * j + [order[0]] * 1000 + [order[1]] * 1000
            removed, found = interleave(
                _memory(registry),
                [lambda: remove(registry), lambda: command(registry)],  # noqa: B023
                schedule,
            )
            assert isinstance(removed, list), removed
            assert not isinstance(found, Exception) or isinstance(found, InputError | LockError)
            check(registry)
            kept = not isinstance(found, Exception)
            assert kept != (needed in removed), (i, j, found)
            outcomes.add("" if kept else type(found).__name__)
            gc(registry)
            check(registry)
    # Both win in some orders, and who comes too late is told so.
    assert outcomes == {"", "LockError", "InputError"}


def _memory(registry: Registry) -> MemoryStore:
    assert isinstance(registry.store, MemoryStore)
    return registry.store


def turns_of(commands: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Which command goes on, and for how many steps, again and again."""
    return st.lists(st.tuples(st.integers(0, commands - 1), st.integers(1, 30)), max_size=30)


def order_of(turns: list[tuple[int, int]]) -> list[int]:
    return [command for command, steps in turns for _ in range(steps)]


COMMANDS: list[Command] = [gc, gc, rollback("old"), rollback("delta"), pin("base"), there_and_back]


@settings(max_examples=150, deadline=None)
@given(turns=turns_of(len(COMMANDS)))
def test_many_at_once_and_locks_that_keep_nobody_out(turns: list[tuple[int, int]]) -> None:
    """As when a gc was suspended until its lock ran out, and another one came."""
    registry = a_registry(exclusive=False)
    found = interleave(
        _memory(registry),
        [lambda command=command: command(registry) for command in COMMANDS],
        order_of(turns),
    )
    for each in found:
        assert not isinstance(each, Exception) or isinstance(each, InputError | LockError), each
    check(registry)


class Killed(BaseException):
    """The process is no more: nothing that it would do in the end happens."""


def killed_at(registry: Registry, command: Command, step: int) -> None:
    """Run a command that dies before a step."""
    store, taken = _memory(registry), 0

    def count(operation: str, name: str) -> None:
        nonlocal taken
        taken += 1
        if taken > step:
            raise Killed

    store.before = count
    with pytest.raises(Killed):
        command(registry)
    store.before = lambda operation, name: None


@pytest.mark.parametrize("later", ["rollback", "pin"])
def test_a_gc_that_died_is_in_nobodys_way(later: str) -> None:
    """Whatever it had removed in part is gone for good; all else can be used; the next one ends."""
    alone = a_registry()
    steps, refused = len(steps_of(_memory(alone), lambda: gc(alone))), 0
    command = rollback("old") if later == "rollback" else pin("old")
    for step in range(steps):
        registry = a_registry()
        killed_at(registry, gc, step)
        check(registry)
        try:
            command(registry)
        except (LockError, InputError):
            refused += 1
        check(registry)
        gc(registry)
        check(registry)
        left = {v.name for v in registry.versions()}
        assert left in ({"new"}, {"new", "old"})
        traces = registry.store.sizes("removing")
        assert {name.removeprefix("removing/") for name in traces} <= left
    assert 0 < refused < steps


@pytest.mark.parametrize("needing", NEEDING)
def test_a_command_that_died_leaves_everything_usable(needing: str) -> None:
    command, _ = NEEDING[needing]
    alone = a_registry()
    for step in range(len(steps_of(_memory(alone), lambda: command(alone)))):
        registry = a_registry()
        killed_at(registry, command, step)
        current = registry.current()
        assert current is not None
        registry.require_whole(current.version)
        gc(registry)
        for run_id in {current.version, *registry.pins()}:
            registry.require_whole(run_id)
        rollback("new")(registry)


RUN_IDS = ["a", "b", "c", "d", "e", "f"]
SOME = st.sampled_from(RUN_IDS)


@settings(max_examples=150, deadline=None)
@given(
    ages=st.permutations(range(len(RUN_IDS))),
    needs=st.dictionaries(SOME, SOME),
    used=st.lists(SOME, max_size=3),
    pinned=st.sets(SOME, max_size=2),
    unfinished=st.sets(SOME, max_size=1),
    keep=st.integers(0, 6),
    target=SOME,
    by_pin=st.booleans(),
    turns=turns_of(2),
)
def test_nothing_that_is_needed_is_ever_removed(
    ages: list[int],
    needs: dict[str, str],
    used: list[str],
    pinned: set[str],
    unfinished: set[str],
    keep: int,
    target: str,
    by_pin: bool,
    turns: list[tuple[int, int]],
) -> None:
    """Any registry, and somebody who needs any version while gc is running."""
    store = MemoryStore()
    registry = Registry(store)
    for run_id, age in zip(RUN_IDS, ages, strict=True):
        publish(store, run_id, needs=needs.get(run_id), created=days_ago(age))
    for run_id in used:
        seen = registry.current()
        registry.move(run_id, expected=seen.token if seen else ABSENT, by="publish")
    for run_id in pinned:
        registry.pin(run_id)
    before = registry.claims()
    lost = unfinished - before.keys() - {target}
    for run_id in lost:
        store.delete([f"versions/{run_id}/memedit.json"])
    newest = [v.name for v in registry.versions() if not v.unfinished][:keep]

    def claim() -> object:
        if by_pin:
            return registry.pin(target)
        seen = registry.current()
        return registry.move(target, expected=seen.token if seen else ABSENT, by="rollback")

    done, claimed = interleave(
        store, [lambda: collect(registry, Rules(keep=keep)), claim], order_of(turns)
    )
    assert isinstance(done, Collected), done

    def needed(names: Iterable[str]) -> set[str]:
        found = set(names)
        while more := {needs[n] for n in found - lost if n in needs} - found:
            found |= more
        return found

    staying = {*newest, *pinned, *used[-1:]}
    if not isinstance(claimed, Exception):
        staying.add(target)
    found = {v.name: v for v in registry.versions()}
    for run_id in needed(staying) - lost:
        assert found[run_id].problems == [], run_id
    # A gc that removes nothing would pass so far.
    assert found.keys() <= needed({*staying, target, *before, *registry.claims()})
