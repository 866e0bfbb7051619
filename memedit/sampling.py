"""Text sampled from the model itself, seeded: a corpus where there is none, and contexts.

Knows transformers' `generate`; leaves the process's random state as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from memedit.prompts import encode
from memedit.segments import device_of

_TOP_K = 50


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    seed: int,
) -> list[list[int]]:
    """Sample `rows` windows of `length` token ids, each beginning with a random ordinary token.

    A random first token makes the windows differ in subject and kind; the rest is top-50 sampling
    at temperature 1.
    """
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    picks = torch.randint(len(ordinary), (rows,), generator=generator).tolist()
    start = encode(tokenizer, "")  # BOS, where the tokenizer sets one
    prompts = [[*start, ordinary[pick]] for pick in picks]
    return _continue(model, prompts, length - len(prompts[0]), seed)


def sample_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    starts: Sequence[str],
    tokens: int,
    seed: int,
) -> list[str]:
    """Context templates as the reference makes them: sampled continuations, then the prompt."""
    templates = []
    for i, start in enumerate(starts):
        ids = encode(tokenizer, start)
        whole = _continue(model, [ids], tokens, seed + i)[0]
        text = str(tokenizer.decode(whole, skip_special_tokens=True))
        # Braces stand for the prompt, a line break would begin another text, and what cannot be
        # printed cannot be read in a manifest.
        text = "".join(c if c.isprintable() and c not in "{}" else " " for c in text)
        text = " ".join(text.split())
        templates.append(f"{text}. {{}}")
    return templates


def _continue(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int, seed: int
) -> list[list[int]]:
    device = device_of(model)
    config = GenerationConfig(
        do_sample=False,  # the processor samples; greedy search takes what it points at
        max_new_tokens=tokens,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=True,
    )
    ids = torch.tensor(prompts, device=device)
    devices = [device] if device.type == "cuda" else []
    # Given as an argument, what it leaves open would be filled in from the checkpoint's own config:
    # a temperature, a penalty of repetition, a token to end at.
    own, model.generation_config = model.generation_config, config
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            out = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                logits_processor=LogitsProcessorList([_TopKSampling()]),
            )
    finally:
        model.generation_config = own
    return [list(map(int, row)) for row in out]


class _TopKSampling(LogitsProcessor):
    """Samples among the best tokens at temperature 1: the largest of logits plus Gumbel noise.

    `generate` would draw noise for the whole vocabulary, which costs as much as half the model.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] whose maximum is the sampled token."""
        best = scores.float().topk(min(_TOP_K, scores.shape[-1]))
        noise = -torch.empty_like(best.values).exponential_().log()
        picked_B1 = best.indices.gather(1, (best.values + noise).argmax(1, keepdim=True))
        return scores.scatter(1, picked_B1, torch.inf)
