"""Giving memory back to the system, so that the peaks of stages do not add up.

torch frees its tensors at once, but the C library keeps what lies below anything still in use: in
a long run that becomes half as much again as the tensors themselves. Knows no stage.
"""

from __future__ import annotations

import ctypes
import gc
from functools import cache

import torch


def trim_memory() -> None:
    """Hand freed pages of the process's heap back; takes milliseconds, so after each unit."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def release_memory() -> None:
    """Collect what nobody holds any more, such as a whole model, and hand all of it back.

    Takes a fifth of a second, because every Python object is looked at.
    """
    gc.collect()
    trim_memory()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a GPU has no room, in whichever library's words."""
    told = str(error)
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in told for word in words)


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    """The malloc_trim of glibc; other C libraries have none and need none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
