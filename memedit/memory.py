"""Giving memory back to the system between stages, so that their peaks do not add up.

torch frees its tensors at once, but the C library keeps what lies below anything still in use: in
a long run that becomes half as much again as the tensors themselves. Knows no stage.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
from functools import cache

import torch


def release_memory() -> None:
    """Collect what nobody holds and hand freed pages back; takes milliseconds."""
    gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    """The malloc_trim of glibc; other C libraries have none and need none."""
    name = ctypes.util.find_library("c")
    return getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
