"""How many operations a stage needs, from the shapes alone; padding and attention scores excluded.

A product of [m, k] and [k, n] is 2·m·k·n operations. What a stage does beyond this count is waste,
so operations per second against the machine's matrix rate shows how far it is from its limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from memedit.model import LoadedModel
from memedit.prompts import EncodedRequest


def block_weights(loaded: LoadedModel) -> list[int]:
    """Elements of the weight matrices of each block."""
    return [
        sum(p.numel() for p in block.parameters() if p.ndim == 2)
        for block in loaded.arch.blocks(loaded.model)
    ]


def moment_operations(loaded: LoadedModel, layers: Sequence[int], *, tokens: int) -> float:
    """One forward pass to the last rewrite module, and a symmetric product of each layer's keys."""
    weights, last = block_weights(loaded), max(layers)
    rewrite = _elements(loaded.arch.rewrite_module(loaded.model, last))
    inputs = loaded.arch.input_width(loaded.model)
    forward = 2 * (sum(weights[: last + 1]) - rewrite)
    return float(tokens * (forward + len(layers) * inputs**2))


def target_operations(
    loaded: LoadedModel, layer: int, facts: Iterable[tuple[EncodedRequest, int]]
) -> float:
    """The steps of the z of facts, each with its number of forward passes.

    Each step: forward and backward (twice the operations, as weights need no gradient) through the
    blocks above `layer` on the tokens from the subject's last one on, and the head at the positions
    read. What runs once before the steps is left out: the count is a lower bound.
    """
    above = sum(block_weights(loaded)[layer + 1 :])
    head = _elements(loaded.arch.head(loaded.model))
    total = 0.0
    for request, passes in facts:
        texts, target = request.contexts, len(request.target_ids)
        after = sum(len(t.ids) - t.subject_last + target - 1 for t in texts) + 1
        reads = len(texts) * target + 1
        total += passes * 4 * (after * above + reads * head)
    return total


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)
