"""How fast this machine multiplies matrices; knows nothing of models."""

from __future__ import annotations

import time

import torch

from memedit.errors import InputError

_LARGEST = 8192


def measured_rate(device: str, dtype: torch.dtype, *, seconds: float) -> float:
    """Operations a second of the best matrix product within some seconds on a device.

    Raises:
        InputError: There is no such device here.
    """
    # Half precision can be hundreds of times slower on a CPU that does not know it.
    size = 1024 if dtype.itemsize >= 4 else 256
    best, end = 0.0, time.perf_counter() + seconds
    try:
        square = torch.ones(size, size, dtype=dtype, device=device)
        while best == 0 or time.perf_counter() < end:
            start = time.perf_counter()
            (square @ square)[0, 0].item()  # waits for the device
            taken_s = time.perf_counter() - start
            best = max(best, 2 * size**3 / taken_s)
            # Larger products come nearer to the limit, on a busy machine above all.
            if taken_s < seconds / 4 and size < _LARGEST:
                size *= 2
                square = torch.ones(size, size, dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"cannot compute on {device}: {first}", field="device") from error
    return best
