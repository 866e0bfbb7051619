"""How sure the metrics of a batch are: bootstrap intervals over its facts, prompts or windows.

Another draw of facts would have given other metrics. The percentile bootstrap (Efron 1979) draws
the batch's own facts anew, with replacement, and takes the middle 95% of what comes out. What is
measured of the whole model rests on prompts or windows of text instead. Knows judgements of facts;
does not know models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from memedit.outcome import FactResult

RESAMPLES = 1000
_LEVEL = 0.95
_FEWEST = 5
"""Prompts, windows or texts. Where an edit has changed half of all prompts, four drawn at random
have all changed once in 16 times, five once in 32: fewer would seem sure of too much."""
_AT_ONCE = 2**20
"""Facts that are drawn at once, so that memory does not grow with the batch."""


def _mean(prompts: Sequence[float]) -> float:
    return fmean(prompts) if prompts else math.nan


def _known(value: float | None) -> float:
    return math.nan if value is None else float(value)


FACT_VALUES: Mapping[str, Callable[[FactResult], float]] = {
    "efficacy": lambda fact: _known(fact.efficacy),
    "paraphrase": lambda fact: _mean(fact.paraphrase),
    "neighbourhood": lambda fact: _mean(fact.neighbourhood),
    "efficacy_exact": lambda fact: float(fact.efficacy_exact),
    "paraphrase_exact": lambda fact: _mean(fact.paraphrase_exact),
    "neighbourhood_exact": lambda fact: _mean(fact.neighbourhood_exact),
    "efficacy_accuracy": lambda fact: _known(fact.efficacy_accuracy),
    "paraphrase_accuracy": lambda fact: _mean(fact.paraphrase_accuracy),
    "neighbourhood_accuracy": lambda fact: _mean(fact.neighbourhood_accuracy),
    "attribute": lambda fact: _mean(fact.attribute),
    "portability": lambda fact: _mean(fact.portability),
    "generation": lambda fact: float(fact.generation),
    "consistency": lambda fact: _known(fact.consistency),
    "neighbourhood_kl": lambda fact: _known(fact.neighbourhood_kl),
}
"""What a fact adds to the mean that is a metric: a share of its prompts, NaN where it has none."""


def scale_of(metric: str) -> float:
    """What such a mean is multiplied with to be shown: shares are shown in percent."""
    return 1.0 if metric == "neighbourhood_kl" else 100.0


SCORED = ("efficacy", "paraphrase", "neighbourhood")
"""`score` is the harmonic mean of these."""


def intervals_of(
    facts: Sequence[FactResult], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The 95% interval of each metric that is a mean over facts, and of their score.

    In percent, as the metrics are; `neighbourhood_kl` in nats.

    Args:
        facts: The judgements of a batch.
        resamples: How often it is drawn anew.
        seed: Of the draws; the same intervals for the same facts.
    """
    return _bounds(_drawn_means(facts, resamples, seed))


def changes_of(
    before: Sequence[FactResult],
    after: Sequence[FactResult],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """The 95% interval of how much each metric has changed on the same facts, in its unit.

    A paired bootstrap: each draw takes the same facts before and after, so that what makes a fact
    easy or hard cancels out.

    Args:
        before: The judgements of a batch by one model.
        after: By another, in the same order.
        resamples: How often it is drawn anew.
        seed: Of the draws.
    """
    if [fact.case_id for fact in before] != [fact.case_id for fact in after]:
        raise ValueError("not the same facts, in their order")
    old, new = (_drawn_means(facts, resamples, seed) for facts in (before, after))
    return _bounds({name: new[name] - old[name] for name in old if name in new})


def ratio_interval(
    above: Sequence[float], below: Sequence[float] | None = None
) -> tuple[float, float] | None:
    """The 95% interval of Σ above / Σ below over items drawn together; None of fewer than 5.

    Args:
        above: A value of each item.
        below: Its weight; without them this is the interval of the mean.
    """
    if len(above) < _FEWEST:
        return None
    values_FM = torch.tensor([above, below or [1.0] * len(above)], dtype=torch.float64).T
    above_R, below_R = resampled_means(values_FM).T
    low_1, high_1 = middle((above_R / below_R)[:, None])
    return float(low_1), float(high_1)


def _drawn_means(facts: Sequence[FactResult], resamples: int, seed: int) -> dict[str, Tensor]:
    """Each metric, and the score, on every draw, [resamples]; shares are of 1.

    Without those that a single fact has: all draws of one are alike, and say nothing of others.
    """
    known = {name: sum(not math.isnan(of(f)) for f in facts) for name, of in FACT_VALUES.items()}
    names = [name for name, count in known.items() if count > 1]
    if not names:
        return {}
    values_FM = torch.tensor(
        [[FACT_VALUES[name](fact) for name in names] for fact in facts], dtype=torch.float64
    )
    means_RM = resampled_means(values_FM, resamples=resamples, seed=seed)
    if set(SCORED) <= set(names):
        parts_RP = means_RM[:, [names.index(name) for name in SCORED]]
        # Of a zero it is zero, as it should be: 3 / inf.
        score_R1 = len(SCORED) / (1 / parts_RP).sum(1, keepdim=True)
        names, means_RM = [*names, "score"], torch.cat([means_RM, score_R1], dim=1)
    return dict(zip(names, means_RM.T, strict=True))


def _bounds(drawn: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """The middle 95% of each metric's draws, in its unit."""
    if not drawn:
        return {}
    low_M, high_M = middle(torch.stack(list(drawn.values()), dim=1))
    return {
        name: (scale_of(name) * low, scale_of(name) * high)
        for name, low, high in zip(drawn, low_M.tolist(), high_M.tolist(), strict=True)
    }


def resampled_means(values_FM: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Means over facts that are drawn with replacement, [resamples, M]; NaN is left out.

    How often each fact was drawn, times its values: a draw is a row of counts c_F and its means are
    c_F values_FM / c_F there_FM. All columns see the same draws, so that what is made of several
    columns may be drawn, too.

    Args:
        values_FM: M values of each fact, float64.
        resamples: How often facts are drawn.
        seed: Of the draws.
    """
    count = len(values_FM)
    generator = torch.Generator().manual_seed(seed)
    there_FM = (~values_FM.isnan()).double()
    values_FM = values_FM.nan_to_num()
    at_once = max(1, _AT_ONCE // count)
    parts = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn_RF = torch.randint(count, (rows, count), generator=generator)
        places_RF = drawn_RF + count * torch.arange(rows)[:, None]
        times_RF = torch.bincount(places_RF.flatten(), minlength=rows * count).view(rows, count)
        times_RF = times_RF.double()
        parts.append((times_RF @ values_FM) / (times_RF @ there_FM))
    return torch.cat(parts)


def middle(means_RM: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of the middle 95% of each column, [M] each; draws without a value are left out."""
    tail = (1 - _LEVEL) / 2
    low_M, high_M = torch.nanquantile(means_RM, means_RM.new_tensor([tail, 1 - tail]), dim=0)
    return low_M, high_M
