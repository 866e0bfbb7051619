"""The executor on Ray: one actor per worker, each holding a `memedit.worker.Worker`.

The only module that imports Ray. Knows how to reach or start a cluster, how units travel and what
a death looks like; does not know what the units are.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

import memedit
from cluster.placement import Machine, Placement, place
from memedit.errors import InputError, MemeditError
from memedit.executor import Executor
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from memedit.worker import Worker

_REACH_TIMEOUT_S = 8.0
_OBJECT_STORE_BYTES = 1 << 30
_AGAIN = "run the same command again: finished z vectors are kept"


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a worker runs."""

    node: str
    pid: int
    version: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.node}"


class _Actor:
    """A `Worker` in a Ray process of its own."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._worker: Worker | None = None

    def seat(self) -> Seat:
        return Seat(node=self._node, pid=os.getpid(), version=memedit.__version__)

    def open(self, spec: ModelSpec) -> None:
        self._worker = Worker(self._here(spec), threads=self._placement.threads)

    def stream(self, method: str, *arguments: Any) -> Iterator[Any]:
        given = (self._here(a) if isinstance(a, ModelSpec) else a for a in arguments)
        # Not `yield from`: Ray resumes with a value, which a plain iterator behind it cannot take.
        for item in getattr(self._worker, method)(*given):  # noqa: UP028
            yield item

    def collect(self, method: str, *arguments: Any) -> list[Any]:
        return list(self.stream(method, *arguments))

    def _here(self, spec: ModelSpec) -> ModelSpec:
        """The same model for this process, which sees other GPUs and perhaps other folders."""
        if spec.files.here is not None and not spec.files.here.is_dir():
            raise InputError(
                f"the worker on {self._node} sees no such folder; put it where every machine of "
                "the cluster finds it under the same path, or into object storage",
                source=spec.files.here,
            )
        if spec.device == "cpu":
            return spec
        if not torch.cuda.is_available():
            raise InputError(
                f"torch {torch.__version__} on {self._node} sees no GPU there, though the cluster "
                "lends one; install a CUDA build of torch on it, or use the device cpu",
                field="device",
            )
        # Ray shows a process only the GPUs it was given.
        return replace(spec, device="cuda")


class RayExecutor(Executor):
    """Workers as Ray actors; see `memedit.executor.Executor`.

    Args:
        spec: The model that each worker loads, from a folder that all of them see. The device
            "cpu" stays; any other is the GPU that Ray gives to the worker.
        address: `auto`, HOST:PORT or ray://HOST:PORT; None starts a local Ray, which is shut down
            by `close`. A Ray that this process is connected to already is used as it is.
        workers: How many; None for as many as the cluster holds.
        gpus_per_worker: GPUs of each worker.
        threads: CPUs and threads of each worker; None for an equal share.
        start_timeout_s: How long to wait for the cluster to start the actors.

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
    ) -> None:
        if spec.device != "cpu" and not gpus_per_worker:
            raise InputError(
                f"the device {spec.device} needs GPUs: say how many each worker gets, or use cpu",
                field="gpus_per_worker",
            )
        if spec.files.here is not None:
            spec = replace(spec, files=LocalFiles(spec.files.here.absolute()))
        self.seats: tuple[Seat, ...] = ()
        self._actors: list[Any] = []
        self._connected = False
        try:
            self._connected = _connect(address)
            placement = place(
                _machines(ours=self._connected and address is None),
                workers=workers,
                gpus_per_worker=gpus_per_worker,
                threads=threads,
                memory_per_worker_bytes=_memory_bytes(spec),
            )
            self.n_workers = placement.workers
            self._start(placement, start_timeout_s)
            self._gather([actor.open.remote(spec) for actor in self._actors])
        except BaseException:
            self.close()
            raise

    def _start(self, placement: Placement, timeout_s: float) -> None:
        # Before torch is imported, so that no library makes a larger pool.
        pools = {"OMP_NUM_THREADS": str(placement.threads), "TOKENIZERS_PARALLELISM": "false"}
        make = ray.remote(_Actor).options(
            num_cpus=placement.threads,
            num_gpus=placement.gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": pools},
        )
        self._actors = [make.remote(placement) for _ in range(placement.workers)]
        calls = [actor.seat.remote() for actor in self._actors]
        _, waiting = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        if waiting:
            free = ray.available_resources()  # type: ignore[no-untyped-call]
            raise MemeditError(
                f"{len(waiting)} of {len(calls)} workers did not start within {timeout_s:g} s; "
                f"each needs {placement.threads} CPUs and {placement.gpus:g} GPUs, and "
                f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free; "
                "ask for fewer workers, or wait until others have finished"
            )
        self.seats = tuple(self._gather(calls))
        for seat in self.seats:
            if seat.version != memedit.__version__:
                raise InputError(
                    f"{seat.node} has memedit {seat.version}, this is {memedit.__version__}; "
                    "install the same version on every machine"
                )

    def map(
        self, method: str, units: Sequence[tuple[Any, ...]], *, sticky: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """See `Executor.map`; items come as they are made (through ray://, unit by unit)."""
        shared = deque(range(len(units)))
        queues = [
            deque(range(worker, len(units), self.n_workers)) if sticky else shared
            for worker in range(self.n_workers)
        ]
        load = [0] * self.n_workers
        pending: dict[Any, tuple[int, int]] = {}

        def submit(worker: int) -> None:
            # A second unit waits at a worker so that it need not wait for the driver, but the last
            # ones go to whoever is free.
            queue = queues[worker]
            while queue and load[worker] < (2 if sticky or len(queue) > self.n_workers else 1):
                unit = queue.popleft()
                pending[self._call(worker, method, units[unit])] = (unit, worker)
                load[worker] += 1

        for worker in range(self.n_workers):
            submit(worker)
        while pending:
            (call,), _ = ray.wait(list(pending), num_returns=1)
            unit, worker = pending[call]
            items, more = self._ready(call, worker)
            if not more:
                del pending[call]
                load[worker] -= 1
                submit(worker)
            yield from ((unit, item) for item in items)

    def _call(self, worker: int, method: str, unit: tuple[Any, ...]) -> Any:
        actor = self._actors[worker]
        if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
            return actor.collect.remote(method, *unit)  # Ray Client knows no streams
        return actor.stream.options(num_returns="streaming").remote(method, *unit)

    def _ready(self, call: Any, worker: int) -> tuple[list[Any], bool]:
        """The items of a call that are there, and whether more may follow."""
        if not isinstance(call, ray.ObjectRefGenerator):
            return self._result(call, worker), False
        reference = next(call, None)
        return ([], False) if reference is None else ([self._result(reference, worker)], True)

    def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """See `Executor.broadcast`; arguments are put into the object store once."""
        stored = [ray.put(argument) for argument in arguments]
        calls = [actor.collect.remote(method, *stored) for actor in self._actors]
        return [item for (item,) in self._gather(calls)]

    def _gather(self, calls: Sequence[Any]) -> list[Any]:
        """One result from each worker, once all have finished."""
        ray.wait(list(calls), num_returns=len(calls))
        return [self._result(call, worker) for worker, call in enumerate(calls)]

    def _result(self, reference: Any, worker: int) -> Any:
        """What a call gave, or the error that it raised as it was raised there."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else MemeditError(str(error))) from error
        except RayError as error:
            raise MemeditError(self._obituary(worker, error)) from error

    def _obituary(self, worker: int, error: RayError) -> str:
        who = f"worker {worker + 1} of {self.n_workers}"
        text = str(error)
        if "ModuleNotFoundError" in text or "ImportError" in text:
            return f"{who} could not import memedit; install it on every machine: {_last(text)}"
        if self.seats:
            who += f" ({self.seats[worker]})"
        how = "was killed or crashed"
        if isinstance(error, OutOfMemoryError) or "OOM" in text or "low on memory" in text:
            how = "ran out of memory; ask for fewer workers"
        return f"{who} died: it {how}; {_AGAIN}"

    def close(self) -> None:
        """End the actors, and the local Ray if one was started; again does nothing."""
        actors, self._actors = self._actors, []
        connected, self._connected = self._connected, False
        if ray.is_initialized():
            for actor in actors:
                ray.kill(actor, no_restart=True)
            if connected:
                ray.shutdown()


def _connect(address: str | None) -> bool:
    """Start or reach a cluster unless this process has one; whether there is one to let go of."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _sigterm_kept():
        if address is None:
            try:
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
            except Exception as error:  # Ray raises a bare Exception when it takes too long
                raise MemeditError(
                    f"no local Ray could be started ({_last(str(error))}); run the command again "
                    "when the machine is less busy, or use the inline executor"
                ) from error
            return True
        _reach(address)
        try:
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise _unreachable(address, _last(str(error))) from error
    return True


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM in place of that which the program has set."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _reach(address: str) -> None:
    """Check in seconds that something answers as Ray does; Ray itself tries for minutes."""
    if address == "auto":
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise InputError(
            f"{address!r} is no address of Ray; write auto, HOST:PORT or ray://HOST:PORT",
            field="address",
        )
    try:
        socket.create_connection((host, port), timeout=_REACH_TIMEOUT_S).close()
    except OSError as error:
        raise _unreachable(address, str(error)) from error
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    import grpc  # type: ignore[import-untyped]

    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"{host}:{port}", options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_REACH_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            raise _unreachable(address, "what answers there is not Ray") from error


def _unreachable(address: str, why: str) -> InputError:
    return InputError(
        f"no Ray cluster was reached at {address} ({why}); check that it runs, that this port is "
        "open, and that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH holds its token; without an address "
        "a local Ray is started",
        field="address",
    )


def _machines(*, ours: bool) -> list[Machine]:
    """What the living machines of the cluster hold in all."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    held = [node["Resources"] for node in nodes if node["Alive"]]
    # A Ray of ours counts the machine's CPUs; a batch scheduler may have given us fewer.
    most = len(os.sched_getaffinity(0)) if ours else float("inf")
    return [
        Machine(
            cpus=min(resources.get("CPU", 0.0), most),
            gpus=resources.get("GPU", 0.0),
            memory_bytes=resources.get("memory", float("inf")),
        )
        for resources in held
    ]


def _memory_bytes(spec: ModelSpec) -> float:
    """Roughly what a worker takes: weights may double in another dtype, and work needs room."""
    sizes = spec.files.sizes()
    return 2.0 * sum(size for name, size in sizes.items() if name.endswith(".safetensors"))


def _last(text: str) -> str:
    """The last line of an error, which says what is wrong."""
    return text.strip().splitlines()[-1].strip() if text.strip() else "no reason given"
