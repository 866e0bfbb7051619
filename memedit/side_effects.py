"""What an edit does to the rest of the model: drift, fluency, perplexity, free text.

Each is cut into parts that any worker can do on its model, by prompts or windows, so that a part
depends on the input only and not on the workers (`side_effect_parts`); `side_effects_of` puts the
results together. Drift is measured on prompts of facts that were not edited, against the
distributions that the base gave there. Knows prompts, log-probabilities and text. Does not know
whether a fact went in (`memedit.evaluate`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memedit.architecture import Architecture
from memedit.config import EvaluationSettings
from memedit.consistency import inverse_document_frequency
from memedit.generate import greedy_continuations
from memedit.intervals import ratio_interval
from memedit.prompts import encode
from memedit.protection import neighbours_of
from memedit.requests import EditRequest
from memedit.scoring import (
    Ids,
    heldout_windows,
    log_likelihoods,
    next_token_logprobs,
    perplexity_of,
)

# Free text is made many prompts at once; single ones would take almost as long as all together.
_PROMPTS_PER_TEXTS, _PROMPTS_PER_DRIFT, _WINDOWS_PER_PART = 32, 50, 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Which facts a model is to write free text about.

    Chosen once for all models that are compared: on other facts the text would be another, whatever
    an edit did.
    """

    told: tuple[str, ...] = ()
    """The prompts of the facts that `fluency` is measured on."""
    asked: tuple[str, ...] = ()
    """The generation prompts of those that `consistency` is."""
    case_ids: frozenset[str] = frozenset()
    """Those."""
    idf: Mapping[str, float] = field(default_factory=dict)
    """How telling each word of their references is."""

    @classmethod
    def of(cls, requests: Sequence[EditRequest], settings: EvaluationSettings) -> Sample:
        """The first facts that have what is needed."""
        known = consistency_sample(requests, settings)
        references = dict.fromkeys(text for request in known for text in request.references)
        return cls(
            told=tuple(request.text for request in requests[: settings.fluency_facts]),
            asked=tuple(dict.fromkeys(p for r in known for p in r.generation_prompts)),
            case_ids=frozenset(request.case_id for request in known),
            idf=inverse_document_frequency(references),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class DriftReference:
    """The base's next-token distribution after some prompts: `logprobs_NV`, float32, on the CPU."""

    contexts: tuple[Ids, ...]
    logprobs_NV: Tensor
    prompts: tuple[str, ...] = ()
    """The texts of the contexts, where they are known."""
    sample: Sample | None = None
    """What the base was asked to write about, if it was."""

    def slices(self, size: int) -> list[DriftReference]:
        """The same in pieces of so many contexts, none of which holds on to the others."""
        return [
            DriftReference(
                contexts=self.contexts[start : start + size],
                logprobs_NV=self.logprobs_NV[start : start + size].clone(),
                prompts=self.prompts[start : start + size],
            )
            for start in range(0, len(self.contexts), size)
        ]

    @classmethod
    def join(cls, parts: Sequence[DriftReference]) -> DriftReference:
        """One of several, in their order; without contexts where there is none."""
        logprobs = [part.logprobs_NV for part in parts] or [torch.empty(0, 0)]
        return cls(
            contexts=tuple(context for part in parts for context in part.contexts),
            logprobs_NV=torch.cat(logprobs),
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
        )


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
    """The parts that give a base's distributions.

    `elsewhere` are prompts in place of the facts' neighbourhood prompts, where they have none.
    """
    limit, size = settings.drift_prompts, _PROMPTS_PER_DRIFT
    prompts = drift_prompts(requests, limit) or elsewhere[:limit]
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
        elsewhere: Prompts for the drift where the facts bring none.
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


def consistency_sample(
    requests: Sequence[EditRequest], settings: EvaluationSettings
) -> list[EditRequest]:
    """The first facts that have what `consistency` is measured on."""
    known = [r for r in requests if r.generation_prompts and r.references]
    return known[: settings.consistency_facts]


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
    drift_kl, drift_top1 = _drift([(kl, same) for _, kl, same in moved]) or (None, None)
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
    """Those that rest on more than one item and are finite, in the units of the metrics."""
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


# --------------------------------------------------------------------------------- the equations


def ngram_entropy(text: str) -> float:
    """Weighted entropy of the bigrams and trigrams of words in a text, in bits.

    `(2/3 · H_2 + 4/3 · H_3) / 2` with `H_n = -Σ f log2 f` over the frequencies f of n-grams, as the
    reference's `compute_n_gram_entropy`; words and punctuation are split by a pattern here, by
    NLTK there. 0 where the text is too short for an n-gram.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()
        size = sum(counts)
        total += weight * -math.fsum(c / size * math.log2(c / size) for c in counts)
    return total / 2


def drift_prompts(requests: Sequence[EditRequest], limit: int) -> list[str]:
    """Unique neighbourhood prompts, evenly spread over the facts, at most `limit`.

    Of those that no fact of the batch edits, and that no method protects.
    """
    prompts = neighbours_of(requests).measured
    if len(prompts) > limit:
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    return prompts


def drift_reference(
    model: PreTrainedModel,
    arch: Architecture | None,
    contexts: Sequence[Ids],
    *,
    tokens_per_batch: int | None = None,
) -> DriftReference:
    """Record a base model's next-token distribution after each context."""
    logprobs_NV = torch.empty(0, 0)
    for places, logprobs_QV in next_token_logprobs(
        model, arch, contexts, tokens_per_batch=tokens_per_batch
    ):
        if not logprobs_NV.numel():
            logprobs_NV = torch.empty(len(contexts), logprobs_QV.shape[-1])
        logprobs_NV[places] = logprobs_QV.cpu()
    return DriftReference(contexts=tuple(contexts), logprobs_NV=logprobs_NV)


def divergences(
    model: PreTrainedModel,
    arch: Architecture | None,
    reference: DriftReference,
    *,
    tokens_per_batch: int | None = None,
) -> list[tuple[float, bool]]:
    """How far the next-token distribution moved from the base's after each context.

    Returns:
        KL(base ‖ model) = Σ p_base (log p_base - log p_model), in nats, and whether the argmax is
        the same.
    """
    found: list[tuple[float, bool]] = [(0.0, True)] * len(reference.contexts)
    for places, logprobs_QV in next_token_logprobs(
        model, arch, reference.contexts, tokens_per_batch=tokens_per_batch
    ):
        base_QV = reference.logprobs_NV[places].to(logprobs_QV.device)
        kl_Q = torch.nn.functional.kl_div(
            logprobs_QV, base_QV, reduction="none", log_target=True
        ).sum(-1)
        same_Q = logprobs_QV.argmax(-1) == base_QV.argmax(-1)
        for place, kl, same in zip(places, kl_Q.tolist(), same_Q.tolist(), strict=True):
            found[place] = kl, same
    return found


def measure_drift(
    model: PreTrainedModel,
    arch: Architecture | None,
    reference: DriftReference,
    *,
    tokens_per_batch: int | None = None,
) -> tuple[float, float] | None:
    """Mean KL(base ‖ model), in nats, and the share of equal argmax, in percent.

    None without a context.
    """
    return _drift(divergences(model, arch, reference, tokens_per_batch=tokens_per_batch))


def _drift(moved: Sequence[tuple[float, bool]]) -> tuple[float, float] | None:
    if not moved:
        return None
    return math.fsum(kl for kl, _ in moved) / len(moved), 100 * fmean(same for _, same in moved)
