"""The report of one edit: a single HTML page that needs nothing else.

Turns an `EditOutcome` into what `templates/report.html.j2` shows. Knows how numbers are written;
`workflows.findings` knows what they mean and `workflows.plots` draws them. Every text of a fact or
a model passes through the template's escaping.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from markupsafe import Markup

from memedit.evaluate import summarise
from memedit.outcome import EditOutcome, FactResult
from memedit.writing import whole_file
from workflows.findings import REASONS, Failure, failures, probability, sample, verdict, weakest
from workflows.judgements import FACTS_TABLE_NAME, relation_metrics
from workflows.metrics import (
    METRIC,
    OF_A_RELATION,
    SHOWN_RELATIONS,
    interval_text,
    metrics_to_show,
    resting_on,
)
from workflows.pages import cut, page_templates
from workflows.plots import loss_plot, metrics_plot, norms_plot
from workflows.progress import duration
from workflows.wording import layers_text, plural

SHOWN_FAILURES = 40
"""How many failed facts the page lists; the counts by reason are over all of them."""
SHOWN_CONTINUATIONS = 8
HEADLINE = ("efficacy", "paraphrase", "neighbourhood", "score")


def write_report(outcome: EditOutcome, path: Path) -> None:
    """Write the report of `outcome` to `path`, whole or not at all."""
    text = render_report(outcome)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def render_report(outcome: EditOutcome) -> str:
    """The page as text."""
    environment = page_templates()
    environment.filters["said"] = _said
    return environment.get_template("report.html.j2").render(_context(outcome))


def _context(outcome: EditOutcome) -> dict[str, Any]:
    before, after = outcome.before.metrics, outcome.after.metrics
    resting = resting_on(outcome.after.facts)
    found = failures(outcome)
    counts = Counter(f.reason for f in found)
    targets = outcome.settings.get("targets")
    threshold = targets.get("loss_threshold") if isinstance(targets, Mapping) else None
    shown = metrics_to_show(before, after)
    return {
        "outcome": outcome,
        "verdict": verdict(outcome),
        "facts": plural(outcome.facts.accepted, "fact"),
        "layers": layers_text(outcome.layers),
        "headline": [_row(key, before, after) for key in HEADLINE if after.get(key) is not None],
        "metrics": [
            _row(m.key, before, after)
            | {
                "count": resting.get(m.key),
                "interval": interval_text(outcome.after.intervals.get(m.key), m).replace(
                    "-", "\N{EN DASH}"
                ),
            }
            for m in shown
        ],
        "metrics_plot": Markup(
            metrics_plot(
                [(m.label, before.get(m.key), after.get(m.key)) for m in shown if m.percent]
            )
        ),
        "relations": _relations(outcome),
        "facts_table": FACTS_TABLE_NAME,
        "relation_metrics": [METRIC[key] for key in OF_A_RELATION if after.get(key) is not None],
        "loss_plot": Markup(loss_plot(outcome.traces, threshold)),
        "norms_plot": Markup(norms_plot(outcome.updates)),
        "n_converged": sum(t.converged for t in outcome.traces),
        "continuations": sample(outcome, SHOWN_CONTINUATIONS),
        "evaluated": len(outcome.after.facts),
        "n_failed": len(found),
        "failed_share": 100 * len(found) / max(len(outcome.after.facts), 1),
        "reasons": [(REASONS[reason], count) for reason, count in counts.most_common()],
        "failures": [_failure(f) for f in found[:SHOWN_FAILURES]],
        "weakest": weakest(outcome),
        "layer_rows": list(_layer_rows(outcome)),
        "has_rounding": any(u.rounding_error is not None for u in outcome.updates),
        "has_rank": any(u.rank is not None for u in outcome.updates),
        "timings": _timings(outcome.timings_s),
        "settings": list(_flat(outcome.settings)),
        "versions": list(outcome.versions.items()),
        "rejects": PurePosixPath(outcome.facts.rejects or "").name,
    }


def _row(
    key: str, before: Mapping[str, float | None], after: Mapping[str, float | None]
) -> dict[str, Any]:
    metric = METRIC[key]
    old, new = before.get(key), after.get(key)
    change, tone = metric.change(old, new)
    return {
        "metric": metric,
        "before": metric.show(old),
        "after": metric.show(new),
        "change": change.replace("-", "\N{MINUS SIGN}"),
        "tone": tone,
    }


def _relations(outcome: EditOutcome) -> list[dict[str, Any]]:
    """A row a relation: its metrics after the edit with their intervals, and those before."""
    rows = relation_metrics(outcome.after.facts, most=SHOWN_RELATIONS)
    if len(rows) < 2:
        return []
    own = {row.relation for row in rows}
    before: dict[str, list[FactResult]] = {}
    for fact in outcome.before.facts:
        before.setdefault(fact.relation if fact.relation in own else "", []).append(fact)
    return [
        {
            "name": row.name,
            "facts": f"{row.facts:,}",
            "cells": [
                {
                    "before": METRIC[key].show(old[key]) if old[key] is not None else "",
                    "after": METRIC[key].show(row.metrics.get(key)),
                    "interval": interval_text(row.intervals.get(key)).replace("-", "\N{EN DASH}"),
                }
                for key in OF_A_RELATION
                if outcome.after.metrics.get(key) is not None
            ],
        }
        for row in rows
        for old in (summarise(before.get(row.relation, [])),)
    ]


def _failure(failure: Failure) -> dict[str, Any]:
    return {
        "reason": REASONS[failure.reason],
        "detail": failure.detail,
        "before": failure.before,
        "after": failure.after,
    }


def _layer_rows(outcome: EditOutcome) -> Iterator[dict[str, str]]:
    """One row a layer, of what is known about its statistics and its update."""
    moments = {m.layer: m for m in outcome.moments}
    updates = {u.layer: u for u in outcome.updates}
    for layer in sorted(moments.keys() | updates.keys()):
        m, u = moments.get(layer), updates.get(layer)
        without = m.trace_without_position_0 if m else None
        rounding = u.rounding_error if u else None
        lost = u.truncation_error if u else None
        yield {
            "layer": str(layer),
            "tokens": f"{m.tokens:,}" if m else "",
            "error": f"{100 * m.error:.2g}%" if m and m.error is not None else "",
            "trace": f"{m.trace:,.4g}" if m else "",
            "trace_without": f"{without:,.4g}" if without is not None else "",
            "lam": f"{u.lam:,g}" if u else "",
            "residual": f"{u.residual_norm:.3g}" if u and u.residual_norm is not None else "",
            "share": f"{100 * u.delta_norm / u.weight_norm:.3g}%" if u and u.weight_norm else "",
            "rounding": f"{100 * rounding:.2g}%" if rounding is not None else "",
            "rank": str(u.rank) if u and u.rank is not None else "",
            "truncated": f"{100 * lost:.2g}%" if lost is not None else "",
        }


def _timings(timings_s: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(stage, time, percent of the longest) of each stage that ran, and the total last."""
    stages = {k: v for k, v in timings_s.items() if k != "total" and v > 0}
    longest = max(stages.values(), default=0.0)
    rows = [(k, duration(v), 100 * v / longest) for k, v in stages.items()]
    if "total" in timings_s:
        rows.append(("total", duration(timings_s["total"]), 0.0))
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (`section.field`, text), as `--set` writes them."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", "default" if value is None else str(value)


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


__all__ = ["probability", "render_report", "write_report"]
