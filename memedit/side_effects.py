"""What an edit does to the rest of the model: drift of its predictions, and of its fluency.

Drift is measured on prompts of facts that were not edited, against the distributions that the base
gave there. Knows prompts, log-probabilities and text. Does not know whether a fact went in
(`memedit.evaluate`); the perplexity of held-out text is in `memedit.scoring`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memedit.architecture import Architecture
from memedit.generate import greedy_continuations
from memedit.prompts import encode
from memedit.requests import EditRequest
from memedit.scoring import Ids, next_token_logprobs


@dataclass(frozen=True, kw_only=True, eq=False)
class DriftReference:
    """The base's next-token distribution after some prompts: `logprobs_NV`, float32, on the CPU."""

    contexts: tuple[Ids, ...]
    logprobs_NV: Tensor


def fluency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 50,
) -> float | None:
    """Mean n-gram entropy, in bits, of prompts with their greedy continuations; None without any.

    The reference samples (top-k 5) up to 100 tokens from prompts of its own and prints 100 times
    the mean. Greedy text repeats itself sooner, so these numbers are lower than published ones:
    compare before with after, not with papers.
    """
    continuations = greedy_continuations(model, tokenizer, prompts, max_new_tokens)
    entropies = [ngram_entropy(p + c) for p, c in zip(prompts, continuations, strict=True)]
    return fmean(entropies) if entropies else None


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


def drift_contexts(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], limit: int
) -> list[Ids]:
    """Token ids of unique neighbourhood prompts, evenly spread over the facts, at most `limit`.

    A neighbour's prompt that another fact of the batch edits is left out.
    """
    edited = {text for request in requests for text in (request.text, *request.paraphrases)}
    prompts = list(dict.fromkeys(n.prompt for r in requests for n in r.neighbourhood))
    prompts = [prompt for prompt in prompts if prompt not in edited]
    if len(prompts) > limit:
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    return list(dict.fromkeys(tuple(encode(tokenizer, prompt)) for prompt in prompts))


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


def measure_drift(
    model: PreTrainedModel,
    arch: Architecture | None,
    reference: DriftReference,
    *,
    tokens_per_batch: int | None = None,
) -> tuple[float, float] | None:
    """How far the next-token distribution moved from the base's, over the reference's contexts.

    Returns:
        Mean KL(base ‖ model) = Σ p_base (log p_base - log p_model), in nats, and the share of equal
        argmax, in percent; None without a context.
    """
    divergences: list[float] = []
    agreements: list[bool] = []
    for places, logprobs_QV in next_token_logprobs(
        model, arch, reference.contexts, tokens_per_batch=tokens_per_batch
    ):
        base_QV = reference.logprobs_NV[places].to(logprobs_QV.device)
        kl_Q = torch.nn.functional.kl_div(
            logprobs_QV, base_QV, reduction="none", log_target=True
        ).sum(-1)
        divergences += kl_Q.tolist()
        agreements += (logprobs_QV.argmax(-1) == base_QV.argmax(-1)).tolist()
    if not divergences:
        return None
    return math.fsum(divergences) / len(divergences), 100 * fmean(agreements)
