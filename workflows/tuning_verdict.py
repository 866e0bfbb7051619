"""Whether settings that were found are better than those that the search began with.

Both were judged on the same facts, which the search never saw. Knows judgements and how sure they
are; does not know how settings were found.
"""

from __future__ import annotations

from typing import Any

from memedit.intervals import changes_of
from memedit.outcome import Evaluation
from workflows.metrics import METRIC, Metric, Tone


def verdict_of(
    objective: str,
    *,
    before: Evaluation | None,
    after: Evaluation | None,
    failed: str | None = None,
) -> dict[str, Any]:
    """The objective with both, how much it changed with its 95% interval, and that in words.

    Better or worse is only what the interval says, where there is one.

    Args:
        objective: The metric that was searched for.
        before: With the settings that the search began with; None where they failed.
        after: With those that it chose; the same object if they are the same settings.
        failed: Why there is no `after`.
    """
    metric = METRIC[objective]
    old = None if before is None else before.metrics[objective]
    new = None if after is None else after.metrics[objective]
    found: dict[str, Any] = {"before": old, "after": new, "change": None, "interval": None}
    if new is None:
        why = failed or f"{objective} was not measured"
        return {
            **found,
            "tone": "worse",
            "text": f"The settings failed on the held-out half: {why}",
        }
    value = f"{metric.label} {metric.show(new)} on the held-out half"
    if after is before:
        text = f"The search found nothing better than the settings it began with: {value.lower()}."
        return {**found, "change": 0.0, "tone": "same", "text": text}
    if before is None or old is None:
        text = f"{value}, where the settings that the search began with failed."
        return {**found, "tone": "better", "text": text}
    assert after is not None
    change = new - old
    interval = changes_of(before.facts, after.facts).get(objective)
    tone = _tone(metric, old, new, interval)
    sure = ""
    if interval is not None:
        low, high = (metric.signed(end) for end in interval)
        sure = f" (95%: {low} to {high})"
    if tone == "same" and abs(change) < metric.noise:
        text = f"{value}, as with the settings that the search began with{sure}."
        return {**found, "change": change, "interval": _plain(interval), "tone": tone, "text": text}
    told = {"better": "", "worse": "; keep those", "same": ", no more than chance may give"}[tone]
    text = (
        f"{value}, against {metric.show(old)} with the settings that the search began with: "
        f"{metric.signed(change)}{sure}{told}."
    )
    return {
        "before": old,
        "after": new,
        "change": change,
        "interval": _plain(interval),
        "tone": tone,
        "text": text,
    }


def _tone(metric: Metric, old: float, new: float, interval: tuple[float, float] | None) -> Tone:
    if interval is None:
        return metric.change(old, new)[1]
    low, high = interval
    if low > 0:
        return "better" if metric.higher_is_better else "worse"
    if high < 0:
        return "worse" if metric.higher_is_better else "better"
    return "same"


def _plain(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
