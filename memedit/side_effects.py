"""What an edit does to the rest of the model: drift, fluency, perplexity, free text.

Each is cut into parts that any worker can do on its model, by prompts or windows, so that a part
depends on the input only and not on the workers (`side_effect_parts`); `side_effects_of` puts the
results together. The measures themselves are in `memedit.drift`, `memedit.free_text` and
`memedit.scoring`. Does not know whether a fact went in (`memedit.evaluate`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memedit.architecture import Architecture
from memedit.config import EvaluationSettings
from memedit.drift import (
    DriftReference,
    divergences,
    drift_of,
    drift_prompts,
    drift_reference,
)
from memedit.free_text import Sample, ngram_entropy
from memedit.generate import greedy_continuations
from memedit.intervals import ratio_interval
from memedit.prompts import encode
from memedit.requests import EditRequest
from memedit.scoring import Ids, heldout_windows, log_likelihoods, perplexity_of

# Free text is made many prompts at once; single ones would take almost as long as all together.
_PROMPTS_PER_TEXTS, _PROMPTS_PER_DRIFT, _WINDOWS_PER_PART = 32, 50, 8


# ------------------------------------------------------------------------------------- the parts


class Part(Protocol):
    """Something to measure on a model, and small enough to be sent to a worker."""

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arch: Architecture | None,
    ) -> Any:
        """Measure it; the model is not changed."""


@dataclass(frozen=True, kw_only=True)
class Entropies(Part):
    """For `fluency`: the n-gram entropy of each prompt with its greedy continuation, in bits.

    The reference samples (top-k 5) up to 100 tokens from prompts of its own and prints 100 times
    the mean. Greedy text repeats itself sooner, so these numbers are lower than published ones:
    compare before with after, not with papers.
    """

    prompts: tuple[str, ...]
    tokens: int

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arch: Architecture | None,
    ) -> list[float]:
        """See `Part`."""
        told = greedy_continuations(model, tokenizer, self.prompts, self.tokens)
        return [ngram_entropy(p + c) for p, c in zip(self.prompts, told, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Texts(Part):
    """For `consistency`: what the model writes after each prompt, greedily, with the prompt."""

    prompts: tuple[str, ...]
    tokens: int

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arch: Architecture | None,
    ) -> list[tuple[str, str]]:
        """See `Part`."""
        told = greedy_continuations(model, tokenizer, self.prompts, self.tokens)
        return [(p, p + c) for p, c in zip(self.prompts, told, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Likelihoods(Part):
    """For `perplexity`: see `memedit.scoring.log_likelihoods`."""

    windows: tuple[Ids, ...]
    tokens_per_batch: int | None = None

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arch: Architecture | None,
    ) -> list[tuple[float, int]]:
        """See `Part`."""
        return log_likelihoods(model, arch, self.windows, tokens_per_batch=self.tokens_per_batch)


@dataclass(frozen=True, kw_only=True)
class Predictions(Part):
    """For the drift from this model: its distributions after some prompts."""

    prompts: tuple[str, ...]
    tokens_per_batch: int | None = None

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arch: Architecture | None,
    ) -> list[DriftReference]:
        """See `Part`."""
        contexts = [tuple(encode(tokenizer, prompt)) for prompt in self.prompts]
        found = drift_reference(model, arch, contexts, tokens_per_batch=self.tokens_per_batch)
        return [
            DriftReference(
                contexts=found.contexts, logprobs_NV=found.logprobs_NV, prompts=self.prompts
            )
        ]


@dataclass(frozen=True, kw_only=True)
class Shift(Part):
    """For the drift of this model: how far each distribution of the base has moved."""

    reference: DriftReference
    tokens_per_batch: int | None = None

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arch: Architecture | None,
    ) -> list[tuple[str, float, bool]]:
        """See `Part`."""
        moved = divergences(model, arch, self.reference, tokens_per_batch=self.tokens_per_batch)
        return [
            (prompt, kl, same)
            for prompt, (kl, same) in zip(self.reference.prompts, moved, strict=True)
        ]


def prediction_parts(
    requests: Sequence[EditRequest], settings: EvaluationSettings, elsewhere: Sequence[str] = ()
) -> list[Predictions]:
    """The parts that give a base's distributions after the `drift_prompts`."""
    size = _PROMPTS_PER_DRIFT
    prompts = drift_prompts(requests, settings.drift_prompts, elsewhere)
    return [
        Predictions(
            prompts=tuple(prompts[start : start + size]),
            tokens_per_batch=settings.tokens_per_batch,
        )
        for start in range(0, len(prompts), size)
    ]


def side_effect_parts(
    requests: Sequence[EditRequest],
    *,
    heldout: Sequence[Sequence[int]] | None = None,
    elsewhere: Sequence[str] = (),
    reference: DriftReference | None = None,
    sample: Sample,
    settings: EvaluationSettings,
) -> list[Part]:
    """What is to be measured, the longest parts first.

    Args:
        requests: The facts.
        heldout: Token ids of documents for the perplexity; None leaves it out.
        elsewhere: Prompts for the drift where the facts bring none that no method protects.
        reference: The base's distributions, from the measurement of the unedited model; None makes
            the measured model the base, whose drift is 0 by definition.
        sample: What free text is asked for.
        settings: How much is measured.
    """
    size, told, asked = _PROMPTS_PER_TEXTS, sample.told, sample.asked
    windows = heldout_windows(
        heldout or (), window=settings.heldout_window, max_tokens=settings.heldout_tokens
    )
    batch = settings.tokens_per_batch
    parts: list[Part] = [
        Texts(prompts=asked[i : i + size], tokens=settings.consistency_tokens)
        for i in range(0, len(asked), size)
    ]
    parts += [
        Entropies(prompts=told[i : i + size], tokens=settings.fluency_tokens)
        for i in range(0, len(told), size)
    ]
    parts += [
        Likelihoods(windows=tuple(windows[i : i + _WINDOWS_PER_PART]), tokens_per_batch=batch)
        for i in range(0, len(windows), _WINDOWS_PER_PART)
    ]
    if reference is None:
        return [*parts, *prediction_parts(requests, settings, elsewhere)]
    slices = reference.slices(_PROMPTS_PER_DRIFT)
    return [*parts, *(Shift(reference=each, tokens_per_batch=batch) for each in slices)]


# ----------------------------------------------------------------------------------- the results


@dataclass(frozen=True, kw_only=True, eq=False)
class SideEffects:
    """What was measured of a model beside its facts."""

    metrics: dict[str, float | None]
    """`fluency`, `perplexity`, `drift_kl` and `drift_top1`; None without anything to measure."""
    reference: DriftReference
    """For the measurement of the edited model, with the sample."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95% intervals of the metrics over facts (`fluency`), windows and prompts."""
    divergences: dict[str, float] = field(default_factory=dict)
    """KL(base ‖ model) of the next token after each drift prompt, in nats."""
    texts: dict[str, str] = field(default_factory=dict)
    """What the model writes on each generation prompt, with it."""


_Kind = TypeVar("_Kind")


def side_effects_of(
    parts: Sequence[Part],
    results: Sequence[Any],
    reference: DriftReference | None,
    sample: Sample | None = None,
) -> SideEffects:
    """Put what was measured of the parts together, in their order.

    Args:
        parts: What was measured.
        results: What came out of each.
        reference: That which the parts were made with.
        sample: That which they were made with.
    """

    def found(kind: type[Part]) -> list[Any]:
        pairs = zip(parts, results, strict=True)
        return [item for part, result in pairs if isinstance(part, kind) for item in result]

    entropies, likelihoods, shifts = found(Entropies), found(Likelihoods), found(Shift)
    moved = shifts
    if reference is None:
        reference = DriftReference.join(found(Predictions))
        moved = [(prompt, 0.0, True) for prompt in reference.prompts]
    if reference.sample is not sample:
        reference = replace(reference, sample=sample)
    divergences = {prompt: kl for prompt, kl, _ in moved}
    drift_kl, drift_top1 = drift_of([(kl, same) for _, kl, same in moved]) or (None, None)
    return SideEffects(
        metrics={
            "fluency": fmean(entropies) if entropies else None,
            "perplexity": perplexity_of(likelihoods),
            "drift_kl": drift_kl,
            "drift_top1": drift_top1,
        },
        reference=reference,
        intervals=_intervals(entropies, likelihoods, shifts),
        divergences=divergences,
        texts=dict(found(Texts)),
    )


def _intervals(
    entropies: Sequence[float],
    likelihoods: Sequence[tuple[float, int]],
    shifts: Sequence[tuple[str, float, bool]],
) -> dict[str, tuple[float, float]]:
    """Those that rest on enough (`ratio_interval`) and are finite, in the units of the metrics."""
    likelihood = ratio_interval([total for total, _ in likelihoods], [n for _, n in likelihoods])
    same = ratio_interval([same for _, _, same in shifts])
    found = {
        "fluency": ratio_interval(entropies),
        "perplexity": likelihood and (_exp(-likelihood[1]), _exp(-likelihood[0])),
        "drift_kl": ratio_interval([kl for _, kl, _ in shifts]),
        "drift_top1": same and (100 * same[0], 100 * same[1]),
    }
    return {name: pair for name, pair in found.items() if pair and all(map(math.isfinite, pair))}


def _exp(loss: float) -> float:
    return perplexity_of([(-loss, 1)]) or 0.0
