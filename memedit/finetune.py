"""Fine-tuning of one rewrite weight with weight decay (FT-W), the baseline of the papers.

Knows the model and encoded facts. The update is a dense change of one weight, so that it is
applied, published and judged as that of any method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from memedit.architecture import Architecture
from memedit.config import FineTuneSettings
from memedit.errors import InputError, NumericalError
from memedit.prompts import EncodedRequest
from memedit.segments import Rows, device_of, head_positions, run
from memedit.solve import Update


def fine_tune(
    model: PreTrainedModel,
    arch: Architecture,
    requests: Sequence[EncodedRequest],
    *,
    layer: int,
    settings: FineTuneSettings,
) -> Iterator[Update | None]:
    """Minimise mean −log P(target | prompt) over the bare prompts by Adam on one weight.

    As the reference does (`baselines/ft`): each step goes through all facts in batches, a batch
    whose loss is below the threshold makes no update, and it ends once their mean is below it. The
    decay pulls towards zero, not towards the base. Yields None after each step, as a sign of life,
    and the update at the end.

    Args:
        model: In evaluation mode, float32; its weights are the same afterwards.
        arch: Where the model keeps things.
        requests: Encoded facts.
        layer: The layer whose rewrite weight is tuned.
        settings: See `FineTuneSettings`.

    Raises:
        InputError: The model does not compute in float32, in which alone such small steps add up.
        NumericalError: The loss is not finite.
    """
    weight = arch.rewrite_module(model, layer).weight
    assert isinstance(weight, torch.nn.Parameter)
    if weight.dtype != torch.float32:
        raise InputError(f"fine-tuning computes in float32, not {weight.dtype}", field="dtype")
    before = weight.detach().clone()
    facts, random = list(requests), Random(settings.seed)
    optimiser = torch.optim.Adam([weight], lr=settings.lr, weight_decay=settings.weight_decay)
    try:
        with _only_gradient(model, weight), torch.enable_grad():
            for _ in range(settings.steps):
                random.shuffle(facts)
                total = 0.0
                for start in range(0, len(facts), settings.batch):
                    batch = facts[start : start + settings.batch]
                    loss = _loss(model, arch, batch)
                    value = loss.item()
                    if not math.isfinite(value):
                        raise NumericalError(f"the loss of fine-tuning layer {layer} is {value}")
                    total += value * len(batch)
                    if value >= settings.loss_threshold:
                        optimiser.zero_grad()
                        loss.backward()
                        optimiser.step()
                yield None
                if total / len(facts) < settings.loss_threshold:
                    break
        delta_OI = arch.oriented(weight.detach().double() - before.double())
    finally:
        weight.grad = None
        weight.data.copy_(before)
    yield Update(layer=layer, left_NO=delta_OI.T.contiguous().cpu(), right_NI=None)


def _loss(model: PreTrainedModel, arch: Architecture, requests: Sequence[EncodedRequest]) -> Tensor:
    """Mean over facts of the mean −log P over a target's tokens."""
    texts, reads = [], []
    for row, request in enumerate(requests):
        prompt, target = request.contexts[0].ids, request.target_ids
        texts.append([*prompt, *target[:-1]])
        weight = 1 / (len(requests) * len(target))
        reads += [(row, len(prompt) - 1 + i, token, weight) for i, token in enumerate(target)]
    rows, cols, tokens, weights = zip(*reads, strict=True)
    device = device_of(model)
    places = torch.tensor(rows, device=device), torch.tensor(cols, device=device)
    with head_positions(arch.head(model), *places):
        logits_QV = run(model, Rows.of(texts, device=device))[0].float()
    nll_Q = F.cross_entropy(
        logits_QV, torch.tensor(tokens, device=logits_QV.device), reduction="none"
    )
    return (nll_Q * torch.tensor(weights, device=nll_Q.device)).sum()


@contextmanager
def _only_gradient(model: PreTrainedModel, weight: torch.nn.Parameter) -> Iterator[None]:
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in wanted:
        parameter.requires_grad_(parameter is weight)
    try:
        yield
    finally:
        for parameter, was in wanted.items():
            parameter.requires_grad_(was)
