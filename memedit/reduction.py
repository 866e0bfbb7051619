"""Sums that lie in parts at several workers, put together a block of rows at a time.

A worker adds units of work to large matrices and keeps them; only rows ever travel, so that nobody
holds more than one matrix and some rows. Who dies takes its part along: what it had added is
missing then, is added again elsewhere, and every unit counts once. Knows matrices and numbers of
units; does not know what is summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memedit.executor import Executor
from memedit.patching import row_blocks
from memedit.tally import Held


def reduce_rows(
    executor: Executor,
    held: list[Held],
    kind: str,
    name: Any,
    shape: tuple[int, int],
    *,
    onto: Tensor | None = None,
) -> Tensor | None:
    """The sum of one matrix over all workers, float64 on the CPU.

    Added in the order of the workers, so that the bits are the same whenever the parts are.

    Args:
        executor: The workers.
        held: What they have said that they hold.
        kind: Which sums.
        name: Which matrix of them.
        shape: Its shape.
        onto: Added to, in place, instead of zeros.

    Returns:
        None if a worker has died since `held` was asked for.
    """
    total = torch.zeros(shape, dtype=torch.float64) if onto is None else onto
    states = [part.state for part in held]
    for start, stop in row_blocks(shape):
        parts = executor.broadcast("rows", kind, name, start, stop)
        if [state for state, _ in parts] != states:
            return None
        for _, rows in parts:
            if rows is not None:
                total[start:stop] += rows
    return total
