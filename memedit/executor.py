"""The seam between the work and where it is done.

The stages (`memedit.stages`) hand units of work to an executor and take results as they come. The
in-process one here is the oracle that every other must equal. Knows no stage and no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from memedit.model import ModelSpec
from memedit.worker import Worker


class Executor(Protocol):
    """Calls methods of `Worker` on one or many workers."""

    n_workers: int

    def map(
        self, method: str, units: Sequence[tuple[Any, ...]], *, sticky: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Call `method(*unit)` for each unit on any worker; yields (index of the unit, item).

        Items of one unit come in their order, units in any. With `sticky`, the unit of an index
        goes to the same worker each time, which may therefore keep state for it.
        """

    def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """Call `method` once on every worker; gives each worker's single item."""

    def close(self) -> None:
        """Let go of the workers and their models."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class InlineExecutor(Executor):
    """One worker in this process."""

    n_workers = 1

    def __init__(self, spec: ModelSpec, *, threads: int | None = None) -> None:
        self._worker: Worker | None = Worker(spec, threads=threads)

    def map(
        self, method: str, units: Sequence[tuple[Any, ...]], *, sticky: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """See `Executor.map`; results come as they are made, unit by unit."""
        for index, unit in enumerate(units):
            for item in getattr(self._worker, method)(*unit):
                yield index, item

    def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """See `Executor.broadcast`."""
        (item,) = getattr(self._worker, method)(*arguments)
        return [item]

    def close(self) -> None:
        """Let go of the model."""
        self._worker = None
