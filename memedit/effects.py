"""What traces of many facts say together: mean effects by layer and place, and layers to edit.

Positions are put into the classes of ROME's figure 1 (arXiv 2202.05262). Another draw of facts
would have given other means, so each has its bootstrap interval (`memedit.intervals`). Knows traces
as numbers; does not know models or plots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from memedit.intervals import middle, resampled_means
from memedit.tracing import KINDS, PARTS, FactTrace, TraceRequest

PositionClass: TypeAlias = Literal[
    "subject_first", "subject_middle", "subject_last", "next", "further", "last"
]
POSITION_CLASSES: tuple[PositionClass, ...] = get_args(PositionClass)
"""In the order of a prompt."""
CRITICAL: PositionClass = "subject_last"
"""Where the papers find the early site, and where MEMIT edits."""
_MOST_LAYERS = 5
"""As many as the published settings of most models edit."""
_VANISHED = 0.5
"""A gap below this share of the largest has vanished."""
_ROUNDING = 1e-6
"""Differences of probabilities that are no larger than this may be rounding alone."""


def class_of(position: int, request: TraceRequest) -> PositionClass | None:
    """The class of a position; None before the subject. Each position has one at most.

    A subject of one token is its own last one; the prompt's last token is that, even if it follows
    the subject directly.
    """
    if position < request.subject_first:
        return None
    if position == request.subject_last:
        return "subject_last"
    if position < request.subject_last:
        return "subject_first" if position == request.subject_first else "subject_middle"
    if position == len(request.ids) - 1:
        return "last"
    return "next" if position == request.subject_last + 1 else "further"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The mean indirect effect of a kind of state in a class of positions, layer by layer.

    `kind` is one of `memedit.tracing.KINDS`, or `mlp_severed` or `attention_severed`: hidden states
    with that part severed above. `low` and `high` bound the 95% interval. All in probability.
    """

    kind: str
    position: PositionClass
    facts: int
    """How many have such a position."""
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def effects_by_class(trace: FactTrace, request: TraceRequest) -> dict[tuple[str, str], Tensor]:
    """A fact's effects by (kind, class), [L] each: the mean over the positions of the class."""
    columns: dict[PositionClass, list[int]] = {}
    for position in range(len(request.ids)):
        found = class_of(position, request)
        if found is not None:
            columns.setdefault(found, []).append(position)
    values: dict[tuple[str, str], Tensor] = {
        (kind, name): trace.effects_LT[kind][:, positions].double().mean(1)
        for kind in KINDS
        for name, positions in columns.items()
    }
    for part in PARTS:
        values[f"{part}_severed", CRITICAL] = trace.severed_L[part].double()
    return values


def average(
    traces: Sequence[FactTrace], requests: Sequence[TraceRequest], *, seed: int = 0
) -> tuple[list[Curve], Tensor]:
    """The mean effects of some facts with 95% intervals, and the gap of each layer in each draw.

    The gap [resamples, L] is what the MLPs above a layer add to the effect of its hidden state at
    the subject's last token (MEMIT, section 4.1): the mean effect with them less that without.

    Args:
        traces: At least one.
        requests: What they are of, in the same order.
        seed: Of the draws.
    """
    found = [effects_by_class(t, r) for t, r in zip(traces, requests, strict=True)]
    names = [
        *((kind, position) for kind in KINDS for position in POSITION_CLASSES),
        *((f"{part}_severed", CRITICAL) for part in PARTS),
    ]
    names = [name for name in names if any(name in values for values in found)]
    layers = len(next(iter(found[0].values())))
    missing_L = torch.full((layers,), math.nan, dtype=torch.float64)
    values_FKL = torch.stack(
        [torch.stack([values.get(name, missing_L) for name in names]) for values in found]
    )
    drawn_RM = resampled_means(values_FKL.flatten(1), seed=seed)
    low_KL, high_KL = (bound_M.view(len(names), layers) for bound_M in middle(drawn_RM))
    mean_KL = values_FKL.nanmean(0)
    curves = [
        Curve(
            kind=kind,
            position=position,
            facts=sum((kind, position) in values for values in found),
            mean=tuple(mean_KL[k].tolist()),
            low=tuple(low_KL[k].tolist()),
            high=tuple(high_KL[k].tolist()),
        )
        for k, (kind, position) in enumerate(names)
    ]
    drawn_RKL = drawn_RM.view(-1, len(names), layers)
    whole, severed = names.index(("hidden", CRITICAL)), names.index(("mlp_severed", CRITICAL))
    return curves, drawn_RKL[:, whole] - drawn_RKL[:, severed]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The layers to edit, and what they follow from."""

    layers: tuple[int, ...]
    gap: tuple[float, ...]
    """Of each layer of the model, in probability."""
    last_low: int
    last_high: int
    """Between these lies the last of the layers for 95% of other draws of facts like these."""

    @property
    def flag(self) -> str:
        """What `--layers` takes."""
        first, last = self.layers[0], self.layers[-1]
        return str(first) if first == last else f"{first}-{last}"


def propose(curves: Sequence[Curve], gap_RL: Tensor) -> Proposal | None:
    """The layers to edit; None where the facts do not show that the MLPs add something.

    MEMIT edits the MLPs up to the layer where the gap vanishes, for the MLPs above it no longer
    matter to the fact there. Here: the first layer from which on the mean gap stays below half of
    the largest one, and the layers before it, five in all or a quarter of a small model's layers.
    The largest gap must be above zero at the lower end of its interval.
    """
    of: Mapping[str, Curve] = {c.kind: c for c in curves if c.position == CRITICAL}
    whole_L, severed_L = (
        torch.tensor(of[kind].mean, dtype=torch.float64) for kind in ("hidden", "mlp_severed")
    )
    gap_L = whole_L - severed_L
    last = _last_layer(gap_L)
    low_L, _ = middle(gap_RL)
    if last is None or float(low_L[gap_L.argmax()]) <= 0:
        return None
    count = max(1, min(_MOST_LAYERS, len(gap_L) // 4))
    first = max(0, last - count + 1)
    drawn = [found for row_L in gap_RL if (found := _last_layer(row_L)) is not None]
    low, high = middle(torch.tensor(drawn, dtype=torch.float64).unsqueeze(1))
    return Proposal(
        layers=tuple(range(first, last + 1)),
        gap=tuple(gap_L.tolist()),
        last_low=math.floor(float(low)),
        last_high=math.ceil(float(high)),
    )


def _last_layer(gap_L: Tensor) -> int | None:
    """The first layer from which on the gap stays below half of the largest; None without any."""
    largest = float(gap_L.max())
    if not largest > _ROUNDING:
        return None
    wide = int((gap_L >= _VANISHED * largest).nonzero().max())
    # What the MLPs above layer `wide` add is still much, so the next one is edited, too.
    return min(wide + 1, len(gap_L) - 1)
