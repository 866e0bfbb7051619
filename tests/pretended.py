"""Several devices on a machine that has one: each tensor is told where it would be.

The devices are called `cpu:0` and `cpu:1`, which torch takes for the CPU, so all numbers are real;
`cpu` is the host. An operation between two of them fails, as it does between GPUs. Knows torch;
knows nothing of memedit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

HOST = torch.device("cpu")
_MOVES = (Tensor.to, Tensor.cpu)
_ANY_SOURCE = (Tensor.copy_,)


class MixedDevices(RuntimeError):
    """An operation on tensors of two devices."""


def put(tensors: Iterable[Tensor], place: str | torch.device) -> None:
    """Pretend that tensors are on a device."""
    for tensor in tensors:
        tensor._place = torch.device(place)  # type: ignore[attr-defined]


def place_of(tensor: Tensor) -> torch.device:
    """Where a tensor pretends to be."""
    place: torch.device = getattr(tensor, "_place", HOST)
    return place


class PretendedDevices(TorchFunctionMode):
    """Follows where each tensor would be, and raises `MixedDevices` where two of them meet."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and say where its results are."""
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is Tensor.device:
            return place_of(args[0])
        given = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        named = [HOST] if func is Tensor.cpu else _named(func, args, kwargs)
        place = named[0] if named else _meeting(func, args, tensors)
        result = func(*args, **kwargs)
        if func in _MOVES and any(result is tensor for tensor in tensors):
            if place_of(result) == place:
                return result
            result = result.view_as(result)  # a move to another device makes another tensor
        put((leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)), place)
        return result


def _named(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.device]:
    """The device that an operation is told to put its result on, if it is told."""
    if kwargs.get("device") is not None:
        return [torch.device(kwargs["device"])]
    if func is not Tensor.to:
        return []
    for arg in args[1:]:
        if isinstance(arg, Tensor):
            return [place_of(arg)]
        if isinstance(arg, str | torch.device):
            return [torch.device(arg)]
    return []


def _meeting(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> torch.device:
    """The device of all operands; as in torch, a single number or an index may be the host's."""
    places = {place_of(tensor) for tensor in tensors}
    if len(places) < 2:
        return places.pop() if places else HOST
    first = place_of(tensors[0])
    if func in _ANY_SOURCE:
        return first
    indexing = func in (Tensor.__getitem__, Tensor.__setitem__)
    indices = pytree.tree_leaves(args[1]) if indexing else []
    rest = {
        place_of(tensor)
        for tensor in tensors
        if not (
            place_of(tensor) == HOST
            and (tensor.ndim == 0 or any(tensor is index for index in indices))
        )
    }
    if len(rest) > 1:
        name = getattr(func, "__name__", func)
        raise MixedDevices(f"{name} between {' and '.join(sorted(map(str, rest)))}")
    return rest.pop() if rest else first
