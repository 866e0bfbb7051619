"""What the pages of an edit and of an evaluation share: a model's judgements beside its base's.

Turns two `Evaluation`s into what the macros of `templates/judged.html.j2` show. Knows how numbers
are written; `workflows.findings` knows what they mean and `workflows.plots` draws them. Every text
of a fact or a model passes through the templates' escaping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from memedit.evaluate import summarise
from memedit.outcome import Evaluation, FactResult
from workflows.findings import REASONS, Failure, sample, weakest
from workflows.judgements import relation_metrics
from workflows.metrics import (
    METRIC,
    OF_A_RELATION,
    SHOWN_RELATIONS,
    Metric,
    change_interval_text,
    interval_text,
    metrics_to_show,
    resting_on,
)
from workflows.pages import cut, page_templates
from workflows.plots import metrics_plot
from workflows.progress import duration

SHOWN_FAILURES = 40
"""How many failed facts a page lists; its counts are over all of them."""
SHOWN_CONTINUATIONS = 8
HEADLINE = ("efficacy", "paraphrase", "neighbourhood", "score")

Intervals = Mapping[str, Sequence[float]]


def judged_templates() -> jinja2.Environment:
    """The templates for HTML with what the macros of `judged.html.j2` need."""
    environment = page_templates()
    environment.filters["said"] = _said
    return environment


def judged_rows(
    base: Evaluation | None,
    model: Evaluation,
    failures: Sequence[Failure],
    *,
    changes: Intervals | None = None,
) -> dict[str, Any]:
    """The figures, metrics, relations, continuations and failed facts of a model.

    Args:
        base: The evaluation before the edit; None where the base was not judged.
        model: That of the edited model.
        failures: The failed facts, the worst first.
        changes: The 95% interval of each change; none is shown where it is not known.
    """
    before = {} if base is None else base.metrics
    old = () if base is None else base.facts
    after, shown = model.metrics, metrics_to_show(before, model.metrics)
    return {
        "compared": base is not None,
        "headline": [_row(METRIC[k], before, after) for k in HEADLINE if after.get(k) is not None],
        "metrics": _metrics(shown, base, model, changes or {}),
        "metrics_plot": Markup(
            metrics_plot(
                [(m.label, before.get(m.key), after.get(m.key)) for m in shown if m.percent]
            )
        ),
        "relations": _relations(old, model),
        "relation_metrics": [METRIC[key] for key in OF_A_RELATION if after.get(key) is not None],
        "continuations": sample(old, model.facts, SHOWN_CONTINUATIONS),
        "evaluated": len(model.facts),
        "n_failed": len(failures),
        "failures": [_failure(f) for f in failures[:SHOWN_FAILURES]],
        "weakest": weakest(old, model.facts) if base is not None else (),
    }


def _metrics(
    shown: Sequence[Metric], base: Evaluation | None, model: Evaluation, changes: Intervals
) -> list[dict[str, Any]]:
    before = Evaluation(metrics={}) if base is None else base
    resting = resting_on(model.facts)
    return [
        _row(metric, before.metrics, model.metrics)
        | {
            "count": resting.get(metric.key),
            "before_interval": _between(before.intervals.get(metric.key), metric),
            "interval": _between(model.intervals.get(metric.key), metric),
            "change_interval": change_interval_text(changes.get(metric.key), metric),
        }
        for metric in shown
    ]


def _between(interval: Sequence[float] | None, metric: Metric | None = None) -> str:
    return interval_text(interval, metric).replace("-", "\N{EN DASH}")


def _row(
    metric: Metric, before: Mapping[str, float | None], after: Mapping[str, float | None]
) -> dict[str, Any]:
    old, new = before.get(metric.key), after.get(metric.key)
    change, tone = metric.change(old, new)
    return {
        "metric": metric,
        "before": metric.show(old),
        "after": metric.show(new),
        "change": change.replace("-", "\N{MINUS SIGN}"),
        "tone": tone,
    }


def _relations(old: Sequence[FactResult], model: Evaluation) -> list[dict[str, Any]]:
    """A row a relation: its metrics after the edit with their intervals, and those before."""
    rows = relation_metrics(model.facts, most=SHOWN_RELATIONS)
    if len(rows) < 2:
        return []
    own = {row.relation for row in rows}
    before: dict[str, list[FactResult]] = {}
    for fact in old:
        before.setdefault(fact.relation if fact.relation in own else "", []).append(fact)
    return [
        {
            "name": row.name,
            "facts": f"{row.facts:,}",
            "cells": [
                {
                    "before": METRIC[key].show(was[key]) if was[key] is not None else "",
                    "after": METRIC[key].show(row.metrics.get(key)),
                    "interval": _between(row.intervals.get(key)),
                }
                for key in OF_A_RELATION
                if model.metrics.get(key) is not None
            ],
        }
        for row in rows
        for was in (summarise(before.get(row.relation, [])),)
    ]


def _failure(failure: Failure) -> dict[str, Any]:
    return {
        "reason": REASONS[failure.reason],
        "detail": failure.detail,
        "before": failure.before,
        "after": failure.after,
    }


def timings_rows(timings_s: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(stage, time, percent of the longest) of each stage that ran, and the total last."""
    stages = {k: v for k, v in timings_s.items() if k != "total" and v > 0}
    longest = max(stages.values(), default=0.0)
    rows = [(k, duration(v), 100 * v / longest) for k, v in stages.items()]
    if "total" in timings_s:
        rows.append(("total", duration(timings_s["total"]), 0.0))
    return rows


def _said(fact: FactResult | None) -> Markup:
    """A continuation, escaped, with the first mention of the new and of the old object marked."""
    if fact is None or not fact.continuation.strip():
        return Markup('<span class="none">nothing</span>')
    text = cut(fact.continuation)
    marks = []
    for kind, wanted in (("new", fact.target_new), ("old", fact.target_true)):
        at = text.casefold().find(wanted.casefold()) if wanted else -1
        # Case folding can change lengths ("ß"); then nothing is marked rather than the wrong place.
        if wanted and at >= 0 and text[at : at + len(wanted)].casefold() == wanted.casefold():
            marks.append((at, at + len(wanted), kind))
    parts, done = Markup(), 0
    for begin, end, kind in sorted(marks):
        if begin < done:
            continue
        parts += Markup('{}<mark class="{}">{}</mark>').format(
            text[done:begin], kind, text[begin:end]
        )
        done = end
    return parts + text[done:]
