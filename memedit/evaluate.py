"""How well the facts went in, and what else moved.

Two halves. `score_facts` judges each fact by itself and can therefore be spread over workers;
`summarise` turns the judgements into the paper's numbers. `memedit.side_effects` measures the model
as a whole, and `with_side_effects` tells what of it concerns single facts. `memedit.stages.judge`
does both on any workers.

Knows facts and metrics. Does not know how forward passes are batched (`memedit.scoring`,
`memedit.generate`), how a side effect is measured (`memedit.side_effects`) or how results are
shown.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, harmonic_mean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memedit.architecture import Architecture
from memedit.config import EvaluationSettings
from memedit.drift import drift_prompts
from memedit.free_text import Sample, consistency_sample, tfidf_cosine
from memedit.generate import greedy_continuations
from memedit.intervals import FACT_VALUES, SCORED, intervals_of, scale_of
from memedit.outcome import METRIC_KEYS, Evaluation, FactResult
from memedit.prompts import encode_completion
from memedit.requests import EditRequest, whole_word
from memedit.scoring import Completion, CompletionScore, score_completions
from memedit.side_effects import SideEffects

GENERATION_EXTRA_TOKENS = 5
"""How many tokens beyond the length of the new object a continuation may take to say it."""


def evaluation_of(
    facts: Sequence[FactResult],
    measures: Mapping[str, float | None],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Evaluation:
    """Judgements of facts and measures of the whole model with theirs, in one order of metrics."""
    metrics = {**summarise(facts), **measures}
    return Evaluation(
        metrics={key: metrics.get(key) for key in METRIC_KEYS},
        intervals={**intervals_of(facts), **(intervals or {})},
        facts=tuple(facts),
    )


def leave_out(evaluation: Evaluation, case_ids: Collection[str]) -> Evaluation:
    """An evaluation without some of its facts; what was measured of the whole model stays."""
    facts = [fact for fact in evaluation.facts if fact.case_id not in case_ids]
    judged = summarise(facts).keys()
    return evaluation_of(
        facts,
        {name: value for name, value in evaluation.metrics.items() if name not in judged},
        {name: pair for name, pair in evaluation.intervals.items() if name not in judged},
    )


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
    for prompt, target in (pair for request in requests for pair in questions(request)):
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


def questions(request: EditRequest) -> Iterator[tuple[str, str]]:
    """Every (prompt, target) whose probability the metrics of a fact need."""
    new, true = request.target_new, request.target_true
    compared = (new,) if true is None else (new, true)
    for prompt in (request.text, *request.paraphrases):
        yield from ((prompt, target) for target in compared)
    for neighbour in request.neighbourhood:
        yield from ((neighbour.prompt, target) for target in (neighbour.target, new))
    if true is not None:
        for prompt in request.attributes:
            yield from ((prompt, target) for target in compared)
    for implied in request.portability:
        yield implied.prompt, implied.target


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
        relation=request.relation,
        prompt=request.text,
        target_new=new,
        target_true=true,
        efficacy=None if true is None else rewritten(request.text),
        efficacy_exact=scores[request.text, new].exact,
        paraphrase=() if true is None else tuple(rewritten(p) for p in paraphrases),
        paraphrase_exact=tuple(scores[p, new].exact for p in paraphrases),
        neighbourhood=tuple(kept(n.prompt, n.target) for n in neighbours),
        neighbourhood_exact=tuple(scores[n.prompt, n.target].exact for n in neighbours),
        efficacy_accuracy=scores[request.text, new].accuracy,
        paraphrase_accuracy=tuple(scores[p, new].accuracy for p in paraphrases),
        neighbourhood_accuracy=tuple(scores[n.prompt, n.target].accuracy for n in neighbours),
        attribute=() if true is None else tuple(rewritten(p) for p in request.attributes),
        portability=tuple(scores[p.prompt, p.target].accuracy for p in request.portability),
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
        metrics[name] = scale_of(name) * fmean(values) if values else None
    parts = [metrics[key] for key in SCORED]
    known = [part for part in parts if part is not None]
    metrics["score"] = harmonic_mean(known) if len(known) == len(parts) else None
    return metrics


# ---------------------------------------------------------------------------------- side effects


def with_side_effects(
    facts: Sequence[FactResult], requests: Sequence[EditRequest], effects: SideEffects
) -> list[FactResult]:
    """The judgements with what side effects say of single facts.

    `neighbourhood_kl` is the mean KL(base ‖ model) of the next token over those of a fact's
    neighbourhood prompts that drift was measured on. `consistency` is the TF-IDF cosine of what
    the model writes on all its generation prompts with all its references, as in the reference
    code, with the inverse document frequencies of the sampled facts' references.
    """
    sample = effects.reference.sample or Sample()

    def completed(fact: FactResult, request: EditRequest) -> FactResult:
        near = [effects.divergences.get(n.prompt) for n in request.neighbourhood]
        moved = [kl for kl in near if kl is not None]
        asked = request.generation_prompts if request.case_id in sample.case_ids else ()
        texts = tuple(effects.texts[prompt] for prompt in asked)
        return replace(
            fact,
            neighbourhood_kl=fmean(moved) if moved else None,
            texts=texts,
            consistency=tfidf_cosine(" ".join(texts), " ".join(request.references), sample.idf)
            if texts
            else None,
        )

    return [completed(*pair) for pair in zip(facts, requests, strict=True)]


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
        "efficacy_accuracy": bool(requests),
        "paraphrase_accuracy": any(r.paraphrases for r in requests),
        "neighbourhood_accuracy": neighbours,
        "attribute": any(r.attributes for r in compared),
        "portability": any(r.portability for r in requests),
        "generation": bool(requests),
        "consistency": bool(consistency_sample(requests, settings)),
        "fluency": settings.fluency_facts > 0,
        "perplexity": settings.heldout_tokens > 1,
    }
    near = bool(drift_prompts(requests, settings.drift_prompts))
    # Without such neighbours on the facts' prompts with other names, if held-out text has some.
    drift = near or bool(settings.drift_prompts and settings.heldout_tokens)
    found |= {"neighbourhood_kl": near, "drift_kl": drift, "drift_top1": drift}
    return frozenset(name for name, there in found.items() if there)
