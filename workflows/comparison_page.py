"""The page of a comparison: score against the number of facts, and the metrics as a table.

Knows the result of `memedit compare` as plain values; does not know how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from memedit.writing import whole_file
from workflows.metrics import (
    BY_RELATION,
    METRIC,
    METRICS,
    interval_text,
    metrics_to_show,
    pair_cells,
    pairs_metric,
)
from workflows.pages import page_templates
from workflows.plots import MUTED, SERIES, themed_svg
from workflows.wording import plural

_MARKERS = "os^Dv<>P"
_DASHES: tuple[Any, ...] = ("-", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_AXES_POINTS, _LABEL_POINTS = 165, 12.5
"""How high the axes and a label of them are, about."""


def write_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of a comparison, whole or not at all."""
    environment = page_templates()
    rows = result["rows"]
    text = environment.get_template("comparison.html.j2").render(
        result=result,
        metrics=metrics_to_show(*(row["metrics"] or {} for row in rows)),
        groups=[
            (
                [_cells(row) for row in rows if row["edits"] == edits],
                relations_of([row for row in rows if row["edits"] == edits]),
            )
            for edits in dict.fromkeys(row["edits"] for row in rows)
        ],
        plots=[
            (METRIC[key].label, METRIC[key].meaning, Markup(drawn))
            for key in ("score", "efficacy_exact", "neighbourhood", "drift_kl")
            if (drawn := curves_plot(rows, key))
        ],
        pairs=_pairs_of(result["pairs"]),
    )
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    found = row["metrics"] or {}
    shown = {
        metric.key: (
            metric.show(found.get(metric.key)),
            interval_text(row["intervals"].get(metric.key), metric).replace("-", "\N{EN DASH}"),
        )
        for metric in METRICS
    }
    return {**row, "shown": shown}


def _pairs_of(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not pairs:
        return None
    metric = pairs_metric(pairs)
    return {"metric": metric, "rows": [{**row, "cells": pair_cells(row, metric)} for row in pairs]}


def relations_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A metric of each relation for each method, of rows with the same facts; None with one."""
    judged = [row for row in rows if row["metrics"]]
    if not judged or len(judged[0]["relations"]) < 2:
        return None
    key = next(k for k in BY_RELATION if judged[0]["metrics"][k] is not None)
    metric, lines = METRIC[key], []
    for of_methods in zip(*(row["relations"] for row in judged), strict=True):
        first = of_methods[0]
        cells = [
            (metric.show(r["metrics"].get(key)), interval_text(r["intervals"].get(key), metric))
            for r in of_methods
        ]
        name = first["relation"] or plural(first["relations"], "other relation")
        lines.append({"name": name, "facts": first["facts"], "cells": cells})
    return {"metric": metric, "methods": [row["method"] for row in judged], "lines": lines}


def line_style(place: int) -> tuple[str, Any, str]:
    """Colour, dashes and marker of a line: the first is the base's, and no two of 15 are alike."""
    marker = _MARKERS[place % len(_MARKERS)]
    if place == 0:
        return MUTED, (0, (4, 3)), marker
    turn, colour = divmod(place - 1, len(SERIES))
    return SERIES[colour], _DASHES[turn % len(_DASHES)], marker


def _label_ends(axes: Axes, ends: Mapping[str, tuple[int, float]]) -> None:
    """The name of each line at its last point, those at one place one above the other."""
    low, high = axes.get_ylim()
    scale = _AXES_POINTS / (high - low)
    names = list(ends)
    for x in {x for x, _ in ends.values()}:
        here = [name for name in names if ends[name][0] == x]
        heights = [(ends[name][1] - low) * scale for name in here]
        for name, height, moved in zip(here, heights, spread(heights, _LABEL_POINTS), strict=True):
            axes.annotate(
                name,
                ends[name],
                (7, moved - height),
                textcoords="offset points",
                va="center",
                color=line_style(names.index(name))[0],
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


def curves_plot(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """A metric against the number of facts (log axis), one line a method, with 95% intervals."""
    curves: dict[str, list[tuple[int, float, Sequence[float] | None]]] = {}
    for row in rows:
        value = (row["metrics"] or {}).get(key)
        if value is not None:
            point = (row["edits"], value, row["intervals"].get(key))
            curves.setdefault(row["method"], []).append(point)
    if not curves:
        return ""

    def draw(axes: Axes) -> None:
        for place, (method, points) in enumerate(curves.items()):
            base = method == "base"
            colour, dashes, marker = line_style(place)
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
        _label_ends(axes, {method: points[-1][:2] for method, points in curves.items()})
        axes.set_xscale("log")
        counts = sorted({row["edits"] for row in rows})
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set_xlim(counts[0] * 0.8, counts[-1] * 2.2)
        axes.set_xlabel("facts edited at once")
        axes.grid(axis="y")

    return themed_svg(f"curve-{key}", draw, height=3.0, what=f"{METRIC[key].label} by facts")
