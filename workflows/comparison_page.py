"""The page of a comparison: score against the number of facts, and the metrics as a table.

Knows the result of `memedit compare` as plain values; does not know how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from memedit.writing import whole_file
from workflows.comparison_plots import Places, curves_plot, pairs_plot, places_of, relations_plot
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
from workflows.wording import plural


def write_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of a comparison, whole or not at all."""
    environment = page_templates()
    rows = result["rows"]
    places, most = places_of(rows), max(row["edits"] for row in rows)
    text = environment.get_template("comparison.html.j2").render(
        result=result,
        metrics=metrics_to_show(*(row["metrics"] or {} for row in rows)),
        groups=[
            (
                [_cells(row) for row in rows if row["edits"] == edits],
                relations_of(
                    [row for row in rows if row["edits"] == edits],
                    places if edits == most else None,
                ),
            )
            for edits in dict.fromkeys(row["edits"] for row in rows)
        ],
        plots=[
            (METRIC[key].label, METRIC[key].meaning, Markup(drawn))
            for key in ("score", "efficacy_exact", "neighbourhood", "drift_kl")
            if (drawn := curves_plot(rows, key))
        ],
        pairs=_pairs_of(result["pairs"], places),
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


def _pairs_of(pairs: Sequence[Mapping[str, Any]], places: Places) -> dict[str, Any] | None:
    if not pairs:
        return None
    metric = pairs_metric(pairs)
    return {
        "metric": metric,
        "groups": [
            [{**row, "cells": pair_cells(row, metric)} for row in rows]
            for _, rows in groupby(pairs, key=lambda row: row["relations"])
        ],
        "plot": Markup(pairs_plot(pairs, metric, places)),
    }


def relations_of(
    rows: Sequence[Mapping[str, Any]], places: Places | None = None
) -> dict[str, Any] | None:
    """A metric of each relation for each method, of rows with the same facts; None with one.

    With `places` (`workflows.comparison_plots.places_of`) it is drawn, too.
    """
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
    names = [line["name"] for line in lines]
    return {
        "metric": metric,
        "methods": [row["method"] for row in judged],
        "lines": lines,
        "plot": Markup(relations_plot(judged, names, metric, places) if places else ""),
    }
