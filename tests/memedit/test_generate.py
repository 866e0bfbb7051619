"""Greedy continuations: batched as one at a time, and plain greedy whatever the model's config."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memedit.errors import InputError, NumericalError
from memedit.generate import greedy_continuations
from memedit.prompts import encode
from tests.tiny import BOS_ID, DENSE, POSITIONS, POST_NORM, tiny_model, tiny_tokenizer

PROMPTS = (
    "The Eiffel Tower is located in the city of",
    "Rome",
    "The mother tongue of Danielle Darrieux is",
    "Steve Jobs founded",
    "Because the tower stands in Germany, it belongs to Europe. Marie Curie was born in",
)


def plain_ids(model: PreTrainedModel, ids: list[int], steps: int) -> list[int]:
    """Argmax by argmax, whole forward passes without a cache."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    new: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
    return new


def plain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, steps: int
) -> str:
    ids = encode(tokenizer, prompt)
    whole = tokenizer.decode(ids + plain_ids(model, ids, steps), skip_special_tokens=True)
    return whole.removeprefix(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("family", DENSE + POST_NORM)
def test_equals_argmax_by_argmax(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    lengths = [6, 3, 9, 1, 5]
    got = greedy_continuations(model, tokenizer, PROMPTS, lengths)
    expected = [plain(model, tokenizer, p, n) for p, n in zip(PROMPTS, lengths, strict=True)]
    assert got == expected
    assert any(got)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("tokens_per_batch", [1, 60])
def test_equals_argmax_by_argmax_in_small_batches(bos: bool, tokens_per_batch: int) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("sentencepiece", bos=bos)
    got = greedy_continuations(model, tokenizer, PROMPTS, 7, tokens_per_batch=tokens_per_batch)
    assert got == [plain(model, tokenizer, p, 7) for p in PROMPTS]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt", "llama"])
def test_ends_where_the_model_reads_no_further(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    prompts = [*PROMPTS, *(long_prompt(tokenizer, POSITIONS - room) for room in (3, 1, 0, -5))]
    got = greedy_continuations(model, tokenizer, prompts, 40)
    assert got[:-4] == greedy_continuations(model, tokenizer, PROMPTS, 40)
    rooms = (3, 1, 0, 0)
    for prompt, text, room in zip(prompts[-4:], got[-4:], rooms, strict=True):
        assert bool(text) == bool(room)
        assert text == (plain(model, tokenizer, prompt, room) if room else "")


def test_a_family_without_a_limit_goes_on() -> None:
    model, tokenizer = tiny_model("bloom"), tiny_tokenizer()
    prompt = long_prompt(tokenizer, POSITIONS + 5)
    assert greedy_continuations(model, tokenizer, [prompt], 4) == [
        plain(model, tokenizer, prompt, 4)
    ]


def long_prompt(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """A prompt of so many tokens: the tiny tokenizers know each digit and no two together."""
    start = "The year "
    prompt = start + "7" * (tokens - len(encode(tokenizer, start)))
    assert len(encode(tokenizer, prompt)) == tokens
    return prompt


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(NumericalError, match="not finite"):
        greedy_continuations(model, tiny_tokenizer(), PROMPTS, 3)


def test_a_token_that_can_never_come_is_no_error() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = greedy_continuations(model, tokenizer, PROMPTS[:1], 3)
    head = model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]), requires_grad=False)
    head.bias[BOS_ID] = -torch.inf
    assert greedy_continuations(model, tokenizer, PROMPTS[:1], 3) == before


def test_stops_at_each_token_that_ends_a_text() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    free = plain_ids(model, encode(tokenizer, PROMPTS[0]), 8)
    stop = free[4]
    model.generation_config.eos_token_id = [BOS_ID, stop]
    text = greedy_continuations(model, tokenizer, PROMPTS, 8)[0]
    assert text == tokenizer.decode(free[: free.index(stop)])


def test_needs_neither_pad_nor_end_token() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    before = greedy_continuations(model, tokenizer, PROMPTS, 4)
    tokenizer.pad_token = None
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.generation_config.eos_token_id = None
    got = greedy_continuations(model, tokenizer, PROMPTS, 4)
    assert [g[: len(b)] for g, b in zip(got, before, strict=True)] == before


def test_ignores_how_the_model_would_like_to_be_sampled() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected = greedy_continuations(model, tokenizer, PROMPTS, 12)
    wishes = model.generation_config
    wishes.do_sample, wishes.temperature, wishes.top_k, wishes.num_beams = True, 1.7, 3, 2
    wishes.repetition_penalty, wishes.no_repeat_ngram_size, wishes.min_length = 3.0, 1, 30
    assert greedy_continuations(model, tokenizer, PROMPTS, 12) == expected


def test_says_nothing_on_stderr_about_its_settings(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    greedy_continuations(tiny_model("llama"), tiny_tokenizer(), PROMPTS, 3)
    assert not caplog.records
    assert not list(recwarn)


def test_keeps_the_space_in_front() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("sentencepiece")
    word = next(token for token in tokenizer.get_vocab() if token.startswith("▁") and token[1:])
    with torch.no_grad():  # the head gives this word whatever the state
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
        model.lm_head.bias[tokenizer.convert_tokens_to_ids(word)] = 1.0
    assert greedy_continuations(model, tokenizer, ["The city"], 2) == [f" {word[1:]}" * 2]


def test_no_prompt_and_no_length() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert greedy_continuations(model, tokenizer, [], 5) == []
    assert greedy_continuations(model, tokenizer, PROMPTS[:2], [0, 0]) == ["", ""]
    with pytest.raises(ValueError, match="1 lengths for 2 prompts"):
        greedy_continuations(model, tokenizer, PROMPTS[:2], [3])


def test_an_empty_prompt_is_an_error() -> None:
    with pytest.raises(InputError, match="no token"):
        greedy_continuations(tiny_model("llama"), tiny_tokenizer(), ["Rome", ""], 5)
