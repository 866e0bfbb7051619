"""The batched engine against one plain forward pass per completion."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import PreTrainedModel

from memedit.architecture import architecture_of
from memedit.errors import InputError, NumericalError
from memedit.scoring import (
    Completion,
    CompletionScore,
    heldout_windows,
    log_likelihoods,
    next_token_logprobs,
    perplexity_of,
    plan_rows,
    score_completions,
)
from tests.tiny import DENSE, MOE, POST_NORM, VOCAB, tiny_model


def plain_score(model: PreTrainedModel, completion: Completion) -> CompletionScore:
    prompt, target = list(completion.prompt_ids), list(completion.target_ids)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0].double()
    total, hits = 0.0, 0
    for j, token in enumerate(target):
        row = logits[len(prompt) + j - 1]
        total += float(torch.log_softmax(row, 0)[token])
        hits += int(row.argmax()) == token
    return CompletionScore(logprob=total / len(target), accuracy=hits / len(target))


def completions(model: PreTrainedModel, seed: int = 0) -> list[Completion]:
    """Random ones: prompts of many lengths, some shared, some a prefix of another, some said."""
    rng = random.Random(seed)
    prompts = [tuple(rng.choices(range(3, VOCAB), k=rng.randint(1, 24))) for _ in range(5)]
    prompts += [prompts[0], prompts[1][:1], prompts[2] + prompts[3]]
    found = [
        Completion(prompt_ids=prompt, target_ids=tuple(rng.choices(range(3, VOCAB), k=size)))
        for prompt in prompts
        for size in (1, 1, 3)
    ]
    for prompt in prompts[:3]:  # what the model would say itself
        ids = list(prompt)
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            found.append(Completion(prompt_ids=prompt, target_ids=tuple(ids[len(prompt) :])))
        found.append(Completion(prompt_ids=prompt, target_ids=(ids[len(prompt)], 3)))
    return found


@pytest.mark.parametrize("family", DENSE + POST_NORM + MOE)
def test_equals_one_plain_forward_pass_per_completion(family: str) -> None:
    model = tiny_model(family)
    asked = completions(model)
    arch = architecture_of(model.config) if family in DENSE else None
    got = score_completions(model, arch, asked)
    expected = [plain_score(model, completion) for completion in asked]
    assert [s.logprob for s in got] == pytest.approx([s.logprob for s in expected], abs=2e-5)
    assert [s.accuracy for s in got] == [s.accuracy for s in expected]
    assert {s.exact for s in expected} == {True, False}
    assert any(0 < s.accuracy < 1 for s in expected)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_does_not_depend_on_the_batch(tokens_per_batch: int) -> None:
    model = tiny_model("llama")
    arch = architecture_of(model.config)
    asked = completions(model)
    whole = score_completions(model, arch, asked)
    shuffled = random.Random(1).sample(range(len(asked)), len(asked))
    got = score_completions(
        model, arch, [asked[i] for i in shuffled], tokens_per_batch=tokens_per_batch
    )
    assert [s.logprob for s in got] == pytest.approx([whole[i].logprob for i in shuffled], abs=1e-5)
    assert [s.exact for s in got] == [whole[i].exact for i in shuffled]


def test_a_limit_on_logits_splits_batches_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    arch = architecture_of(model.config)
    asked = completions(model)
    whole = score_completions(model, arch, asked)
    monkeypatch.setattr("memedit.scoring._LOGITS_BYTES_CPU", 4 * VOCAB * 5)
    monkeypatch.setattr("memedit.scoring._CHUNK_BYTES", 4 * VOCAB * 2)
    contexts = list(dict.fromkeys(c.prompt_ids for c in asked))
    chunks = [len(places) for places, _ in next_token_logprobs(model, arch, contexts)]
    assert sum(chunks) == len(contexts)
    assert max(chunks) == 2
    got = score_completions(model, arch, asked)
    assert [s.logprob for s in got] == pytest.approx([s.logprob for s in whole], abs=1e-5)


def test_bfloat16_model_is_scored_in_float32() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    arch = architecture_of(model.config)
    for _, logprobs_QV in next_token_logprobs(model, arch, [(3, 4, 5), (6, 7)]):
        assert logprobs_QV.dtype == torch.float32
        torch.testing.assert_close(logprobs_QV.exp().sum(-1), torch.ones(2))


def test_rows_are_shared() -> None:
    contexts = [(1, 2), (1, 2, 3), (5,), (1, 2, 4), (1, 2), (1,)]
    plan = plan_rows(contexts)
    assert sorted(plan.rows) == [(1, 2, 3), (1, 2, 4), (5,)]
    for context, (row, col) in zip(contexts, plan.places, strict=True):
        assert plan.rows[row][: col + 1] == context


def test_rows_of_random_contexts_are_the_fewest() -> None:
    rng = random.Random(0)
    contexts = [tuple(rng.choices((0, 1), k=rng.randint(1, 6))) for _ in range(60)]
    plan = plan_rows(contexts)
    maximal = {c for c in contexts if not any(d != c and d[: len(c)] == c for d in contexts)}
    assert sorted(plan.rows) == sorted(maximal)
    for context, (row, col) in zip(contexts, plan.places, strict=True):
        assert plan.rows[row][: col + 1] == context


def test_perplexity_equals_the_plain_one_over_windows() -> None:
    model = tiny_model("gpt2")
    rng = random.Random(0)
    documents = [rng.choices(range(3, VOCAB), k=size) for size in (50, 17, 1, 40)]
    # 90 tokens in windows of 16: 50 = 16+16+16+2, 17 = 16+1, 1, and 22 of 40 = 16+6
    windows = [documents[0][i : i + 16] for i in range(0, 50, 16)]
    windows += [documents[1][:16], documents[3][:16], documents[3][16:22]]
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0, :-1]
        total += float(
            torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum")
        )
        count += len(window) - 1
    assert heldout_windows(documents, window=16, max_tokens=90) == [tuple(w) for w in windows]
    got = perplexity_of(
        log_likelihoods(model, architecture_of(model.config), [tuple(w) for w in windows])
    )
    assert got == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_of_nothing_is_none() -> None:
    assert heldout_windows([[], [7]]) == []
    assert perplexity_of([]) is None


def test_a_model_of_nan_is_an_error() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        score_completions(
            model,
            architecture_of(model.config),
            [Completion(prompt_ids=(3, 4), target_ids=(5,))],
        )


@pytest.mark.parametrize(
    ("prompt", "target", "field"), [((), (1,), "prompt"), ((1,), (), "target")]
)
def test_an_empty_side_is_an_error(
    prompt: tuple[int, ...], target: tuple[int, ...], field: str
) -> None:
    with pytest.raises(InputError) as error:
        Completion(prompt_ids=prompt, target_ids=target)
    assert error.value.field == field
