"""The drawings of the history page: facts and metrics over the versions, as `<svg>` elements.

Knows numbers, times and the metrics' names; does not know the page or what a version is. A drawing
has words of this module and numbers only, so that no text of a source or a person gets into one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from workflows.metrics import METRIC
from workflows.plots import ACCENT, INK, MUTED, SERIES, WARM, themed_svg

_COLUMNS_UP_TO = 40
"""From more versions than this, columns touch and lines have no dots."""
_LINE_STYLES: dict[str, dict[str, Any]] = {
    "score": {"color": INK, "lw": 2.4, "marker": "o"},
    "efficacy": {"color": ACCENT, "lw": 1.6, "marker": "s"},
    "paraphrase": {"color": SERIES[2], "lw": 1.6, "marker": "^", "ls": (0, (5, 1.5))},
    "neighbourhood": {"color": WARM, "lw": 1.6, "marker": "D", "ls": (0, (2, 1.2))},
    "perplexity": {"color": ACCENT, "lw": 2.0, "marker": "o"},
}


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The versions along the horizontal axis, the oldest first."""

    times: Sequence[str]
    """When each was made, as ISO 8601; anything else is shown as the version's number."""
    current: int | None
    """The place of the current one."""


@dataclass(frozen=True)
class Band:
    """What one colour of the facts' drawing stands for."""

    source: str | None
    """None: whatever has no colour of its own."""
    label: str
    """For the page's legend; it is not in the drawing."""
    counts: tuple[int, ...]
    """Facts by version, the oldest first."""


def facts_plot(line: Timeline, bands: Sequence[Band], facts: Sequence[int]) -> str:
    """Facts in each version, one colour a band; `facts` are those of all bands."""
    if not bands:
        return ""
    n = len(line.times)

    def draw(axes: Axes) -> None:
        below = [0] * n
        for place, band in enumerate(bands):
            colour = MUTED if band.source is None else SERIES[place]
            above = [b + c for b, c in zip(below, band.counts, strict=True)]
            if n <= _COLUMNS_UP_TO:
                axes.bar(range(n), band.counts, 0.74, bottom=below, color=colour)
            else:
                edges = [i - 0.5 for i in range(n + 1)]
                axes.stairs(above, edges, baseline=below, fill=True, color=colour, lw=0)
            below = above
        axes.set_ylim(0, 1.12 * max(below))
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.grid(axis="y")
        _finish(axes, line)

    what = f"Facts per version by source, {_from_to(f'{facts[0]:,}', f'{facts[-1]:,}')}"
    return _drawing("facts", draw, what)


def metrics_plot(name: str, line: Timeline, measures: Mapping[str, Sequence[float | None]]) -> str:
    """Metrics of one unit by version; where one was not measured there is a gap."""
    lines = {k: [_number(v) for v in values] for k, values in measures.items()}
    lines = {k: values for k, values in lines.items() if any(map(math.isfinite, values))}
    if not lines:
        return ""
    found = [v for values in lines.values() for v in values if math.isfinite(v)]
    percent = METRIC[next(iter(lines))].percent
    low, high = _limits(min(found), max(found), percent=percent)
    last = {k: _ends(values)[1] for k, values in lines.items()}

    def draw(axes: Axes) -> None:
        for key, values in lines.items():
            style = dict(_LINE_STYLES[key])
            if len(values) > _COLUMNS_UP_TO:
                style["lw"] *= 0.55
            dots = [i for i in range(len(values)) if _alone(values, i)]
            every = range(len(values)) if len(values) <= _COLUMNS_UP_TO else dots
            axes.plot(
                range(len(values)),
                values,
                markevery=list(every),
                ms=4.2,
                **style,
                zorder=4 if key == "score" else 3,
            )
        for key, height in _apart(last, gap=0.085 * (high - low)).items():
            text = METRIC[key].show(last[key]) + ("" if not percent else f" {METRIC[key].label}")
            axes.annotate(
                text,
                (len(line.times) - 0.5, height),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=_LINE_STYLES[key]["color"],
                fontsize=11,
                annotation_clip=False,
            )
        axes.set_ylim(low, high)
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}%" if percent else f"{v:g}")
        axes.grid(axis="y")
        _finish(axes, line, narrow=percent)

    words = "; ".join(
        f"{METRIC[k].label} {_from_to(*(METRIC[k].show(v) for v in _ends(values)))}"
        for k, values in lines.items()
    )
    return _drawing(name, draw, f"Metrics over versions. {words}")


def _number(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _ends(line: Sequence[float]) -> tuple[float, float]:
    """The first and the last value that was measured."""
    found = [v for v in line if math.isfinite(v)]
    return found[0], found[-1]


def _from_to(first: str, last: str) -> str:
    return first if first == last else f"from {first} to {last}"


def _alone(line: Sequence[float], i: int) -> bool:
    """Whether no line reaches this value, so that only a dot can show it."""
    near = [line[j] for j in (i - 1, i + 1) if 0 <= j < len(line)]
    return math.isfinite(line[i]) and not any(map(math.isfinite, near))


def _limits(low: float, high: float, *, percent: bool) -> tuple[float, float]:
    """The ends of an axis: not so near that noise looks like a fall."""
    if percent:
        return max(min(10 * math.floor(low / 10), 80.0) - 2, -2.0), 102.0
    span = max(high - low, 0.1 * abs(high), 1e-6)
    middle = (low + high) / 2
    return middle - 0.75 * span, middle + 0.75 * span


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """The heights moved as little as keeps labels from lying on each other."""
    order = sorted(heights, key=lambda k: heights[k])
    places = [heights[k] for k in order]
    for _ in range(50):
        for i in range(1, len(places)):
            if (short := gap - (places[i] - places[i - 1])) > 1e-9:
                places[i - 1] -= short / 2
                places[i] += short / 2
    return dict(zip(order, places, strict=True))


def _finish(axes: Axes, line: Timeline, *, narrow: bool = False) -> None:
    """The axis of the versions, with the current one marked."""
    n = len(line.times)
    axes.set_xlim(min(-0.7, n / 2 - 3), max(n - 0.3, n / 2 + 2))
    if line.current is not None:
        axes.axvline(line.current, color=MUTED, lw=1, ls=(0, (1, 2)), zorder=0.6)
        axes.annotate(
            "CURRENT",
            (line.current, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if 2 * line.current > n else "left",
            color=INK,
            fontsize=10,
        )
    ticks, labels = _dates(line.times, narrow=narrow)
    axes.set_xticks(ticks, labels)


def _dates(times: Sequence[str], *, narrow: bool) -> tuple[list[int], list[str]]:
    """Some places along the versions and when those were made, as short as is clear."""
    found = [_moment(t) for t in times]
    known = [t for t in found if t is not None]
    most, form = 5, "%d %b"
    if known:
        first, last = min(known), max(known)
        if len(times) > 1 and first.date() == last.date():
            form = "%H:%M"
        elif (last - first).days < 4:
            most, form = 3, "%d %b %H:%M"
        elif first.year != last.year:
            most, form = 4, "%d %b %Y"
    # The newest has its date, and then every so many before it.
    stride = max(math.ceil((len(times) - 1) / (most - 1 - narrow)), 1)
    ticks = list(range(len(times) - 1, -1, -stride))
    return ticks, [f"{t:{form}}" if (t := found[i]) else f"#{i + 1}" for i in ticks]


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).replace(tzinfo=None)
    except ValueError:
        return None


def _drawing(name: str, draw: Callable[[Axes], None], what: str) -> str:
    """An `<svg>` with a title; `what` holds words of this module and numbers only."""
    svg = themed_svg(name, draw, height=2.7, what=what)
    begin = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:begin]}<title>{what}</title>{svg[begin:]}"
