"""Work that somebody else waits for: writes to a disk, beside the thread that keeps workers busy.

Knows threads; does not know what is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

_THREADS = 4
_MOST_WAITING = 1000
"""Results that are still in memory; beyond it, whoever makes them waits."""


class Background:
    """Does calls in threads; leaving the block waits until all are done.

    The first error of a call is raised by the next `do`, or at the end of the block.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="background")
        self._waiting: deque[Future[Any]] = deque()

    def do(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Do this some time soon."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= _MOST_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._threads.submit(call, *arguments))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True)
        if error is None:
            for future in self._waiting:
                future.result()
