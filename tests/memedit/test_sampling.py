"""Text sampled from the model: seeded, of the length that was asked for, and of no other effect."""

from __future__ import annotations

import pytest
import torch

from memedit.prompts import encode
from memedit.sampling import _continue, _TopKSampling, sample_contexts, sample_windows
from tests.tiny import BOS_ID, tiny_model, tiny_tokenizer

STARTS = ("The", "Therefore")
DRAWS = 20_000
CHI2_49 = 112.0
"""The chi-squared statistic of 49 degrees of freedom is larger once in a million samples."""


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


def chi2_of(drawn_N: torch.Tensor, logits_V: torch.Tensor) -> float:
    """Pearson's statistic of sampled ids against the softmax over the 50 best logits.

    Nothing else may be among them.
    """
    best = logits_V.double().topk(50)
    expected_K = best.values.softmax(0) * len(drawn_N)
    assert float(expected_K.min()) > 10  # the statistic's distribution holds for counts like that
    counts_K = drawn_N.bincount(minlength=len(logits_V))[best.indices].double()
    assert int(counts_K.sum()) == len(drawn_N)
    return float(((counts_K - expected_K) ** 2 / expected_K).sum())


def test_the_chance_of_a_token_is_the_model_s() -> None:
    """Cut to the 50 likeliest, row by row."""
    generator = torch.Generator().manual_seed(0)
    kinds_2V = torch.randn(2, 300, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        scores_BV = kinds_2V.repeat(DRAWS, 1)
        drawn_B = _TopKSampling()(torch.zeros(2 * DRAWS, 1).long(), scores_BV).argmax(1)
    for kind, logits_V in enumerate(kinds_2V):
        assert chi2_of(drawn_B[kind::2], logits_V) < CHI2_49
    assert chi2_of(drawn_B[::2], kinds_2V[0] * 0.9) > CHI2_49  # a tenth warmer would be noticed


def test_a_continuation_is_drawn_from_the_model() -> None:
    model = tiny_model("llama")
    prompt = [5, 99, 200]
    drawn = _continue(model, [prompt] * DRAWS, 1, seed=0)
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    assert all(row[:-1] == prompt for row in drawn)
    assert chi2_of(torch.tensor([row[-1] for row in drawn]), logits_V) < CHI2_49


def test_every_token_of_a_window_is_among_the_likeliest_there() -> None:
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
