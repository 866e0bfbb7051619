"""How each metric is named, printed and judged.

Knows what the metrics mean; knows neither how they are measured (`memedit.evaluate`) nor terminals
or HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from memedit.outcome import FactResult

Tone = Literal["better", "worse", "same"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one metric is named, printed and judged."""

    key: str
    label: str
    meaning: str
    percent: bool = True
    higher_is_better: bool = True
    decimals: int = 1
    noise: float = 0.5
    """A change smaller than this is called the same."""
    needs: str
    """What it is measured on."""
    repeats: str | None = None
    """The metric that it equals where every object is one token; then it is not shown."""

    def show(self, value: float | None) -> str:
        """The value for reading; `n/a` where there is none."""
        return f"{value:.{self.decimals}f}" if is_real(value) else "n/a"

    def signed(self, change: float) -> str:
        """A change for reading, with its sign."""
        return f"{change:+.{self.decimals}f}".replace("-", "\N{MINUS SIGN}")

    def change(self, before: float | None, after: float | None) -> tuple[str, Tone]:
        """The signed change and whether it is for the better."""
        if before is None or after is None or not (is_real(before) and is_real(after)):
            return "", "same"
        change = after - before
        tone: Tone = "better" if (change > 0) == self.higher_is_better else "worse"
        return f"{change:+.{self.decimals}f}", "same" if abs(change) < self.noise else tone


def interval_text(interval: Sequence[float] | None, metric: Metric | None = None) -> str:
    """A 95% interval, as `92-98`, or as its metric is shown; nothing where there is none."""
    decimals = 0 if metric is None or metric.percent else metric.decimals
    return "" if interval is None else "-".join(f"{bound:.{decimals}f}" for bound in interval)


def change_interval_text(interval: Sequence[float] | None, metric: Metric) -> str:
    """The 95% interval of a change, as `+1.2 to +3.4`; nothing where there is none."""
    return " to ".join(metric.signed(end) for end in interval or ())


def is_real(value: float | None) -> bool:
    """Whether there is a finite value."""
    return value is not None and math.isfinite(value)


METRICS = (
    Metric(
        key="efficacy",
        needs="facts with a target_true",
        label="Efficacy",
        meaning="the new object is likelier than the old",
    ),
    Metric(
        key="paraphrase",
        needs="paraphrases of facts with a target_true",
        label="Paraphrase",
        meaning="the same, on reworded prompts",
    ),
    Metric(
        key="neighbourhood",
        needs="neighbourhood prompts",
        label="Neighbourhood",
        meaning="facts about other subjects still hold",
    ),
    Metric(
        key="score",
        needs="facts with a target_true, paraphrases and neighbourhood prompts",
        label="Score",
        meaning="harmonic mean of efficacy, paraphrase, neighbourhood",
    ),
    Metric(
        key="efficacy_exact",
        needs="facts",
        label="Efficacy, exact",
        meaning="every token is the model's first choice",
    ),
    Metric(
        key="paraphrase_exact",
        needs="paraphrases",
        label="Paraphrase, exact",
        meaning="the same, on reworded prompts",
    ),
    Metric(
        key="neighbourhood_exact",
        needs="neighbourhood prompts",
        label="Neighbourhood, exact",
        meaning="the same, on facts about other subjects",
    ),
    Metric(
        key="efficacy_accuracy",
        needs="facts",
        label="Efficacy, tokens",
        meaning="tokens that are the model's first choice",
        repeats="efficacy_exact",
    ),
    Metric(
        key="paraphrase_accuracy",
        needs="paraphrases",
        label="Paraphrase, tokens",
        meaning="the same, on reworded prompts",
        repeats="paraphrase_exact",
    ),
    Metric(
        key="neighbourhood_accuracy",
        needs="neighbourhood prompts",
        label="Neighbourhood, tokens",
        meaning="the same, on facts about other subjects",
        repeats="neighbourhood_exact",
    ),
    Metric(
        key="attribute",
        needs="attribute prompts of facts with a target_true",
        label="Attribute",
        meaning="other subjects that have the new object still do",
    ),
    Metric(
        key="portability",
        needs="portability prompts",
        label="Portability",
        meaning="tokens of what follows from the facts are first choice",
    ),
    Metric(
        key="generation", needs="facts", label="Generation", meaning="free text says the new object"
    ),
    Metric(
        key="consistency",
        needs="facts with generation_prompts and references",
        label="Consistency",
        meaning="free text is like texts about such subjects",
    ),
    Metric(
        key="fluency",
        needs="continuations (evaluation.fluency_facts)",
        label="Fluency",
        meaning="variety of free text; low when it repeats itself",
        percent=False,
        decimals=2,
        noise=0.05,
    ),
    Metric(
        key="perplexity",
        needs="held-out text (evaluation.heldout_tokens)",
        label="Perplexity",
        meaning="surprise at held-out text; lower is better",
        percent=False,
        higher_is_better=False,
        decimals=2,
        noise=0.05,
    ),
    Metric(
        key="neighbourhood_kl",
        needs="neighbourhood prompts that no method protects (evaluation.drift_prompts)",
        label="Neighbourhood, KL",
        meaning="shift of the next token for neighbours; lower is better",
        percent=False,
        higher_is_better=False,
        decimals=3,
        noise=0.005,
    ),
    Metric(
        key="drift_kl",
        needs="neighbourhood prompts that no method protects, or held-out text with names"
        " (evaluation.drift_prompts)",
        label="Drift, KL",
        meaning="shift of the next token elsewhere; lower is better",
        percent=False,
        higher_is_better=False,
        decimals=3,
        noise=0.005,
    ),
    Metric(
        key="drift_top1",
        needs="neighbourhood prompts that no method protects, or held-out text with names"
        " (evaluation.drift_prompts)",
        label="Drift, same top-1",
        meaning="other prompts whose likeliest token stayed",
    ),
)
METRIC = {m.key: m for m in METRICS}


def metrics_to_show(*measured: Mapping[str, float | None]) -> list[Metric]:
    """The metrics that one of some models has, without those that repeat another in all of them."""

    def says_more(metric: Metric) -> bool:
        found = [(m.get(metric.key), m.get(metric.repeats or "")) for m in measured]
        return any(value is not None and value != other for value, other in found)

    return [metric for metric in METRICS if says_more(metric)]


def resting_on(facts: Sequence[FactResult]) -> dict[str, int]:
    """How many judgements each metric of facts is a share of."""
    compared = [f for f in facts if f.efficacy is not None]
    return {
        "efficacy": len(compared),
        "paraphrase": sum(len(f.paraphrase) for f in facts),
        "neighbourhood": sum(len(f.neighbourhood) for f in facts),
        "efficacy_exact": len(facts),
        "paraphrase_exact": sum(len(f.paraphrase_exact) for f in facts),
        "neighbourhood_exact": sum(len(f.neighbourhood_exact) for f in facts),
        "efficacy_accuracy": len(facts),
        "paraphrase_accuracy": sum(len(f.paraphrase_accuracy) for f in facts),
        "neighbourhood_accuracy": sum(len(f.neighbourhood_accuracy) for f in facts),
        "attribute": sum(len(f.attribute) for f in facts),
        "portability": sum(len(f.portability) for f in facts),
        "generation": len(facts),
        "consistency": sum(f.consistency is not None for f in facts),
        "neighbourhood_kl": sum(f.neighbourhood_kl is not None for f in facts),
    }


SHOWN_RELATIONS = 12
"""How many relations a page or a terminal shows by themselves."""
OF_A_RELATION = ("score", "efficacy", "efficacy_exact", "paraphrase", "neighbourhood")
"""The metrics that they are shown with."""
BY_RELATION = ("score", "efficacy_exact")
"""Of these the first that was measured is shown, where there is room for one."""


def pairs_metric(pairs: Sequence[Mapping[str, Any]]) -> Metric:
    """What pairs of relations are shown with: a metric that every one has."""
    found = [row["together"] for row in pairs if row["together"]]
    return METRIC[next(k for k in BY_RELATION if all(k in metrics for metrics in found))]


def pair_cells(row: Mapping[str, Any], metric: Metric) -> tuple[str, str, str, str]:
    """A metric together, apart, how much more it is together, and the 95% interval of that."""
    if row["failed"]:
        return ("", "", "", "")
    together, apart = row["together"][metric.key], row["apart"][metric.key]
    interval = change_interval_text(row["changes"].get(metric.key), metric)
    return metric.show(together), metric.show(apart), metric.signed(together - apart), interval
