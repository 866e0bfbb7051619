"""Patches of whole tensors, for tests: `memedit.patching` hands them over block by block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from memedit.patching import Patch


def each_row(change: Callable[[Tensor], Tensor]) -> Patch:
    """The same change of every row."""
    return lambda rows, start: change(rows)
