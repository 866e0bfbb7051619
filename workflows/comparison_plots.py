"""The drawings of a comparison: a metric by numbers of facts, by relations, by pairs of relations.

Each method has one colour, dash and marker in all of them. Knows the rows of `memedit compare` as
plain values; does not know the page.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from workflows.metrics import METRIC, Metric, is_real
from workflows.plots import INK, MUTED, PAPER, RULE, SERIES, themed_svg
from workflows.wording import plural

Row = Mapping[str, Any]
Places = Mapping[str, int]

BASE = "base"
_MARKERS = "os^Dv<>P"
_DASHES: tuple[Any, ...] = ("-", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_AXES_POINTS, _LABEL_POINTS = 165, 12.5
"""How high the axes and a label of them are, about."""
_NAME_COLUMNS, _PAIR_COLUMNS = 24, 48
"""Letters in a line of a relation's name: beside the axes, and above a pair's lines."""
_LEAST_SPAN = 10.0
"""Points on the axis of pairs at least, so that little does not look like much."""


def places_of(rows: Sequence[Row]) -> dict[str, int]:
    """The place of each method, which `line_style` takes; the base has the first."""
    names = dict.fromkeys([BASE, *(row["method"] for row in rows)])
    return {name: place for place, name in enumerate(names)}


def line_style(place: int) -> tuple[str, Any, str]:
    """Colour, dashes and marker of a line: the first is the base's, and no two of 15 are alike."""
    marker = _MARKERS[place % len(_MARKERS)]
    if place == 0:
        return MUTED, (0, (4, 3)), marker
    turn, colour = divmod(place - 1, len(SERIES))
    return SERIES[colour], _DASHES[turn % len(_DASHES)], marker


# By numbers of facts ------------------------------------------------------------------------------


def curves_plot(rows: Sequence[Row], key: str) -> str:
    """A metric against the number of facts (log axis), one line a method, with 95% intervals."""
    curves: dict[str, list[tuple[int, float, Sequence[float] | None]]] = {}
    for row in rows:
        value = (row["metrics"] or {}).get(key)
        if value is not None and is_real(value):
            point = (row["edits"], value, row["intervals"].get(key))
            curves.setdefault(row["method"], []).append(point)
    if not curves:
        return ""
    places = places_of(rows)

    def draw(axes: Axes) -> None:
        for method, points in curves.items():
            base = method == BASE
            colour, dashes, marker = line_style(places[method])
            x = [edits for edits, _, _ in points]
            axes.plot(
                x,
                [value for _, value, _ in points],
                color=colour,
                lw=1.4 if base else 2.0,
                ls=dashes,
                marker=marker,
                ms=5,
            )
            bands = [(edits, pair) for edits, _, pair in points if pair is not None and not base]
            for edits, (low, high) in bands:
                axes.plot([edits, edits], [low, high], color=colour, lw=1.0, alpha=0.6)
        _label_ends(axes, {method: points[-1][:2] for method, points in curves.items()}, places)
        axes.set_xscale("log")
        counts = sorted({row["edits"] for row in rows})
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set_xlim(counts[0] * 0.8, counts[-1] * 2.2)
        axes.set_xlabel("facts edited at once")
        axes.grid(axis="y")

    return themed_svg(f"curve-{key}", draw, height=3.0, what=f"{METRIC[key].label} by facts")


def _label_ends(axes: Axes, ends: Mapping[str, tuple[int, float]], places: Places) -> None:
    """The name of each line at its last point, those at one place one above the other."""
    low, high = axes.get_ylim()
    scale = _AXES_POINTS / (high - low)
    for x in {x for x, _ in ends.values()}:
        here = [name for name in ends if ends[name][0] == x]
        heights = [(ends[name][1] - low) * scale for name in here]
        for name, height, moved in zip(here, heights, spread(heights, _LABEL_POINTS), strict=True):
            axes.annotate(
                name,
                ends[name],
                (7, moved - height),
                textcoords="offset points",
                va="center",
                color=line_style(places[name])[0],
                fontsize=10.5,
            )
    axes.set_ylim(low, high)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in the same order at least `gap` apart; groups of near ones stay where they are.

    Neighbours that are too near are joined to a block around the mean of its members, and blocks
    that meet are joined again.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, int]] = []  # its middle, and how many are in it
    for i in order:
        middle, count = heights[i], 1
        while blocks and middle - blocks[-1][0] < gap * (count + blocks[-1][1]) / 2:
            below, others = blocks.pop()
            middle = (below * others + middle * count) / (count + others)
            count += others
        blocks.append((middle, count))
    placed = [middle + gap * (k - (n - 1) / 2) for middle, n in blocks for k in range(n)]
    found = dict(zip(order, placed, strict=True))
    return [found[i] for i in range(len(heights))]


# By relations -------------------------------------------------------------------------------------


def relations_plot(
    judged: Sequence[Row], names: Sequence[str], metric: Metric, places: Places
) -> str:
    """A metric in percent of each relation, a dot a method below the other, with 95% intervals.

    Args:
        judged: Rows of methods that were judged on the same facts.
        names: What their relations are called, in the same order.
        metric: What is drawn; a relation that it was not measured on has no dot.
        places: As `places_of`.
    """
    found = {
        row["method"]: [
            (value, each["intervals"].get(metric.key))
            if is_real(value := each["metrics"].get(metric.key))
            else None
            for each in row["relations"]
        ]
        for row in judged
    }
    found = {method: points for method, points in found.items() if any(points)}
    if not found:
        return ""
    step, columns = 0.8 / len(found), 5 if len(found) <= 5 else 4

    def draw(axes: Axes) -> None:
        for number, (method, points) in enumerate(found.items()):
            colour, _, marker = line_style(places[method])
            for relation, point in enumerate(points):
                if point is None:
                    continue
                y = relation - 0.4 + (number + 0.5) * step
                value, interval = point
                if interval is not None:
                    axes.plot(interval, [y, y], color=colour, lw=1.2, alpha=0.65, zorder=2)
                axes.plot([value], [y], marker, color=colour, ms=4.6, zorder=3)
        for y in range(1, len(names)):
            axes.axhline(y - 0.5, color=RULE, lw=0.7)
        for y, name in enumerate(names):
            _label_row(axes, y, _lines(name, _NAME_COLUMNS))
        axes.set_yticks([])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-3, 103)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])
        axes.tick_params(axis="x", length=0)
        axes.spines["bottom"].set_visible(False)
        axes.grid(axis="x")
        axes.figure.legend(
            handles=[_handle(method, places) for method in found],
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            fontsize=10.5,
            handletextpad=0.2,
            columnspacing=1.0,
        )

    height = 0.4 + 0.2 * -(-len(found) // columns) + len(names) * max(0.38, 0.1 * len(found) + 0.1)
    ranges = "; ".join(f"{method} {_from_to(points, metric)}" for method, points in found.items())
    what = f"{metric.label} of {plural(len(names), 'relation')} with 95% intervals: {ranges}"
    return themed_svg("relations", draw, height=height, what=what)


def _label_row(axes: Axes, y: float, lines: Sequence[str]) -> None:
    """Lines left of the axes, each by itself, so that they end alike in any font."""
    for number, line in enumerate(lines):
        axes.annotate(
            line,
            (0, y),
            (-6, 12 * ((len(lines) - 1) / 2 - number)),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=10.5,
            parse_math=False,
        )


def _handle(method: str, places: Places) -> Line2D:
    colour, _, marker = line_style(places[method])
    return Line2D([], [], color=colour, marker=marker, ls="none", ms=5, label=method)


def _from_to(points: Sequence[tuple[float, Any] | None], metric: Metric) -> str:
    """From the lowest to the highest of some values, in words."""
    values = [point[0] for point in points if point is not None]
    low, high = metric.show(min(values)), metric.show(max(values))
    return low if low == high else f"{low} to {high}"


def _lines(name: str, columns: int) -> list[str]:
    """A name in two lines at most; wide letters take two columns."""
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in name)
    columns = columns // 2 if wide else columns
    lines = textwrap.wrap(name, columns)
    if len(lines) > 2:
        lines = [lines[0], lines[1][: columns - 1].rstrip() + "…"]
    return lines


# By pairs of relations ----------------------------------------------------------------------------


def pairs_plot(pairs: Sequence[Row], metric: Metric, places: Places) -> str:
    """A metric of each pair and method, apart (ring) and together (dot), with 95% of the change.

    Args:
        pairs: Rows of a method on a pair; those that failed are left out.
        metric: What is drawn, in percent.
        places: As `places_of`.
    """
    groups = [
        (relations, found)
        for relations, rows in groupby(pairs, key=lambda row: tuple(row["relations"]))
        if (found := list(_dumbbells(rows, metric.key)))
    ]
    if not groups:
        return ""
    values = [value for _, found in groups for _, *ends, change in found for value in ends + change]
    low, high = min(values), max(values)
    beside = max(_LEAST_SPAN - (high - low), 0) / 2 + 0.05 * (high - low) + 0.5

    def draw(axes: Axes) -> None:
        y, ticks = 0.0, {}
        for number, (relations, found) in enumerate(groups):
            if number:
                axes.axhline(y - 0.6, color=RULE, lw=0.7)
            heading = " + ".join(relations)
            lines = _lines(heading, _PAIR_COLUMNS)
            axes.annotate(
                "\n".join(lines),
                (0, y),
                (0, 4),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="top",
                fontsize=10.5,
                parse_math=False,
                annotation_clip=False,
            )
            y += 0.72 * len(lines) + 0.2
            for method, apart, together, change in found:
                colour = line_style(places[method])[0]
                axes.plot([apart, together], [y, y], color=colour, lw=2.2, alpha=0.45, zorder=1)
                if change:
                    axes.plot(change, [y, y], "|-", color=colour, lw=0.9, ms=7, zorder=2)
                axes.scatter(
                    [apart], [y], s=34, facecolor=PAPER, edgecolor=colour, lw=1.5, zorder=3
                )
                axes.scatter([together], [y], s=40, color=colour, zorder=4)
                ticks[y] = method
                y += 1
            y += 0.5
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(y - 0.9, -0.4)
        axes.set_xlim(low - beside, high + beside)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}%")
        axes.tick_params(axis="x", length=0)
        axes.spines["bottom"].set_visible(False)
        axes.grid(axis="x")

    count = sum(len(found) for _, found in groups)
    what = f"{metric.label} of {plural(len(groups), 'pair')} of relations, together and apart"
    return themed_svg("pairs", draw, height=0.5 + 0.24 * count + 0.5 * len(groups), what=what)


def _dumbbells(rows: Iterator[Row], key: str) -> Iterator[tuple[str, float, float, list[float]]]:
    """Method, apart, together, and where together would lie for 95% of other draws of facts."""
    for row in rows:
        apart, together = ((row[side] or {}).get(key) for side in ("apart", "together"))
        if apart is None or together is None or not (is_real(apart) and is_real(together)):
            continue
        yield row["method"], apart, together, [apart + end for end in row["changes"].get(key, ())]
