"""The executor on Ray: one actor per worker, each holding a `memedit.worker.Worker`.

Knows how units travel; which unit goes where next is decided in `cluster.dispatch`, and the workers
are kept alive by `cluster.ray_crew`. Does not know what the units are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.dispatch import Dispatch, Rules
from cluster.placement import place
from cluster.ray_actor import Seat
from cluster.ray_cluster import connect, machines, storing
from cluster.ray_crew import AGAIN, BROKEN, LOOK_S, Crew, Slot, result_of
from memedit.errors import InputError, MemeditError, NumericalError
from memedit.executor import Executor, Failed
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from memedit.progress import Progress, Silent, UnitReport

_LASTING = ("load", "keep", "apply")
"""What a worker's model is made by; a new worker does it again."""


class RayExecutor(Executor):
    """Workers as Ray actors; see `memedit.executor.Executor`.

    A worker that dies, hangs or loses its machine is replaced by a new one in the same state, and
    what it was doing is done again; see `cluster.dispatch.Rules` for how often.

    Args:
        spec: The model that each worker loads, from a folder that all of them see. The device
            "cpu" stays; any other is the GPU that Ray gives to the worker.
        address: `auto`, HOST:PORT or ray://HOST:PORT; None starts a local Ray, which is shut down
            by `close`. A Ray that this process is connected to already is used as it is.
        workers: How many; None for as many as the cluster holds.
        gpus_per_worker: GPUs of each worker.
        threads: CPUs and threads of each worker; None for an equal share.
        start_timeout_s: How long to wait for the cluster to start the actors.
        rules: What is put up with.
        progress: Told of each unit that ends, and of what went wrong and was mended.

    Raises:
        InputError: The cluster cannot be reached, is too small, or its machines lack the model or
            this version of memedit.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        address: str | None = None,
        workers: int | None = None,
        gpus_per_worker: float = 0.0,
        threads: int | None = None,
        start_timeout_s: float = 300.0,
        rules: Rules | None = None,
        progress: Progress | None = None,
    ) -> None:
        if spec.device != "cpu" and not gpus_per_worker:
            raise InputError(
                f"the device {spec.device} needs GPUs: say how many each worker gets, or use cpu",
                field="gpus_per_worker",
            )
        if spec.files.here is not None:
            spec = replace(spec, files=LocalFiles(spec.files.here.absolute()))
        self.rules, self._progress = rules or Rules(), progress or Silent()
        self._ends = ExitStack()
        self._units: dict[str, int] = {}
        """How many units of each kind there were, so that each has a number of its own."""
        try:
            connection = connect(address)
            if connection.ours:
                self._ends.callback(ray.shutdown)
            if connection.dashboard:
                self._progress.message(f"Ray's dashboard: {connection.dashboard}", warning=False)
            placement = place(
                machines(ours=connection.ours and address is None),
                workers=workers,
                gpus_per_worker=gpus_per_worker,
                threads=threads,
                memory_per_worker_bytes=_memory_bytes(spec),
            )
            self.n_workers = placement.workers
            self.crew = Crew(
                spec,
                placement,
                start_timeout_s=start_timeout_s,
                rules=self.rules,
                tell=self._progress.message,
            )
            self._ends.callback(self.crew.end)
            self.crew.start()
        except BaseException:
            self.close()
            raise

    @property
    def seats(self) -> tuple[Seat, ...]:
        """Where the workers run that are ready."""
        return self.crew.seats

    def map(
        self,
        method: str,
        units: Sequence[tuple[Any, ...]],
        *,
        sticky: bool = False,
        copies: bool = False,
        rest: Callable[[int], tuple[Any, ...] | None] | None = None,
        give_up: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """See `Executor.map`; items come as they are made (through ray://, unit by unit)."""
        dispatch = Dispatch(
            len(units), workers=self.n_workers, rules=self.rules, sticky=sticky, copies=copies
        )
        calls: dict[Any, tuple[Slot, int]] = {}
        joined: set[int] = set()

        def join(slot: Slot) -> None:
            if slot.number not in joined:
                joined.add(slot.number)
                dispatch.joined(slot.number, time.monotonic())

        first = self._units.get(method, 0)
        self._units[method] = first + len(units)

        def report(slot: Slot, unit: int, failure: str | None = None) -> None:
            if dispatch.is_done(unit):  # a copy that came later
                return
            at = dispatch.in_hand(slot.number)
            self._progress.unit(
                UnitReport(
                    work=method,
                    unit_id=first + unit,
                    worker=self.crew.name(slot),
                    seconds=0.0 if at is None else time.monotonic() - at[1],
                    attempt=dispatch.attempts(unit) + 1,
                    failure=failure,
                )
            )

        def feed(slot: Slot) -> None:
            while (unit := dispatch.take(slot.number, time.monotonic())) is not None:
                given = rest(unit) if rest is not None else units[unit]
                if given is None:  # another attempt has given all there was to give
                    dispatch.done(slot.number, unit, time.monotonic())
                else:
                    calls[self._call(slot, method, given)] = (slot, unit)

        def lose(slot: Slot, why: Exception | str) -> Iterator[tuple[int, Failed]]:
            for call in [call for call, (owner, _) in calls.items() if owner is slot]:
                del calls[call]
            joined.discard(slot.number)
            reason = why if isinstance(why, str) else self.crew.obituary(slot, why)
            if (unit_in_hand := dispatch.in_hand(slot.number)) is not None:
                report(slot, unit_in_hand[0], failure=reason)
            given_up = dispatch.lost(slot.number, time.monotonic())
            if given_up:  # the unit is to blame
                slot.deaths = 0
            self.crew.bury(slot, why)
            for unit in given_up:
                yield unit, self._failed(reason, dispatch.rules.attempts, give_up=give_up)

        try:
            while not dispatch.ended():
                self.crew.need_workers()
                free = [slot for slot in self.crew.slots if slot.free]
                for slot in free:  # all of them first, or their units would seem nobody's
                    join(slot)
                for slot in free:
                    feed(slot)
                if dispatch.ended():
                    break
                for event in self._await(calls, dispatch):
                    if event not in calls:
                        self._notice(event)
                        continue
                    slot, unit = calls[event]
                    try:
                        items, more = self._ready(event)
                    except MemeditError as error:
                        del calls[event]
                        report(slot, unit, failure=str(error))
                        if not (give_up and isinstance(error, NumericalError)):
                            raise
                        if dispatch.failed(slot.number, unit, time.monotonic(), for_good=True):
                            yield unit, Failed(reason=str(error))
                        continue
                    except BROKEN as error:
                        yield from lose(slot, error)
                        continue
                    dispatch.heard(slot.number, time.monotonic())
                    if not more:
                        del calls[event]
                        slot.deaths = 0
                        report(slot, unit)
                        dispatch.done(slot.number, unit, time.monotonic())
                    yield from ((unit, item) for item in items)
                for number in dispatch.stalled(time.monotonic()):
                    why = f"gave nothing for {self.rules.stall_s:g} s and was stopped"
                    slot = self.crew.slots[number]
                    yield from lose(slot, f"{self.crew.name(slot)} {why}")
        finally:
            for call, (slot, _) in calls.items():
                slot.left.add(call)

    def _await(self, calls: dict[Any, tuple[Slot, int]], dispatch: Dispatch) -> list[Any]:
        """What happens next at any worker, if anything does in time."""
        others = [slot.begun for slot in self.crew.slots if slot.begun is not None]
        others += [call for slot in self.crew.slots for call in slot.left]
        timeout_s = dispatch.pause_s(time.monotonic())
        busy = {slot.number for slot, _ in calls.values()}
        idle = len(busy) < len([slot for slot in self.crew.slots if slot.free])
        if idle or any(slot.begun is not None for slot in self.crew.slots):
            timeout_s = min(timeout_s, LOOK_S)
        if not calls and not others:
            time.sleep(timeout_s)  # until a unit that has failed may be tried again
            return []
        happened: list[Any]
        happened, rest = ray.wait([*calls, *others], num_returns=1, timeout=timeout_s)
        if happened and rest:  # all that are there, for a look at each call costs time
            happened += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return happened

    def _notice(self, event: Any) -> None:
        """Something that no unit waits for: a worker is ready, or done with what is not needed."""
        for slot in self.crew.slots:
            if event == slot.begun:  # through ray:// it is another object each time
                self.crew.welcome(slot)
            elif event in slot.left:
                try:
                    _, more = self._ready(event)
                except RayError as error:
                    slot.left.clear()
                    self.crew.bury(slot, error)
                except Exception:  # nobody waits for the result, nor for what went wrong with it
                    slot.left.discard(event)
                else:
                    if not more:
                        slot.left.discard(event)

    def _failed(self, reason: str, attempts: int, *, give_up: bool) -> Failed:
        if not give_up:
            raise MemeditError(f"{reason}; that was attempt {attempts} at the same work; {AGAIN}")
        return Failed(reason=f"{reason}; attempt {attempts}")

    def _call(self, slot: Slot, method: str, unit: tuple[Any, ...]) -> Any:
        with storing():
            if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
                return slot.actor.collect.remote(method, *unit)  # Ray Client knows no streams
            return slot.actor.stream.options(num_returns="streaming").remote(method, *unit)

    def _ready(self, call: Any) -> tuple[list[Any], bool]:
        """The items of a call that are there, and whether more may follow."""
        if not isinstance(call, ray.ObjectRefGenerator):
            return result_of(call), False
        reference = next(call, None)
        return ([], False) if reference is None else ([result_of(reference)], True)

    def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """See `Executor.broadcast`; arguments are put into the object store once."""
        with storing():
            stored = [ray.put(argument) for argument in arguments]
        if method not in _LASTING:
            return self._broadcast(method, stored)
        ready = [slot for slot in self.crew.slots if slot.ready]
        for slot in self.crew.slots:  # who is just beginning does it after that
            if slot.begun is not None:
                slot.begun = slot.actor.follow.remote(method, *stored)
        before = self.crew.story
        self.crew.story = [*(before if method != "load" else []), (method, stored)]
        for slot in self.crew.slots:
            if slot.left:  # it works for nobody, and all would wait for it
                ray.kill(slot.actor, no_restart=True)
                self.crew.launch(slot)
        try:
            return self._broadcast(method, stored, [slot for slot in ready if slot.ready])
        except BaseException:
            self.crew.story = before
            raise

    def _broadcast(
        self, method: str, stored: Sequence[Any], chosen: list[Slot] | None = None
    ) -> list[Any]:
        """Call it on the `chosen` workers, or on all that are ready, until one has answered.

        Where workers were chosen, all others do it by themselves before they are ready.
        """
        while True:
            slots = chosen
            if slots is None:
                self.crew.need_workers()
                slots = [slot for slot in self.crew.slots if slot.ready]
            calls = {slot.actor.collect.remote(method, *stored): slot for slot in slots}
            items: dict[int, Any] = {}
            until = time.monotonic() + self.rules.stall_s
            while calls:
                left_s = max(0.0, until - time.monotonic())
                done, _ = ray.wait(list(calls), num_returns=1, timeout=left_s)
                for call in done or list(calls):
                    slot = calls.pop(call)
                    if not done:
                        why = f"gave nothing for {self.rules.stall_s:g} s and was stopped"
                        self.crew.bury(slot, f"{self.crew.name(slot)} {why}")
                        continue
                    try:
                        (items[slot.number],) = result_of(call)
                    except BROKEN as error:
                        self.crew.bury(slot, error)
            if items:  # in the order of the workers, so that sums are the same each time
                return [items[number] for number in sorted(items)]
            if chosen is not None:
                self.crew.need_workers()  # new ones have done it before they were ready
                return [None]

    def close(self) -> None:
        """End the actors, and the local Ray if one was started; again does nothing."""
        self._ends.close()


def _memory_bytes(spec: ModelSpec) -> float:
    """Roughly what a worker takes: weights may double in another dtype, and work needs room."""
    sizes = spec.files.sizes()
    return 2.0 * sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
