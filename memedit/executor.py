"""The seam between the work and where it is done.

The stages (`memedit.stages`) hand units of work to an executor and take results as they come. The
in-process one here is the oracle that every other must equal. Knows no stage and no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from memedit.errors import NumericalError
from memedit.model import ModelSpec
from memedit.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Stands for the items that are missing of a unit that was given up."""

    reason: str


class Executor(Protocol):
    """Calls methods of `Worker` on one or many workers."""

    n_workers: int

    def map(
        self,
        method: str,
        units: Sequence[tuple[Any, ...]],
        *,
        sticky: bool = False,
        copies: bool = False,
        rest: Callable[[int], tuple[Any, ...] | None] | None = None,
        give_up: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """Call `method(*unit)` for each unit on any worker; yields (index of the unit, item).

        Items of one unit come in their order, units in any. A unit whose worker has died is done
        again, so that some of its items may come twice.

        Args:
            method: Of `memedit.worker.Worker`.
            units: The arguments of each call.
            sticky: The unit of an index goes to the same worker each time while that one lives,
                which may therefore keep state for it.
            copies: A unit that takes long may be done by two workers at the same time; its items
                may come twice, too.
            rest: Gives the arguments for what is still missing of a unit, or None if nothing is;
                asked before each attempt, instead of taking `units`.
            give_up: A unit that fails for good gives `Failed` and the others go on; otherwise the
                error is raised.
        """

    def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """Call `method` once on every worker; gives the single item of each that lives."""

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
        self,
        method: str,
        units: Sequence[tuple[Any, ...]],
        *,
        sticky: bool = False,
        copies: bool = False,
        rest: Callable[[int], tuple[Any, ...] | None] | None = None,
        give_up: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """See `Executor.map`; results come as they are made, unit by unit, and none twice."""
        for index, unit in enumerate(units):
            items = iter(getattr(self._worker, method)(*unit))
            while True:
                try:
                    item = next(items)
                except StopIteration:
                    break
                except NumericalError as error:
                    if not give_up:
                        raise
                    yield index, Failed(reason=str(error))
                    break
                yield index, item

    def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """See `Executor.broadcast`."""
        (item,) = getattr(self._worker, method)(*arguments)
        return [item]

    def close(self) -> None:
        """Let go of the model."""
        self._worker = None
