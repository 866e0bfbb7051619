"""The workers of an executor on Ray: actors that start, die, and are replaced in the same state.

Knows what a death looks like and what a new worker has to do again. Does not know units: which of
them goes where is up to `cluster.ray_executor`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

import memedit
from cluster.dispatch import Rules
from cluster.placement import Placement
from cluster.ray_actor import Actor, Seat
from cluster.ray_cluster import FULL, NO_ROOM, last_line, storing
from memedit.errors import InputError, MemeditError
from memedit.model import ModelSpec

AGAIN = "run the same command again: finished work is kept"
_LIVES = 6
"""Deaths of one worker without a finished unit between them, before no new one is started; a death
before it is ready counts twice."""
BROKEN = (RayError, RuntimeError, OSError, MemoryError)
"""The worker has died, or may be of no more use, as after an error in CUDA."""
LOOK_S = 1.0
"""How often the driver looks round while a worker has nothing to do."""


@dataclass(kw_only=True)
class Slot:
    """One worker of the executor: an actor, and the next one when it dies."""

    number: int
    actor: Any = None
    seat: Seat | None = None
    begun: Any = None
    """What tells that it is ready, or None once it is."""
    seated: Any = None
    """What tells that its process runs; it may have to wait for a machine."""
    loading_since: float | None = None
    left: set[Any] = field(default_factory=set)
    """Calls whose results nobody waits for any more."""
    deaths: int = 0
    """Since it last finished a unit."""
    gone: str = ""
    """Why no new actor is started."""

    @property
    def ready(self) -> bool:
        """Whether it has the model, and the state of the others."""
        return not self.gone and self.begun is None

    @property
    def free(self) -> bool:
        """Whether it can take units."""
        return self.ready and not self.left


class Crew:
    """Workers of one run, each of which is replaced when it dies or is buried.

    Args:
        spec: The model that each worker loads.
        placement: How many, and what each of them takes.
        start_timeout_s: How long to wait for the cluster to start the actors.
        rules: What is put up with.
        tell: Told of what went wrong and was mended.
    """

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        *,
        start_timeout_s: float,
        rules: Rules,
        tell: Callable[[str], None],
    ) -> None:
        self.rules, self._placement, self._tell = rules, placement, tell
        self._start_timeout_s = start_timeout_s
        with storing():
            self._spec = ray.put(spec)
        self.story: list[tuple[str, list[Any]]] = []
        """What the workers were told to load, keep and apply: a new worker does it again."""
        self.slots = [Slot(number=number) for number in range(placement.workers)]

    @property
    def seats(self) -> tuple[Seat, ...]:
        """Where the workers run that are ready."""
        return tuple(slot.seat for slot in self.slots if slot.ready and slot.seat is not None)

    def start(self) -> None:
        """Start all, and wait until they have loaded the model.

        Raises:
            MemeditError: They have not in time, or cannot.
            InputError: A machine lacks the model, or has another version of memedit.
        """
        for slot in self.slots:
            self.launch(slot)
        calls = [slot.seated for slot in self.slots]
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
        for slot, call in zip(self.slots, calls, strict=True):
            try:
                slot.seat = ray.get(call)
            except RayError as error:
                raise MemeditError(self.obituary(slot, error)) from error
            if slot.seat.version != memedit.__version__:
                raise self._other_version(slot.seat)
        until = time.monotonic() + self.patience_s
        while starting := [slot for slot in self.slots if slot.begun is not None]:
            ray.wait([slot.begun for slot in starting], num_returns=1, timeout=LOOK_S)
            for slot in starting:
                self.welcome(slot, first=True)
            if starting and time.monotonic() > until:
                names = ", ".join(self.name(slot) for slot in starting if slot.begun is not None)
                raise MemeditError(
                    f"{names or 'a worker'} has not loaded the model within {self.patience_s:g} s"
                )
        self.need_workers()

    def launch(self, slot: Slot) -> None:
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
        slot.seated, slot.loading_since = slot.actor.seat.remote(), None
        slot.begun = slot.actor.begin.remote(self._spec, self.story)

    def welcome(self, slot: Slot, *, first: bool = False) -> None:
        """Take in a starting worker if it is ready by now, or see why it never will be."""
        if slot.begun is None or not ray.wait([slot.begun], timeout=0)[0]:
            return
        try:
            slot.seat = result_of(slot.begun)
        except MemeditError as error:
            if first:
                raise
            self._give_up(slot, f"a new worker could not begin: {error}")
        except BROKEN as error:
            if first and not isinstance(error, RayError):
                raise
            self.bury(slot, error)
        else:
            if slot.seat.version != memedit.__version__:  # its machine came back with another image
                self._give_up(slot, str(self._other_version(slot.seat)))
            slot.begun = None

    def bury(self, slot: Slot, error: Exception | str) -> None:
        """Replace a worker that has died, or is to."""
        reason = error if isinstance(error, str) else self.obituary(slot, error)
        ray.kill(slot.actor, no_restart=True)
        slot.deaths += 1 if slot.begun is None else 2
        if slot.deaths >= _LIVES:
            self._give_up(slot, reason)
            return
        self._tell(f"{reason}; another one takes its place")
        self.launch(slot)

    def _bury_overdue(self) -> None:
        """Replace those that run, but have not loaded the model in time."""
        for slot in self.slots:
            self.welcome(slot)  # it may be ready since nobody looked
            if slot.begun is None:
                continue
            now = time.monotonic()
            if slot.loading_since is None:
                if ray.wait([slot.seated], timeout=0)[0]:
                    slot.loading_since = now
            elif now - slot.loading_since > self.patience_s:
                why = f"has not loaded the model within {self.patience_s:g} s"
                self.bury(slot, f"{self.name(slot)} {why}")

    @property
    def patience_s(self) -> float:
        """How long a worker may take to start and to load the model."""
        return max(self._start_timeout_s, self.rules.stall_s)

    def _other_version(self, seat: Seat) -> InputError:
        return InputError(
            f"{seat.node} has memedit {seat.version}, this is {memedit.__version__}; "
            "install the same version on every machine"
        )

    def _give_up(self, slot: Slot, reason: str) -> None:
        ray.kill(slot.actor, no_restart=True)
        slot.begun, slot.gone, slot.left = None, reason, set()
        self._tell(f"{reason}; it is not started again")

    def need_workers(self) -> None:
        """Wait until some worker is ready.

        Raises:
            MemeditError: None is, and none will be.
        """
        self._bury_overdue()
        until = time.monotonic() + self.patience_s
        while not any(slot.ready for slot in self.slots):
            starting = [slot for slot in self.slots if slot.begun is not None]
            if not starting:
                reasons = "; ".join(dict.fromkeys(slot.gone for slot in self.slots))
                raise MemeditError(f"no worker is left: {reasons}; {AGAIN}")
            if time.monotonic() > until:
                raise MemeditError(
                    f"all workers have died, and no other was started and has loaded the model"
                    f" within {self.patience_s:g} s; {AGAIN}"
                )
            ray.wait([slot.begun for slot in starting], num_returns=1, timeout=LOOK_S)
            for slot in starting:
                self.welcome(slot)

    def name(self, slot: Slot) -> str:
        """A worker as a person knows it."""
        who = f"worker {slot.number + 1} of {self._placement.workers}"
        return f"{who} ({slot.seat})" if slot.seat else who

    def obituary(self, slot: Slot, error: Exception) -> str:
        """What has become of a worker."""
        who, text = self.name(slot), str(error)
        if not isinstance(error, RayError):
            return f"{who} failed: {last_line(text)}"
        if "ModuleNotFoundError" in text or "ImportError" in text:
            return f"{who} could not import memedit; install it on every machine: {last_line(text)}"
        if isinstance(error, FULL):
            return f"{who} has no room for its results: {NO_ROOM}"
        how = "was killed or crashed"
        if isinstance(error, OutOfMemoryError) or "low on memory" in text:
            how = "ran out of memory; ask for fewer workers"
        return f"{who} died: it {how}"

    def end(self) -> None:
        """End all actors; again does nothing."""
        slots, self.slots = self.slots, []
        for slot in slots:
            if slot.actor is not None and ray.is_initialized():
                ray.kill(slot.actor, no_restart=True)


def result_of(reference: Any) -> Any:
    """What a call gave, or the error that it raised as it was raised there.

    Raises:
        RayError: The worker has died.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else MemeditError(str(error))) from error
