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

from memedit.outcome import EditOutcome
from memedit.writing import whole_file
from workflows.findings import REASONS, failures, verdict
from workflows.judged_rows import judged_rows, judged_templates, timings_rows
from workflows.judgements import FACTS_TABLE_NAME
from workflows.plots import loss_plot, norms_plot
from workflows.wording import layers_text, plural


def write_report(outcome: EditOutcome, path: Path) -> None:
    """Write the report of `outcome` to `path`, whole or not at all."""
    text = render_report(outcome)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def render_report(outcome: EditOutcome) -> str:
    """The page as text."""
    return judged_templates().get_template("report.html.j2").render(_context(outcome))


def _context(outcome: EditOutcome) -> dict[str, Any]:
    targets = outcome.settings.get("targets")
    targets = targets if isinstance(targets, Mapping) else {}
    found = failures(
        outcome.before.facts,
        outcome.after.facts,
        outcome.traces,
        clamp=targets.get("clamp_norm_factor"),
    )
    counts = Counter(f.reason for f in found)
    facts = plural(outcome.facts.accepted, "fact")
    return judged_rows(outcome.before, outcome.after, found) | {
        "outcome": outcome,
        "verdict": verdict(outcome.before, outcome.after, f"{facts} written"),
        "facts": facts,
        "layers": layers_text(outcome.layers),
        "facts_table": FACTS_TABLE_NAME,
        "loss_plot": Markup(loss_plot(outcome.traces, targets.get("loss_threshold"))),
        "norms_plot": Markup(norms_plot(outcome.updates)),
        "n_converged": sum(t.converged for t in outcome.traces),
        "reasons": [(REASONS[reason], count) for reason, count in counts.most_common()],
        "layer_rows": list(_layer_rows(outcome)),
        "has_rounding": any(u.rounding_error is not None for u in outcome.updates),
        "has_rank": any(u.rank is not None for u in outcome.updates),
        "timings": timings_rows(outcome.timings_s),
        "settings": list(_flat(outcome.settings)),
        "versions": list(outcome.versions.items()),
        "rejects": PurePosixPath(outcome.facts.rejects or "").name,
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (`section.field`, text), as `--set` writes them."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", "default" if value is None else str(value)
