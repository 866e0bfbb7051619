"""One worker's part of sums over units of work. Knows matrices and numbers, not what is summed."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(kw_only=True)
class Tally:
    """One worker's part of some sums."""

    units: list[int] = field(default_factory=list)
    """What has been added to it."""
    matrices: dict[Any, Tensor] = field(default_factory=dict)
    state: str = field(default_factory=lambda: secrets.token_hex(8))
    """Its own name; that of a new worker, or of one that began anew, is another."""

    facts: dict[Any, Any] = field(default_factory=dict)
    """What is small, and told without being asked for."""

    def add_product(self, name: Any, left_NA: Tensor, right_NB: Tensor) -> None:
        """Add leftᵀ · right [A, B] to a matrix, in place and in the inputs' dtype."""
        if name in self.matrices:
            self.matrices[name].addmm_(left_NA.T, right_NB)
        else:
            self.matrices[name] = left_NA.T @ right_NB


@dataclass(frozen=True, kw_only=True)
class Held:
    """What is known of a worker's part without its matrices."""

    state: str
    units: tuple[int, ...]
    facts: Mapping[Any, Any]


def held_units(held: Iterable[Held]) -> set[int]:
    """All units that some worker has added.

    Raises:
        RuntimeError: One was added twice, which would be a mistake in this program.
    """
    units = [unit for part in held for unit in part.units]
    if len(units) != len(set(units)):
        raise RuntimeError("a unit of work was added twice")
    return set(units)
