"""The executor on Ray: one actor per worker, each holding a `memedit.worker.Worker`.

Knows how units travel, what a death looks like and what a new worker has to do again; which unit
goes where next is decided in `cluster.dispatch`. Does not know what the units are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

import memedit
from cluster.dispatch import Dispatch, Rules
from cluster.placement import place
from cluster.ray_actor import Actor, Seat
from cluster.ray_cluster import connect, last_line, machines
from memedit.errors import InputError, MemeditError, NumericalError
from memedit.executor import Executor, Failed
from memedit.files import LocalFiles
from memedit.model import ModelSpec

_AGAIN = "run the same command again: finished work is kept"
_LASTING = ("load", "apply")
"""What changes a worker's model; a new worker does it again."""
_LIVES = 6
"""Deaths of one worker without a finished unit between them, before no new one is started; a death
before it is ready counts twice."""
_FOREIGN = (RuntimeError, OSError, MemoryError)
"""Errors that memedit does not raise on purpose; the process may be of no more use."""
_LOOK_S = 1.0
"""How often the driver looks round while a worker has nothing to do."""


@dataclass(kw_only=True)
class _Slot:
    """One worker of the executor: an actor, and the next one when it dies."""

    number: int
    actor: Any = None
    seat: Seat | None = None
    begun: Any = None
    """What tells that it is ready, or None once it is."""
    left: set[Any] = field(default_factory=set)
    """Calls whose results nobody waits for any more."""
    deaths: int = 0
    """Since it last finished a unit."""
    gone: str = ""
    """Why no new actor is started."""

    @property
    def ready(self) -> bool:
        return not self.gone and self.begun is None

    @property
    def free(self) -> bool:
        """Whether it can take units."""
        return self.ready and not self.left


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
        tell: Told of what went wrong and was mended.

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
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if spec.device != "cpu" and not gpus_per_worker:
            raise InputError(
                f"the device {spec.device} needs GPUs: say how many each worker gets, or use cpu",
                field="gpus_per_worker",
            )
        if spec.files.here is not None:
            spec = replace(spec, files=LocalFiles(spec.files.here.absolute()))
        self.rules = rules or Rules()
        self._tell = tell or (lambda _: None)
        self._start_timeout_s = start_timeout_s
        self._slots: list[_Slot] = []
        self._story: list[tuple[str, list[Any]]] = []
        self._connected = False
        try:
            self._connected = connect(address)
            self._placement = place(
                machines(ours=self._connected and address is None),
                workers=workers,
                gpus_per_worker=gpus_per_worker,
                threads=threads,
                memory_per_worker_bytes=_memory_bytes(spec),
            )
            self.n_workers = self._placement.workers
            self._spec = ray.put(spec)
            self._slots = [_Slot(number=number) for number in range(self.n_workers)]
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def seats(self) -> tuple[Seat, ...]:
        """Where the workers run that are ready."""
        return tuple(slot.seat for slot in self._slots if slot.ready and slot.seat is not None)

    # --- Workers: start, death, replacement -----------------------------------------------------

    def _start(self) -> None:
        for slot in self._slots:
            self._launch(slot)
        calls = [slot.actor.seat.remote() for slot in self._slots]
        _, waiting = ray.wait(calls, num_returns=len(calls), timeout=self._start_timeout_s)
        if waiting:
            placement, free = self._placement, ray.available_resources()  # type: ignore[no-untyped-call]
            raise MemeditError(
                f"{len(waiting)} of {len(calls)} workers did not start within "
                f"{self._start_timeout_s:g} s; "
                f"each needs {placement.threads} CPUs and {placement.gpus:g} GPUs, and "
                f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free; "
                "ask for fewer workers, or wait until others have finished"
            )
        for slot, call in zip(self._slots, calls, strict=True):
            try:
                slot.seat = ray.get(call)
            except RayError as error:
                raise MemeditError(self._obituary(slot, error)) from error
            if slot.seat.version != memedit.__version__:
                raise self._other_version(slot.seat)
        until = time.monotonic() + self._patience_s
        while starting := [slot for slot in self._slots if slot.begun is not None]:
            ray.wait([slot.begun for slot in starting], num_returns=1, timeout=_LOOK_S)
            for slot in starting:
                self._welcome(slot, first=True)
            if starting and time.monotonic() > until:
                names = ", ".join(self._name(slot) for slot in starting if slot.begun is not None)
                raise MemeditError(
                    f"{names or 'a worker'} has not loaded the model within {self._patience_s:g} s"
                )
        self._need_workers()

    def _launch(self, slot: _Slot) -> None:
        """Start an actor that loads the model and gets into the state of the others."""
        # Before torch is imported, so that no library makes a larger pool.
        threads, gpus = self._placement.threads, self._placement.gpus
        pools = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        make = ray.remote(Actor).options(
            num_cpus=threads,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": pools},
        )
        slot.actor, slot.seat, slot.left = make.remote(self._placement), None, set()
        slot.begun = slot.actor.begin.remote(self._spec, self._story)

    def _welcome(self, slot: _Slot, *, first: bool = False) -> None:
        """Take in a starting worker if it is ready by now, or see why it never will be."""
        if slot.begun is None or not ray.wait([slot.begun], timeout=0)[0]:
            return
        try:
            slot.seat = self._result(slot.begun)
        except MemeditError as error:
            if first:
                raise
            self._give_up(slot, f"a new worker could not begin: {error}")
        except RayError as error:
            self._bury(slot, error)
        except _FOREIGN as error:
            if first:
                raise
            self._bury(slot, f"{self._name(slot)} could not begin: {last_line(str(error))}")
        else:
            if slot.seat.version != memedit.__version__:  # its machine came back with another image
                self._give_up(slot, str(self._other_version(slot.seat)))
            slot.begun = None

    def _bury(self, slot: _Slot, error: Exception | str) -> None:
        """Replace a worker that has died, or is to."""
        reason = error if isinstance(error, str) else self._obituary(slot, error)
        ray.kill(slot.actor, no_restart=True)
        slot.deaths += 1 if slot.begun is None else 2
        if slot.deaths >= _LIVES:
            self._give_up(slot, reason)
            return
        self._tell(f"{reason}; another one takes its place")
        self._launch(slot)

    @property
    def _patience_s(self) -> float:
        """How long a worker may take to start and to load the model."""
        return max(self._start_timeout_s, self.rules.stall_s)

    def _other_version(self, seat: Seat) -> InputError:
        return InputError(
            f"{seat.node} has memedit {seat.version}, this is {memedit.__version__}; "
            "install the same version on every machine"
        )

    def _give_up(self, slot: _Slot, reason: str) -> None:
        ray.kill(slot.actor, no_restart=True)
        slot.begun, slot.gone, slot.left = None, reason, set()
        self._tell(f"{reason}; it is not started again")

    def _need_workers(self) -> None:
        """Wait until some worker is ready.

        Raises:
            MemeditError: None is, and none will be.
        """
        until = time.monotonic() + self._patience_s
        while not any(slot.ready for slot in self._slots):
            starting = [slot for slot in self._slots if slot.begun is not None]
            if not starting:
                reasons = "; ".join(dict.fromkeys(slot.gone for slot in self._slots))
                raise MemeditError(f"no worker is left: {reasons}; {_AGAIN}")
            if time.monotonic() > until:
                raise MemeditError(
                    f"all workers have died, and no other was started and has loaded the model"
                    f" within {self._patience_s:g} s; {_AGAIN}"
                )
            ray.wait([slot.begun for slot in starting], num_returns=1, timeout=_LOOK_S)
            for slot in starting:
                self._welcome(slot)

    # --- Work -----------------------------------------------------------------------------------

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
        calls: dict[Any, tuple[_Slot, int]] = {}
        joined: set[int] = set()

        def join(slot: _Slot) -> None:
            if slot.number not in joined:
                joined.add(slot.number)
                dispatch.joined(slot.number, time.monotonic())

        def feed(slot: _Slot) -> None:
            while (unit := dispatch.take(slot.number, time.monotonic())) is not None:
                given = rest(unit) if rest is not None else units[unit]
                if given is None:  # another attempt has given all there was to give
                    dispatch.done(slot.number, unit, time.monotonic())
                else:
                    calls[self._call(slot, method, given)] = (slot, unit)

        def lose(slot: _Slot, why: Exception | str) -> Iterator[tuple[int, Failed]]:
            for call in [call for call, (owner, _) in calls.items() if owner is slot]:
                del calls[call]
            joined.discard(slot.number)
            reason = why if isinstance(why, str) else self._obituary(slot, why)
            given_up = dispatch.lost(slot.number, time.monotonic())
            if given_up:  # the unit is to blame
                slot.deaths = 0
            self._bury(slot, why)
            for unit in given_up:
                yield unit, self._failed(reason, dispatch.rules.attempts, give_up=give_up)

        try:
            while not dispatch.ended():
                self._need_workers()
                free = [slot for slot in self._slots if slot.free]
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
                        if not (give_up and isinstance(error, NumericalError)):
                            raise
                        if dispatch.failed(slot.number, unit, time.monotonic(), for_good=True):
                            yield unit, Failed(reason=str(error))
                        continue
                    except RayError as error:
                        yield from lose(slot, error)
                        continue
                    except _FOREIGN as error:
                        # Such as a broken CUDA context: the process may be of no more use.
                        yield from lose(slot, f"{self._name(slot)} failed: {last_line(str(error))}")
                        continue
                    dispatch.heard(slot.number, time.monotonic())
                    if not more:
                        del calls[event]
                        slot.deaths = 0
                        dispatch.done(slot.number, unit, time.monotonic())
                    yield from ((unit, item) for item in items)
                for number in dispatch.stalled(time.monotonic()):
                    why = f"gave nothing for {self.rules.stall_s:g} s and was stopped"
                    slot = self._slots[number]
                    yield from lose(slot, f"{self._name(slot)} {why}")
        finally:
            for call, (slot, _) in calls.items():
                slot.left.add(call)

    def _await(self, calls: dict[Any, tuple[_Slot, int]], dispatch: Dispatch) -> list[Any]:
        """What happens next at any worker, if anything does in time."""
        others = [slot.begun for slot in self._slots if slot.begun is not None]
        others += [call for slot in self._slots for call in slot.left]
        timeout_s = dispatch.pause_s(time.monotonic())
        busy = {slot.number for slot, _ in calls.values()}
        if len(busy) < len([slot for slot in self._slots if slot.free]):
            timeout_s = min(timeout_s, _LOOK_S)
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
        for slot in self._slots:
            if event == slot.begun:  # through ray:// it is another object each time
                self._welcome(slot)
            elif event in slot.left:
                try:
                    _, more = self._ready(event)
                except RayError as error:
                    slot.left.clear()
                    self._bury(slot, error)
                except Exception:  # nobody waits for the result, nor for what went wrong with it
                    slot.left.discard(event)
                else:
                    if not more:
                        slot.left.discard(event)

    def _failed(self, reason: str, attempts: int, *, give_up: bool) -> Failed:
        if not give_up:
            raise MemeditError(f"{reason}; that was attempt {attempts} at the same work; {_AGAIN}")
        return Failed(reason=f"{reason}; attempt {attempts}")

    def _call(self, slot: _Slot, method: str, unit: tuple[Any, ...]) -> Any:
        if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
            return slot.actor.collect.remote(method, *unit)  # Ray Client knows no streams
        return slot.actor.stream.options(num_returns="streaming").remote(method, *unit)

    def _ready(self, call: Any) -> tuple[list[Any], bool]:
        """The items of a call that are there, and whether more may follow."""
        if not isinstance(call, ray.ObjectRefGenerator):
            return self._result(call), False
        reference = next(call, None)
        return ([], False) if reference is None else ([self._result(reference)], True)

    def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """See `Executor.broadcast`; arguments are put into the object store once."""
        stored = [ray.put(argument) for argument in arguments]
        if method not in _LASTING:
            return self._broadcast(method, stored)
        ready = [slot for slot in self._slots if slot.ready]
        for slot in self._slots:  # who is just beginning does it after that
            if slot.begun is not None:
                slot.begun = slot.actor.follow.remote(method, *stored)
        before = self._story
        self._story = [*(before if method != "load" else []), (method, stored)]
        for slot in self._slots:
            if slot.left:  # it works for nobody, and all would wait for it
                ray.kill(slot.actor, no_restart=True)
                self._launch(slot)
        try:
            return self._broadcast(method, stored, [slot for slot in ready if slot.ready])
        except BaseException:
            self._story = before
            raise

    def _broadcast(
        self, method: str, stored: Sequence[Any], chosen: list[_Slot] | None = None
    ) -> list[Any]:
        """Call it on the `chosen` workers, or on all that are ready, until one has answered.

        Where workers were chosen, all others do it by themselves before they are ready.
        """
        while True:
            slots = chosen
            if slots is None:
                self._need_workers()
                slots = [slot for slot in self._slots if slot.ready]
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
                        self._bury(slot, f"{self._name(slot)} {why}")
                        continue
                    try:
                        (items[slot.number],) = self._result(call)
                    except RayError as error:
                        self._bury(slot, error)
                    except _FOREIGN as error:
                        self._bury(slot, f"{self._name(slot)} failed: {last_line(str(error))}")
            if items:  # in the order of the workers, so that sums are the same each time
                return [items[number] for number in sorted(items)]
            if chosen is not None:
                self._need_workers()  # new ones have done it before they were ready
                return [None]

    def _result(self, reference: Any) -> Any:
        """What a call gave, or the error that it raised as it was raised there.

        Raises:
            RayError: The worker has died.
        """
        try:
            return ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else MemeditError(str(error))) from error

    def _name(self, slot: _Slot) -> str:
        who = f"worker {slot.number + 1} of {self.n_workers}"
        return f"{who} ({slot.seat})" if slot.seat else who

    def _obituary(self, slot: _Slot, error: Exception) -> str:
        who, text = self._name(slot), str(error)
        if "ModuleNotFoundError" in text or "ImportError" in text:
            return f"{who} could not import memedit; install it on every machine: {last_line(text)}"
        how = "was killed or crashed"
        if isinstance(error, OutOfMemoryError) or "low on memory" in text:
            how = "ran out of memory; ask for fewer workers"
        return f"{who} died: it {how}"

    def close(self) -> None:
        """End the actors, and the local Ray if one was started; again does nothing."""
        slots, self._slots = self._slots, []
        connected, self._connected = self._connected, False
        if ray.is_initialized():
            for slot in slots:
                if slot.actor is not None:
                    ray.kill(slot.actor, no_restart=True)
            if connected:
                ray.shutdown()


def _memory_bytes(spec: ModelSpec) -> float:
    """Roughly what a worker takes: weights may double in another dtype, and work needs room."""
    sizes = spec.files.sizes()
    return 2.0 * sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
