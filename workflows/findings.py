"""What a person should conclude from an evaluation: the verdict, the failures and their reasons.

Knows what the metrics mean and how to say it; knows neither terminals nor HTML
(`workflows.tables`, `workflows.report`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memedit.outcome import Evaluation, FactResult, TargetTrace
from workflows.metrics import Tone, is_real
from workflows.wording import plural

# The verdict -----------------------------------------------------------------------------------

WORKED, WORKED_IN_PART = 95.0, 70.0
"""Efficacy (or exact efficacy where there is no old object) in percent from which we say so."""
DAMAGED_PERPLEXITY, DAMAGED_TOP1 = 1.25, 50.0
"""We say that a model is damaged from so many times the base's perplexity on other text, or where
surely (by the 95% interval) fewer percent of prompts that no fact edits keep their likeliest next
word."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Three sentences: what was edited and whether it worked, how well, and what it cost."""

    headline: str
    success: str
    damage: str
    tone: Tone


def verdict(base: Evaluation | None, model: Evaluation, what: str) -> Verdict:
    """Say in words what the metrics of a model say, beside those of its base where it was judged.

    Args:
        base: The base's.
        model: The edited model's.
        what: What the headline begins with, such as `3 facts written`.
    """
    before = {} if base is None else base.metrics
    after = model.metrics
    name = "efficacy" if is_real(after.get("efficacy")) else "efficacy_exact"
    reached = after.get(name)
    if reached is None or not math.isfinite(reached):
        headline, tone = f"{what}, not evaluated", "same"
    elif reached >= WORKED:
        headline, tone = f"{what}, and the edit works", "better"
    elif reached >= WORKED_IN_PART:
        headline, tone = f"{what}, and the edit works in part", "same"
    else:
        headline, tone = f"{what}, but the edit does not work", "worse"
    if base is not None and is_damaged(base, model):
        headline, tone = (
            f"{headline}, {'and' if tone == 'worse' else 'but'} the model is damaged",
            "worse",
        )
    return Verdict(
        headline=headline + ".",
        success=_success(before, after),
        damage=_damage(before, after),
        tone=tone,  # type: ignore[arg-type]
    )


def is_damaged(base: Evaluation, model: Evaluation) -> bool:
    """Whether the model has suffered visibly beside its facts, and not by the draw of prompts."""
    old, new = base.metrics.get("perplexity"), model.metrics.get("perplexity")
    worse_at_text = (
        old is not None
        and math.isfinite(old)
        and new is not None
        and new >= DAMAGED_PERPLEXITY * old
    )
    _, top1 = model.intervals.get("drift_top1", (0.0, 100.0))
    return worse_at_text or top1 < DAMAGED_TOP1


def _success(before: dict[str, float | None], after: dict[str, float | None]) -> str:
    parts = []
    if is_real(after.get("efficacy")):
        was = f" (before: {_whole(before['efficacy'])})" if is_real(before.get("efficacy")) else ""
        parts.append(f"prefers the new object for {_whole(after['efficacy'])} of the facts{was}")
    if is_real(after.get("paraphrase")):
        parts.append(f"holds {_whole(after['paraphrase'])} of them when they are reworded")
    said = after.get("generation")
    if is_real(said):
        parts.append(f"says the new object in free text for {_whole(said)}")
    return f"The model now {_join(parts)}." if parts else ""


def _damage(before: dict[str, float | None], after: dict[str, float | None]) -> str:
    """What was lost elsewhere, always against the base."""
    parts = []
    old, new = before.get("neighbourhood"), after.get("neighbourhood")
    if old is not None and new is not None and is_real(old) and is_real(new):
        lost = old - new
        points = f"from {old:.1f}% to {new:.1f}%"
        parts.append(
            f"facts about other subjects kept their answer ({points})"
            if lost < 1
            else f"{lost:.1f} points of the facts about other subjects were lost ({points})"
        )
    old, new = before.get("perplexity"), after.get("perplexity")
    if old is not None and new is not None and is_real(old) and is_real(new) and old > 0:
        rise = 100 * (new / old - 1)
        verb = "rose" if rise > 0 else "fell"
        parts.append(f"perplexity on other text {verb} by {abs(rise):.1f}%")
    top1 = after.get("drift_top1")
    if top1 is not None and is_real(top1):
        parts.append(f"{top1:.0f}% of unrelated prompts keep their likeliest next word")
    return f"Elsewhere: {_join(parts)}." if parts else "Damage elsewhere was not measured."


def _whole(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0f}%"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# The failures ----------------------------------------------------------------------------------

FINE_LOSS = math.log(2)
"""Below this loss the z vector alone gives the new object a probability over a half (geometric
mean of its tokens), so the optimisation cannot be what failed."""

REASONS = {
    "target": "The z vector never said it: the loss did not fall far enough",
    "clamp": "The z vector was held back: it reached the norm clamp before the loss fell",
    "diverged": "The z optimisation diverged: the loss is not a number",
    "solve": "The z vector said it, but the layer updates lost it",
    "wording": "The model says it, but not as its first words: tokens or spacing differ",
    "comparison": "Every token is the first choice, yet the old object scores higher as a whole",
    "untraced": "Unknown: no trace of the z optimisation was kept",
}
"""Why a fact failed, by the name of the reason."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A fact that is not in the edited model, with the reason as far as the traces show it."""

    reason: str
    detail: str
    before: FactResult | None
    after: FactResult


def failed(fact: FactResult) -> bool:
    """Whether the fact is not there: the old object is likelier, or nobody would hear the new."""
    return fact.efficacy is False or not (fact.efficacy_exact or fact.generation)


def failures(
    before: Sequence[FactResult],
    after: Sequence[FactResult],
    traces: Sequence[TargetTrace] = (),
    *,
    clamp: float | None = None,
) -> tuple[Failure, ...]:
    """The failed facts, worst first (by how far the old object is ahead).

    Args:
        before: The judgements of the base; none where it was not judged.
        after: Those of the edited model.
        traces: How z was sought for them, as far as it is known.
        clamp: `clamp_norm_factor` of that search.
    """
    old, traced = _by_case(before), {t.case_id: t for t in traces}
    found = []
    for fact in after:
        if failed(fact):
            reason, detail = _why(fact, traced.get(fact.case_id), clamp)
            found.append(
                Failure(reason=reason, detail=detail, before=old.get(fact.case_id), after=fact)
            )
    return tuple(sorted(found, key=lambda f: (f.after.efficacy is not False, _lead(f.after))))


def _by_case(facts: Sequence[FactResult]) -> dict[str, FactResult]:
    return {fact.case_id: fact for fact in facts}


def _lead(fact: FactResult) -> float:
    """Log-probability of the new object over the old one, or its own where there is no old one."""
    lead = fact.logprob_new - (fact.logprob_true or 0.0)
    return lead if math.isfinite(lead) else -math.inf


def _why(fact: FactResult, trace: TargetTrace | None, clamp: float | None) -> tuple[str, str]:
    odds = f"now {probability(fact.logprob_new)} a token"
    if fact.logprob_true is not None:
        odds += f", old object {probability(fact.logprob_true)}"
    if fact.efficacy_exact:
        return "comparison", odds
    if fact.generation:
        return "wording", odds
    if trace is None or not trace.losses:
        return "untraced", odds
    first, last, steps = trace.losses[0], trace.losses[-1], plural(trace.steps, "step")
    if not math.isfinite(last):
        return "diverged", f"loss {first:.2f} at first, {last} after {steps}"
    fall = f"loss {first:.2f} → {last:.2f} in {steps}"
    if trace.converged or last < FINE_LOSS:
        return "solve", f"{fall}; {odds}"
    if clamp and trace.delta_norm >= 0.99 * clamp * trace.h_norm > 0:
        return "clamp", f"{fall}; ‖δ‖ = {trace.delta_norm / trace.h_norm:.2f}·‖h‖, the limit"
    return "target", fall


def probability(logprob: float) -> str:
    """A log-probability in nats as a percentage: `84%`, `0.3%`, `<0.01%`."""
    share = 100 * math.exp(min(logprob, 0.0)) if not math.isnan(logprob) else math.nan
    if math.isnan(share):
        return "n/a"
    if share < 0.01:
        return "<0.01%"
    return f"{share:.0f}%" if share >= 10 else f"{share:.1f}%" if share >= 1 else f"{share:.2g}%"


@dataclass(frozen=True, kw_only=True)
class Weakness:
    """A fact that is written, but narrowly or at its neighbours' cost."""

    before: FactResult | None
    after: FactResult
    paraphrases_failed: int
    neighbours_lost: int
    """Neighbourhood prompts that were right before the edit and are wrong after it."""


def weakest(
    before: Sequence[FactResult], after: Sequence[FactResult], n: int = 10
) -> tuple[Weakness, ...]:
    """The facts that are written but cost or generalise worst, worst first; none without fault."""
    old = _by_case(before)
    found = []
    for fact in after:
        if failed(fact):
            continue
        was = old.get(fact.case_id)
        right = was.neighbourhood if was else ()
        lost = sum(a and not b for a, b in zip(right, fact.neighbourhood, strict=False))
        unmet = fact.paraphrase.count(False)
        if lost or unmet:
            found.append(
                Weakness(before=was, after=fact, paraphrases_failed=unmet, neighbours_lost=lost)
            )

    def cost(w: Weakness) -> float:
        return w.paraphrases_failed / max(len(w.after.paraphrase), 1) + w.neighbours_lost / max(
            len(w.after.neighbourhood), 1
        )

    return tuple(sorted(found, key=cost, reverse=True)[:n])


def sample(
    before: Sequence[FactResult], after: Sequence[FactResult], n: int
) -> tuple[tuple[FactResult | None, FactResult], ...]:
    """`n` facts (before, after), taken at even distances so that nobody chose them."""
    old, count = _by_case(before), len(after)
    picks = range(count) if count <= n else [i * count // n for i in range(n)]
    return tuple((old.get(after[i].case_id), after[i]) for i in picks)
