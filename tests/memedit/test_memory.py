"""Memory that is handed back: all that is free, and nothing that is in use."""

from __future__ import annotations

import gc
import platform
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from memedit import memory
from memedit.memory import release_memory, trim_memory

BOTH = pytest.mark.parametrize("hand_back", [trim_memory, release_memory])
TENSORS = 2048
FLOATS = 16_384
"""64 KiB: on the heap, as nothing below the least threshold for mmap (128 KiB) is mapped."""
SIZE_BYTES = TENSORS * FLOATS * 4


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def resident_bytes() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@BOTH
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc keeps freed memory")
def test_freed_memory_goes_back(hand_back: Callable[[], None]) -> None:
    hand_back()
    before = resident_bytes()
    tensors = [torch.full((FLOATS,), float(i)) for i in range(TENSORS)]
    kept = tensors[31::32]  # the last one too: what lies below it does not go by itself
    assert resident_bytes() - before > 0.9 * SIZE_BYTES
    del tensors
    if resident_bytes() - before < 0.5 * SIZE_BYTES:
        pytest.skip("this allocator hands freed memory back by itself")
    hand_back()
    left = resident_bytes() - before
    assert left < 0.2 * SIZE_BYTES
    for i, tensor in enumerate(kept):  # and what is in use stays as it was
        assert bool((tensor == 32 * i + 31).all())


@pytest.mark.usefixtures("no_collector")
def test_only_a_release_collects() -> None:
    gone = weakref.ref(Cycle())
    trim_memory()
    assert gone() is not None
    release_memory()
    assert gone() is None


@BOTH
def test_a_c_library_without_malloc_trim_is_fine(
    hand_back: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    hand_back()


@pytest.mark.parametrize("in_use", [False, True])
def test_a_gpu_is_emptied_where_it_is_in_use(in_use: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not, it must not be started for that."""
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    release_memory()
    assert emptied == [True] * in_use
