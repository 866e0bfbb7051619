"""How many workers fit into a cluster, and how many threads each of them may use.

Pure arithmetic over what the machines hold. Knows no Ray and no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memedit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one machine of the cluster lends."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Placement:
    """So many workers, each with so many threads (CPUs) and GPUs."""

    workers: int
    threads: int
    gpus: float


def place(
    machines: Sequence[Machine],
    *,
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    threads: int | None = None,
    memory_per_worker_bytes: float = 0.0,
) -> Placement:
    """Choose what is not given: as many workers as fit, then as many threads for each as fit.

    A worker never spans machines. With GPUs their number decides how many workers fit, without
    them the CPUs do; memory limits the choice, but not a number that was asked for.

    Args:
        machines: What the cluster holds.
        workers: How many workers; None for as many as fit.
        gpus_per_worker: GPUs for each: 0, a part of one, or a whole number.
        threads: CPUs for each; None for an equal share.
        memory_per_worker_bytes: What a worker is expected to take.

    Raises:
        InputError: The cluster holds less than was asked for.
    """
    gpus = gpus_per_worker
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise InputError(
            f"{gpus:g} GPUs for each worker; give 0, a part of one, or a whole number",
            field="gpus_per_worker",
        )
    for name, number in (("workers", workers), ("threads", threads)):
        if number is not None and number < 1:
            raise InputError(f"{number}; give 1 or more", field=name)
    least = threads or 1
    if workers is None:
        workers = sum(_slots(m, least, gpus, memory_per_worker_bytes) for m in machines)
        workers = workers or min(1, _fitting(machines, least, gpus))
    wanted = max(1, workers)
    if _fitting(machines, least, gpus) < wanted:
        raise _too_small(machines, wanted, least, gpus)
    if threads is None:
        most = int(max(machine.cpus for machine in machines))
        threads = next(t for t in range(most, 0, -1) if _fitting(machines, t, gpus) >= wanted)
    return Placement(workers=wanted, threads=threads, gpus=gpus)


def _fitting(machines: Sequence[Machine], threads: int, gpus: float) -> int:
    return sum(_slots(machine, threads, gpus, 0.0) for machine in machines)


def _slots(machine: Machine, threads: int, gpus: float, memory_bytes: float) -> int:
    """How many workers fit on one machine."""
    slots = int(machine.cpus) // threads
    if gpus:
        slots = min(slots, _gpu_slots(machine, gpus))
    if memory_bytes and math.isfinite(machine.memory_bytes):
        slots = min(slots, int(machine.memory_bytes // memory_bytes))
    return slots


def _gpu_slots(machine: Machine, gpus: float) -> int:
    """How many shares of GPUs a machine has; a part of a GPU lies on one GPU."""
    if gpus < 1:
        return int(machine.gpus) * int(1 / gpus + 1e-9)  # 1 / 0.1 may come out below 10
    return int(machine.gpus // gpus)


def _too_small(machines: Sequence[Machine], workers: int, threads: int, gpus: float) -> InputError:
    """Say what is short: the GPUs, or else the CPUs."""
    if gpus and sum(_gpu_slots(machine, gpus) for machine in machines) < workers:
        name, each, held = "GPU", gpus, [machine.gpus for machine in machines]
    else:
        name, each, held = "CPU", float(threads), [machine.cpus for machine in machines]
    wanted = f"{workers} worker{'s' * (workers > 1)} with {each:g} {name}{'s' * (each != 1)} each"
    spread = f" ({' + '.join(f'{h:g}' for h in held)})" if len(held) > 1 else ""
    return InputError(
        f"{wanted} were asked for, {workers * each:g} {name}s in all, and the cluster has "
        f"{sum(held):g}{spread}; ask for fewer, or add machines",
        field="gpus_per_worker" if name == "GPU" else "workers",
    )
