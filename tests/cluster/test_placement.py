"""How many workers and threads fit: arithmetic over made-up clusters."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.placement import Machine, Placement, place
from memedit.errors import InputError

TWO_CORES = [Machine(cpus=2)]
UNEVEN = [Machine(cpus=3), Machine(cpus=3)]
GPU_NODES = [Machine(cpus=16, gpus=4), Machine(cpus=16, gpus=4), Machine(cpus=8)]


@pytest.mark.parametrize(
    ("machines", "asked", "workers", "threads"),
    [
        (TWO_CORES, {}, 2, 1),
        (TWO_CORES, {"workers": 1}, 1, 2),
        (TWO_CORES, {"threads": 2}, 1, 2),
        # Two threads each: three workers would fit by the sum, two fit on the machines.
        (UNEVEN, {"workers": 3}, 3, 1),
        (UNEVEN, {"workers": 2}, 2, 3),
        (UNEVEN, {"threads": 2}, 2, 2),
        (GPU_NODES, {"gpus_per_worker": 1}, 8, 4),
        (GPU_NODES, {"gpus_per_worker": 2}, 4, 8),
        (GPU_NODES, {"gpus_per_worker": 3}, 2, 16),
        (GPU_NODES, {"gpus_per_worker": 0.5}, 16, 2),
        (GPU_NODES, {"gpus_per_worker": 0.1, "workers": 30}, 30, 1),
        (GPU_NODES, {"gpus_per_worker": 1, "workers": 3}, 3, 8),
        # More GPUs than CPUs: every worker needs one of each.
        ([Machine(cpus=2, gpus=4)], {"gpus_per_worker": 1}, 2, 1),
        # Memory limits the choice, never below one, and not what was asked for.
        ([Machine(cpus=8, memory_bytes=7e9)], {"memory_per_worker_bytes": 2e9}, 3, 2),
        ([Machine(cpus=8, memory_bytes=1e9)], {"memory_per_worker_bytes": 2e9}, 1, 8),
        ([Machine(cpus=8, memory_bytes=1e9)], {"memory_per_worker_bytes": 2e9, "workers": 4}, 4, 2),
    ],
)
def test_what_fits(
    machines: list[Machine], asked: dict[str, Any], workers: int, threads: int
) -> None:
    expected = Placement(workers=workers, threads=threads, gpus=asked.get("gpus_per_worker", 0.0))
    assert place(machines, **asked) == expected


@pytest.mark.parametrize(
    ("machines", "asked", "field", "words"),
    [
        (TWO_CORES, {"workers": 3}, "workers", ["3 CPUs in all", "has 2;"]),
        (TWO_CORES, {"workers": 2, "threads": 2}, "workers", ["4 CPUs in all", "has 2;"]),
        (TWO_CORES, {"gpus_per_worker": 1}, "gpus_per_worker", ["1 GPU each", "has 0;"]),
        (
            GPU_NODES,
            {"gpus_per_worker": 1, "workers": 9},
            "gpus_per_worker",
            ["9 GPUs in all", "has 8 (4 + 4 + 0)"],
        ),
        # Enough in all, but on no machine.
        (GPU_NODES, {"gpus_per_worker": 8}, "gpus_per_worker", ["8 GPUs each", "(4 + 4 + 0)"]),
        (GPU_NODES, {"gpus_per_worker": 1, "workers": 8, "threads": 8}, "workers", ["64 CPUs"]),
        (TWO_CORES, {"gpus_per_worker": 1.5}, "gpus_per_worker", ["1.5", "whole number"]),
        (TWO_CORES, {"gpus_per_worker": -1}, "gpus_per_worker", ["-1"]),
        (TWO_CORES, {"workers": 0}, "workers", ["0; give 1 or more"]),
        ([], {}, "workers", ["has 0"]),
    ],
)
def test_what_does_not_fit_is_said_with_both_numbers(
    machines: list[Machine], asked: dict[str, Any], field: str, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        place(machines, **asked)
    assert caught.value.field == field
    for word in words:
        assert word in str(caught.value)
