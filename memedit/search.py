"""Which settings to try next: a pattern search in which what is expensive moves least.

A z vector depends on the last edited layer and on how it is optimised, and takes longer than all
the rest of an edit. The search therefore goes in rounds (coordinate-wise pattern search, after
Hooke and Jeeves 1961):

1. λ, the number of layers below the last, and the weight of the protected keys: the z vectors of
   the best settings so far are used again;
2. the place of the layers, the learning rate, the steps and the clamp, each of which asks for other
   z vectors, so each is tried from the best of 1 only;
3. the next round begins with λ again, in smaller steps, since the best λ depends on z.

Along one setting the search goes on in a direction for as long as that helps; where the first step
does not help, it tries the other direction. Nothing is random. Knows settings and ranks; does not
know models or facts, nor what a rank is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memedit.config import EditSettings, MethodName

Rank = tuple[float, ...]
"""How good settings are; the larger, the better."""
Move = Callable[[EditSettings], EditSettings | None]
"""One step along a setting; None at its end."""

_FACTORS = (4.0, 2.0, 2**0.5)
"""By how much λ and the weight of protected keys are moved, round by round."""
_FEWER = (2, 1, 1)
"""By how many layers."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Where to search."""

    names: tuple[str, ...]
    """The settings that may move, of `searchable`."""
    layers: frozenset[int]
    """The layers that may be edited."""
    blocks: int
    """Of the model."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Settings to try."""

    settings: EditSettings
    moved: str
    """What differs from the best before; empty for those that the search begins with."""


def searchable(method: MethodName) -> tuple[str, ...]:
    """The settings of a method that can be searched, in the order in which they are."""
    names = dict.fromkeys(name for name, _ in _AXES)
    if method == "emmet":
        del names["lam"]
    if method != "memedit":
        del names["weight"]
    return tuple(names)


def values_of(settings: EditSettings) -> dict[str, Any]:
    """What is searched of these settings, by name."""
    found = {
        "layers": list(settings.layers),
        "lam": settings.solve.lam,
        "weight": settings.protect.weight,
        "lr": settings.targets.lr,
        "steps": settings.targets.steps,
        "clamp": settings.targets.clamp_norm_factor,
    }
    known = searchable(settings.method)
    return {name: value for name, value in found.items() if name in known}


def search(start: EditSettings, space: Space) -> Generator[Proposal, Rank | None, None]:
    """What to try, one after the other; to be sent the rank of each, None where it failed.

    No settings come twice. It ends after as many rounds as there are sizes of steps; whoever has
    enough stops asking.

    Args:
        start: The settings to begin with, which are tried first.
        space: Where to search.
    """
    ranks: dict[EditSettings, Rank | None] = {}
    ranks[start] = yield Proposal(settings=start, moved="")
    best = start
    for size in range(len(_FACTORS)):
        for name, moves in _AXES:
            if name not in space.names:
                continue
            for move in moves(space, size):
                before = best
                while (there := move(best)) is not None and there not in ranks:
                    ranks[there] = yield Proposal(settings=there, moved=name)
                    if not _better(ranks[there], ranks[best]):
                        break
                    best = there
                if best != before:
                    break


def _better(rank: Rank | None, than: Rank | None) -> bool:
    return rank is not None and (than is None or rank > than)


# What a step is ----------------------------------------------------------------------------------


def _scaled(
    section: str, field: str, *, power: float, whole: bool = False
) -> Callable[[Space, int], Sequence[Move]]:
    """A number is multiplied or divided by a power of the round's factor."""

    def moves(space: Space, size: int) -> Sequence[Move]:
        factor = _FACTORS[size] ** power

        def times(by: float) -> Move:
            def move(settings: EditSettings) -> EditSettings | None:
                old = getattr(settings, section)
                value = getattr(old, field)
                if value is None:
                    return None
                new = max(2, round(value * by)) if whole else _short(value * by)
                return replace(settings, **{section: replace(old, **{field: new})})

            return move

        return (times(factor), times(1 / factor))

    return moves


def _short(value: float) -> float:
    """Three digits: nobody can tell more of them apart."""
    return float(f"{value:.3g}")


def _number_of_layers(space: Space, size: int) -> Sequence[Move]:
    """Fewer or more layers below the last, which stays, so that z does, too."""

    def fewer(settings: EditSettings) -> EditSettings | None:
        layers = settings.layers
        if len(layers) == 1:
            return None
        return replace(settings, layers=layers[min(_FEWER[size], len(layers) - 1) :])

    def more(settings: EditSettings) -> EditSettings | None:
        first = settings.layers[0]
        below = tuple(i for i in range(first - _FEWER[size], first) if i in space.layers)
        return replace(settings, layers=(*below, *settings.layers)) if below else None

    return (fewer, more)


def _place_of_layers(space: Space, size: int) -> Sequence[Move]:
    """All layers lower or higher, by a tenth of the depth at first."""
    step = max(1, round(space.blocks / 10 / 2**size))

    def by(shift: int) -> Move:
        def move(settings: EditSettings) -> EditSettings | None:
            layers = tuple(layer + shift for layer in settings.layers)
            return replace(settings, layers=layers) if space.layers.issuperset(layers) else None

        return move

    return (by(-step), by(step))


_AXES: tuple[tuple[str, Callable[[Space, int], Sequence[Move]]], ...] = (
    ("lam", _scaled("solve", "lam", power=1)),
    ("layers", _number_of_layers),
    ("weight", _scaled("protect", "weight", power=1)),
    ("layers", _place_of_layers),
    ("lr", _scaled("targets", "lr", power=0.5)),
    ("steps", _scaled("targets", "steps", power=0.5, whole=True)),
    ("clamp", _scaled("targets", "clamp_norm_factor", power=0.5)),
)
"""The settings in the order in which a round moves them; from the second `layers` on, z moves."""
