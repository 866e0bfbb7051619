"""How well the facts went in, and what else moved.

Two halves. `score_facts` judges each fact by itself and can therefore be spread over workers;
`summarise` turns the judgements into the paper's numbers. `measure_side_effects` measures the model
as a whole: fluency, perplexity on held-out text, and the drift of the next-token distribution on
prompts of facts that were not edited. `memedit.stages.judge` does both.

Knows facts and metrics. Does not know how forward passes are batched (`memedit.scoring`,
`memedit.generate`), how drift is measured (`memedit.side_effects`) or how results are shown.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import fmean, harmonic_mean
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memedit.architecture import Architecture
from memedit.config import EvaluationSettings
from memedit.generate import greedy_continuations
from memedit.intervals import FACT_VALUES, SCORED, intervals_of
from memedit.outcome import METRIC_KEYS, Evaluation, FactResult
from memedit.prompts import encode_completion
from memedit.requests import EditRequest, whole_word
from memedit.scoring import Completion, CompletionScore, perplexity, score_completions
from memedit.side_effects import (
    DriftReference,
    drift_contexts,
    drift_reference,
    fluency,
    measure_drift,
)

SideEffect = Literal["drift", "fluency", "perplexity"]
SIDE_EFFECTS: tuple[SideEffect, ...] = ("drift", "fluency", "perplexity")

GENERATION_EXTRA_TOKENS = 5
"""How many tokens beyond the length of the new object a continuation may take to say it."""


def evaluation_of(facts: Sequence[FactResult], measures: Mapping[str, float | None]) -> Evaluation:
    """Judgements of facts and measures of the whole model, in one order of metrics."""
    metrics = {**summarise(facts), **measures}
    return Evaluation(
        metrics={key: metrics.get(key) for key in METRIC_KEYS},
        intervals=intervals_of(facts),
        facts=tuple(facts),
    )


def leave_out(evaluation: Evaluation, case_ids: Collection[str]) -> Evaluation:
    """An evaluation without some of its facts; what was measured of the whole model stays."""
    facts = [fact for fact in evaluation.facts if fact.case_id not in case_ids]
    judged = summarise(facts).keys()
    return evaluation_of(facts, {k: v for k, v in evaluation.metrics.items() if k not in judged})


# ------------------------------------------------------------------------------------- the facts


def score_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arch: Architecture | None,
    requests: Sequence[EditRequest],
    *,
    settings: EvaluationSettings | None = None,
) -> tuple[FactResult, ...]:
    """Judge each fact, in the order given; a result depends on its own fact only.

    Args:
        model: In eval mode; not changed.
        tokenizer: The model's.
        arch: The model's architecture; None for a family that cannot be edited.
        requests: The facts.
        settings: How many are scored together.

    Raises:
        NumericalError: The model gives NaN or an infinity.
    """
    settings = settings or EvaluationSettings()
    results: list[FactResult] = []
    for first in range(0, len(requests), settings.facts_per_portion):
        portion = requests[first : first + settings.facts_per_portion]
        results += _score_portion(model, tokenizer, arch, portion, settings.tokens_per_batch)
    return tuple(results)


def _score_portion(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arch: Architecture | None,
    requests: Sequence[EditRequest],
    tokens_per_batch: int | None,
) -> list[FactResult]:
    completions: dict[tuple[str, str], Completion] = {}
    for prompt, target in (pair for request in requests for pair in _questions(request)):
        if (prompt, target) not in completions:
            prompt_ids, target_ids = encode_completion(tokenizer, prompt, target)
            completions[prompt, target] = Completion(
                prompt_ids=tuple(prompt_ids), target_ids=tuple(target_ids)
            )
    values = score_completions(
        model, arch, list(completions.values()), tokens_per_batch=tokens_per_batch
    )
    scores = dict(zip(completions, values, strict=True))
    continuations = greedy_continuations(
        model,
        tokenizer,
        [request.text for request in requests],
        [
            len(completions[request.text, request.target_new].target_ids) + GENERATION_EXTRA_TOKENS
            for request in requests
        ],
    )
    return [
        _judge(request, scores, continuation)
        for request, continuation in zip(requests, continuations, strict=True)
    ]


def _questions(request: EditRequest) -> Iterator[tuple[str, str]]:
    """Every (prompt, target) whose probability the metrics of a fact need."""
    for prompt in (request.text, *request.paraphrases):
        yield prompt, request.target_new
        if request.target_true is not None:
            yield prompt, request.target_true
    for neighbour in request.neighbourhood:
        yield neighbour.prompt, neighbour.target
        yield neighbour.prompt, request.target_new


def _judge(
    request: EditRequest, scores: dict[tuple[str, str], CompletionScore], continuation: str
) -> FactResult:
    new, true = request.target_new, request.target_true

    def rewritten(prompt: str) -> bool:
        assert true is not None
        return scores[prompt, new].logprob > scores[prompt, true].logprob

    def kept(prompt: str, target: str) -> bool:
        if target == new:  # nothing to compare: the neighbour's answer is the new object
            return scores[prompt, target].exact
        return scores[prompt, target].logprob > scores[prompt, new].logprob

    paraphrases, neighbours = request.paraphrases, request.neighbourhood
    return FactResult(
        case_id=request.case_id,
        prompt=request.text,
        target_new=new,
        target_true=true,
        efficacy=None if true is None else rewritten(request.text),
        efficacy_exact=scores[request.text, new].exact,
        paraphrase=() if true is None else tuple(rewritten(p) for p in paraphrases),
        paraphrase_exact=tuple(scores[p, new].exact for p in paraphrases),
        neighbourhood=tuple(kept(n.prompt, n.target) for n in neighbours),
        neighbourhood_exact=tuple(scores[n.prompt, n.target].exact for n in neighbours),
        generation=says(continuation, new),
        continuation=continuation,
        logprob_new=scores[request.text, new].logprob,
        logprob_true=None if true is None else scores[request.text, true].logprob,
    )


def says(continuation: str, target: str) -> bool:
    """Whether a continuation contains a target as whole words.

    Case, white space and Unicode form do not count; "Romeo" does not say "Rome".
    """

    def plain(text: str) -> str:
        return " ".join(unicodedata.normalize("NFC", text).casefold().split())

    text, wanted = plain(continuation), plain(target)
    found = [m.start() for m in re.finditer(re.escape(wanted), text)]
    return any(whole_word(text, start, start + len(wanted)) for start in found)


def summarise(facts: Sequence[FactResult]) -> dict[str, float | None]:
    """The metrics of a batch of facts, in percent; None where no fact has anything to measure.

    As in the reference (`experiments/summarize.py`), the prompts of a fact are averaged first, then
    the facts, so a fact with many paraphrases does not count more than one with a single one. Facts
    without such a prompt, or without a `target_true` to compare with, are left out of that mean.
    `score` is the harmonic mean of efficacy, paraphrase and neighbourhood: 0 if one of them is 0,
    None if one is missing.
    """
    metrics: dict[str, float | None] = {}
    for name, value_of in FACT_VALUES.items():
        values = [value for fact in facts if not math.isnan(value := value_of(fact))]
        metrics[name] = 100 * fmean(values) if values else None
    parts = [metrics[key] for key in SCORED]
    known = [part for part in parts if part is not None]
    metrics["score"] = harmonic_mean(known) if len(known) == len(parts) else None
    return metrics


# ---------------------------------------------------------------------------------- side effects


def measure_side_effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arch: Architecture | None,
    requests: Sequence[EditRequest],
    *,
    heldout: Sequence[Sequence[int]] | None = None,
    reference: DriftReference | None = None,
    settings: EvaluationSettings | None = None,
    measures: Collection[SideEffect] = SIDE_EFFECTS,
) -> tuple[dict[str, float | None], DriftReference | None]:
    """`fluency`, `perplexity`, `drift_kl` and `drift_top1`; None where there is nothing to measure.

    Args:
        model: In eval mode; not changed.
        tokenizer: The model's.
        arch: The model's architecture; None for a family that cannot be edited.
        requests: The facts.
        heldout: Token ids of documents for the perplexity; None leaves it out.
        reference: The base's distributions, from the measurement of the unedited model; None makes
            this model the base, whose drift is 0 by definition.
        settings: How much is measured.
        measures: What is measured.

    Returns:
        The metrics, and the reference to pass to the measurement of the edited model (None where
        drift is not among the measures).

    Raises:
        NumericalError: The model gives NaN or an infinity.
    """
    settings = settings or EvaluationSettings()
    batch = settings.tokens_per_batch
    metrics: dict[str, float | None] = {}
    if "drift" in measures:
        if reference is None:
            contexts = drift_contexts(tokenizer, requests, settings.drift_prompts)
            reference = drift_reference(model, arch, contexts, tokens_per_batch=batch)
            drift: tuple[float, float] | None = (0.0, 100.0) if contexts else None
        else:
            drift = measure_drift(model, arch, reference, tokens_per_batch=batch)
        metrics["drift_kl"], metrics["drift_top1"] = drift or (None, None)
    if "fluency" in measures:
        told = [request.text for request in requests[: settings.fluency_facts]]
        metrics["fluency"] = fluency(model, tokenizer, told, max_new_tokens=settings.fluency_tokens)
    if "perplexity" in measures:
        metrics["perplexity"] = perplexity(
            model,
            arch,
            heldout or (),
            window=settings.heldout_window,
            max_tokens=settings.heldout_tokens,
            tokens_per_batch=batch,
        )
    return metrics, reference


def measurable(requests: Sequence[EditRequest], settings: EvaluationSettings) -> frozenset[str]:
    """The metrics for which a batch of facts holds what they are measured on."""
    compared = [r for r in requests if r.target_true is not None]
    neighbours = any(r.neighbourhood for r in requests)
    parts = {
        "efficacy": bool(compared),
        "paraphrase": any(r.paraphrases for r in compared),
        "neighbourhood": neighbours,
    }
    found = parts | {
        "score": all(parts.values()),
        "efficacy_exact": bool(requests),
        "paraphrase_exact": any(r.paraphrases for r in requests),
        "neighbourhood_exact": neighbours,
        "generation": bool(requests),
        "fluency": settings.fluency_facts > 0,
        "perplexity": settings.heldout_tokens > 1,
    }
    edited = {text for r in requests for text in (r.text, *r.paraphrases)}
    others = any(n.prompt not in edited for r in requests for n in r.neighbourhood)
    found |= dict.fromkeys(("drift_kl", "drift_top1"), others and settings.drift_prompts > 0)
    return frozenset(name for name, there in found.items() if there)
