"""Drift: how far an edit moves what a model says next about facts that were not edited.

Measured against the distributions that the base gave. They are recorded once; the record also keeps
which facts free text was written about (`memedit.free_text`), so that later texts are about the
same. Knows prompts and log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memedit.architecture import Architecture
from memedit.free_text import Sample
from memedit.protection import neighbours_of
from memedit.requests import EditRequest
from memedit.scoring import Ids, next_token_logprobs


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


def drift_prompts(
    requests: Sequence[EditRequest], limit: int, elsewhere: Sequence[str] = ()
) -> list[str]:
    """What drift is measured on: at most `limit` prompts that no method protects.

    Unique neighbourhood prompts that none of the facts edits, evenly spread over the facts; where
    there is none, `elsewhere`.
    """
    prompts = neighbours_of(requests).measured or list(elsewhere[:limit])
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
    """The mean of `divergences`; see `drift_of`."""
    return drift_of(divergences(model, arch, reference, tokens_per_batch=tokens_per_batch))


def drift_of(moved: Sequence[tuple[float, bool]]) -> tuple[float, float] | None:
    """Mean KL(base ‖ model), in nats, and the share of equal argmax, in percent, of `divergences`.

    None without a context.
    """
    if not moved:
        return None
    return math.fsum(kl for kl, _ in moved) / len(moved), 100 * fmean(same for _, same in moved)
