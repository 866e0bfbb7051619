"""Text sampled from the model: seeded, of the length that was asked for, and of no other effect."""

from __future__ import annotations

import pytest
import torch

from memedit.prompts import encode
from memedit.sampling import sample_contexts, sample_windows
from tests.tiny import BOS_ID, tiny_model, tiny_tokenizer

STARTS = ("The", "Therefore")


@pytest.mark.parametrize("bos", [False, True])
def test_windows_have_one_length_and_begin_as_texts_do(bos: bool) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=bos)
    windows = sample_windows(model, tokenizer, rows=12, length=16, seed=0)
    assert [len(window) for window in windows] == [16] * 12
    assert all((window[0] == BOS_ID) == bos for window in windows)
    first = [window[1 if bos else 0] for window in windows]
    assert not set(first) & set(tokenizer.all_special_ids)
    assert len(set(first)) > 6
    assert all(0 <= token < len(tokenizer) for window in windows for token in window)


def test_windows_are_seeded() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    state = torch.random.get_rng_state()
    made = [sample_windows(model, tokenizer, rows=4, length=8, seed=s) for s in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_model_s_own_settings_of_sampling_do_not_count() -> None:
    """A checkpoint may set a temperature or an end token, which text to count must not have."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected = sample_windows(model, tokenizer, rows=4, length=8, seed=0)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = list(range(300))
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.temperature = 0.01
    assert sample_windows(model, tokenizer, rows=4, length=8, seed=0) == expected


def test_windows_are_drawn_from_the_model() -> None:
    """The chance of a token is the model's, cut to the 50 likeliest."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    windows = sample_windows(model, tokenizer, rows=32, length=6, seed=3)
    with torch.no_grad():
        logits_BTV = model(input_ids=torch.tensor(windows)).logits
    likeliest_BTK = logits_BTV[:, :-1].topk(50).indices
    following_BT1 = torch.tensor(windows)[:, 1:, None]
    assert bool((likeliest_BTK == following_BT1).any(-1).all())


def test_contexts_are_templates() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    made = sample_contexts(model, tokenizer, starts=STARTS, tokens=8, seed=0)
    for template, start in zip(made, STARTS, strict=True):
        assert template.startswith(start) and template.endswith(". {}")
        assert template.count("{") == template.count("}") == 1
        assert "\n" not in template and template.isprintable()
        assert len(encode(tokenizer, template)) > len(encode(tokenizer, start + ". {}"))


def test_contexts_are_seeded_and_differ() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    starts = ("The", "The")
    made = [sample_contexts(model, tokenizer, starts=starts, tokens=8, seed=s) for s in (0, 0, 7)]
    assert made[0] == made[1] != made[2]
    assert made[0][0] != made[0][1]
