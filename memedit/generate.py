"""What a model says: greedy continuations of many prompts at once.

Batches are padded on the left, with an attention mask and the positions that follow from it, so a
prompt's continuation does not depend on its neighbours. Knows texts in and texts out; does not know
facts or metrics (`memedit.evaluate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from memedit.errors import InputError, NumericalError
from memedit.model import positions_of
from memedit.prompts import encode

# Any token: what is padded is masked, or behind the end of a text.
_PAD = 0
# Keys and values of every token stay in memory: about 1 MB a token for a 6B model in float32.
_TOKENS_PER_BATCH_CPU, _TOKENS_PER_BATCH_GPU = 2048, 8192


@torch.inference_mode()
def greedy_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int | Sequence[int],
    *,
    tokens_per_batch: int | None = None,
) -> list[str]:
    """Continue each prompt with the most probable token at each step, until the end of the text.

    A continuation also ends where the model reads no further; after a prompt that leaves no
    position it is empty.

    Plain greedy: repetition penalties and the like in the model's own generation config are not
    applied. Deterministic on one machine.

    Args:
        model: On any device; its generation config says which token ends a text.
        tokenizer: Need not have a padding token.
        prompts: Texts; the tokenizer adds its BOS where it has one.
        max_new_tokens: For all prompts, or one number for each.
        tokens_per_batch: Rows times columns of one batch; None for what suits the device.

    Returns:
        For each prompt the text that follows it, with its leading space; special tokens left out.

    Raises:
        InputError: A prompt without a token.
        NumericalError: The model gives NaN or an infinity.
    """
    lengths: list[int] = (
        [max_new_tokens for _ in prompts]
        if isinstance(max_new_tokens, int)
        else list(max_new_tokens)
    )
    if len(lengths) != len(prompts):
        raise ValueError(f"{len(lengths)} lengths for {len(prompts)} prompts")
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise InputError(f"the prompt {prompt!r} has no token", field="prompt")
    positions = positions_of(model.config)
    lengths = [int(min(n, positions - len(ids))) for n, ids in zip(lengths, encoded, strict=True)]
    ends = _end_ids(model)
    limit = tokens_per_batch or default_tokens_per_batch(model.device)

    new_ids: list[list[int]] = [[] for _ in prompts]
    for batch in _batches(encoded, lengths, limit, positions):
        width = max(len(encoded[i]) for i in batch)
        padding = [width - len(encoded[i]) for i in batch]
        ids_BT = [[_PAD] * p + encoded[i] for p, i in zip(padding, batch, strict=True)]
        mask_BT = [[0] * p + [1] * (width - p) for p in padding]
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids_BT, device=model.device),
            attention_mask=torch.tensor(mask_BT, device=model.device),
            generation_config=_greedy(max(lengths[i] for i in batch), sorted(ends)),
            logits_processor=LogitsProcessorList([_Finite()]),
        )
        for i, row in zip(batch, output[:, width:].tolist(), strict=True):
            row = row[: lengths[i]]
            end = next((j for j, token in enumerate(row) if token in ends), len(row))
            new_ids[i] = row[:end]
    return [
        _continuation(tokenizer, prompt_ids, ids)
        for prompt_ids, ids in zip(encoded, new_ids, strict=True)
    ]


class _Finite(LogitsProcessor):
    """Ends the work at the first NaN, which would be taken for the most probable token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [B, V] as they are."""
        # A maximum carries a NaN through; a token that can never come is rightly -inf.
        if not scores.amax(-1).isfinite().all():
            raise NumericalError("the model's logits are not finite numbers")
        return scores


def default_tokens_per_batch(device: torch.device) -> int:
    """Rows times columns of one batch where the settings leave it open."""
    return _TOKENS_PER_BATCH_CPU if device.type == "cpu" else _TOKENS_PER_BATCH_GPU


def _end_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that end a text: an id, a list of them, or nothing in the generation config."""
    config: Any = model.generation_config
    ends = None if config is None else config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def _greedy(max_new_tokens: int, ends: list[int]) -> GenerationConfig:
    # What is left unset would be filled from the model's own generation config.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=_PAD,
        use_cache=True,
    )


def _batches(
    encoded: Sequence[Sequence[int]], lengths: Sequence[int], tokens: int, positions: float
) -> Iterator[list[int]]:
    """Prompts to be continued, by rising length, in batches within `tokens` (padded).

    All rows of a batch take as many steps as its longest continuation: its width, steps included,
    stays within `positions` too.
    """
    batch: list[int] = []
    steps = 0
    for i in sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), lengths[i])):
        if lengths[i] < 1:
            continue
        longest = max(steps, lengths[i])
        width = len(encoded[i]) + longest
        if batch and ((len(batch) + 1) * width > tokens or width > positions):
            yield batch
            batch, longest = [], lengths[i]
        batch.append(i)
        steps = longest
    if batch:
        yield batch


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], new_ids: list[int]
) -> str:
    # Decoded together with the prompt, because SentencePiece-like tokenizers drop the space in
    # front of a text that is decoded alone.
    def text(ids: list[int]) -> str:
        return str(
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    prompt, whole = text(prompt_ids), text(prompt_ids + new_ids)
    return whole[len(prompt) :] if whole.startswith(prompt) else text(new_ids)
