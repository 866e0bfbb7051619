"""The metrics: by hand on small examples, and against an obvious implementation on tiny models."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from memedit.architecture import architecture_of
from memedit.config import EvaluationSettings
from memedit.drift import DriftReference, measure_drift
from memedit.evaluate import (
    evaluation_of,
    measurable,
    says,
    score_facts,
    summarise,
    with_side_effects,
)
from memedit.free_text import Sample, ngram_entropy
from memedit.generate import greedy_continuations
from memedit.outcome import METRIC_KEYS, Evaluation, FactResult
from memedit.prompts import encode_completion
from memedit.requests import EditRequest, Neighbour
from tests.measured import measure_side_effects
from tests.tiny import tiny_model, tiny_tokenizer

SMALL = EvaluationSettings(fluency_facts=2, fluency_tokens=8)
FACTS = (
    EditRequest(
        case_id="tower",
        subject="Eiffel Tower",
        prompt="The {} is located in the city of",
        target_new="Rome",
        target_true="Paris",
        paraphrases=("You know the Eiffel Tower. It stands in", "The Eiffel Tower is in"),
        neighbourhood=(
            Neighbour(prompt="Big Ben is located in the city of", target="London"),
            Neighbour(prompt="The capital of France is", target="Paris"),
        ),
    ),
    EditRequest(
        case_id="apple",
        subject="Apple",
        prompt="{} was founded by",
        target_new="Marie Curie",
        target_true="Steve Jobs",
        neighbourhood=(
            Neighbour(prompt="Microsoft was founded by", target="Bill Gates"),
            Neighbour(prompt="Big Ben is located in the city of", target="London"),
        ),
    ),
    EditRequest(
        case_id="no-truth",
        subject="Toyota",
        prompt="{} produces cars in",
        target_new="Spain",
        paraphrases=("The cars of Toyota are made in",),
    ),
)


RICH = replace(
    FACTS[0],
    case_id="rich",
    attributes=("The Colosseum is located in the city of",),
    portability=(Neighbour(prompt="The Eiffel Tower is in the country of", target="Italy"),),
    generation_prompts=("The Eiffel Tower stands", "Near the Eiffel Tower"),
    references=("The Colosseum stands in Rome.", "Rome is the capital of Italy."),
    relation_id="P131",
)
"""With all that a data set may give for the evaluation."""


DRIFT = {"neighbourhood_kl", "drift_kl", "drift_top1"}


def evaluate(
    model: PreTrainedModel, requests: tuple[EditRequest, ...], **measured: Any
) -> tuple[Evaluation, DriftReference]:
    """All metrics of a tiny model, as the stage puts them together."""
    parts = model, tiny_tokenizer(), architecture_of(model.config), requests
    facts = score_facts(*parts, settings=measured["settings"])
    effects = measure_side_effects(*parts, **measured)
    completed = with_side_effects(facts, requests, effects)
    return evaluation_of(completed, effects.metrics, effects.intervals), effects.reference


def result(**changes: Any) -> FactResult:
    values: dict[str, Any] = dict(
        case_id="1",
        prompt="p",
        target_new="n",
        efficacy_exact=False,
        generation=False,
        continuation="",
        logprob_new=-1.0,
    )
    return FactResult(**(values | changes))


def test_what_can_be_measured_is_what_is_measured() -> None:
    model = tiny_model("llama")
    arch, tokenizer = architecture_of(model.config), tiny_tokenizer()
    bare = replace(FACTS[-1], case_id="bare", paraphrases=(), target_true=None)
    for requests in (FACTS, FACTS[-1:], (bare,), (bare, *FACTS[:1]), (RICH,), (bare, RICH)):
        for settings in (
            EvaluationSettings(consistency_tokens=4),
            EvaluationSettings(
                drift_prompts=0, fluency_facts=0, heldout_tokens=0, consistency_facts=0
            ),
        ):
            heldout = [[1, 5, 9, 3, 7]] if settings.heldout_tokens else []
            elsewhere = ["Kiel lies in"] if settings.heldout_tokens else []
            facts = score_facts(model, tokenizer, arch, requests, settings=settings)
            more: dict[str, Any] = {"heldout": heldout, "elsewhere": elsewhere}
            effects = measure_side_effects(
                model, tokenizer, arch, requests, settings=settings, **more
            )
            completed = with_side_effects(facts, requests, effects)
            metrics = evaluation_of(completed, effects.metrics, effects.intervals).metrics
            measured = {key for key, value in metrics.items() if value is not None}
            assert measurable(requests, settings) == measured


# --------------------------------------------------------------------------------------- by hand


def test_prompts_are_averaged_by_fact_then_facts() -> None:
    facts = [
        result(
            efficacy=True,
            efficacy_exact=True,
            paraphrase=(True, False, False, False),
            paraphrase_exact=(True, True, False, False),
            neighbourhood=(True, True),
            neighbourhood_exact=(False, True),
            generation=True,
        ),
        result(efficacy=False, paraphrase=(True,), paraphrase_exact=(True,)),
        result(paraphrase=(), neighbourhood=(False, True), neighbourhood_exact=(False, False)),
    ]
    metrics = summarise(facts)
    assert metrics["efficacy"] == pytest.approx(50)  # the third has nothing to compare with
    assert metrics["paraphrase"] == pytest.approx((25 + 100) / 2)
    assert metrics["neighbourhood"] == pytest.approx((100 + 50) / 2)
    assert metrics["efficacy_exact"] == pytest.approx(100 / 3)
    assert metrics["paraphrase_exact"] == pytest.approx((50 + 100) / 2)
    assert metrics["neighbourhood_exact"] == pytest.approx((50 + 0) / 2)
    assert metrics["generation"] == pytest.approx(100 / 3)
    assert metrics["score"] == pytest.approx(3 / (1 / 50 + 1 / 62.5 + 1 / 75))


def test_score_is_missing_with_a_part_and_zero_with_a_zero() -> None:
    whole = result(efficacy=True, paraphrase=(True,), neighbourhood=(True,))
    assert summarise([whole])["score"] == pytest.approx(100)
    assert summarise([replace(whole, paraphrase=())])["score"] is None
    assert summarise([replace(whole, efficacy=None)])["score"] is None
    assert summarise([replace(whole, neighbourhood=(False,))])["score"] == 0
    assert set(summarise([]).values()) == {None}


@pytest.mark.parametrize(
    ("continuation", "target", "expected"),
    [
        (" Rome, the capital", "Rome", True),
        (" the old city of ROME", "Rome", True),
        (" New\n  York City", "New York", True),
        (" Cafe\u0301 de Paris", "café", True),
        (" Ro me", "Rome", False),
        (" Romeo and Juliet", "Rome", False),
        (" Romeo went to Rome.", "Rome", True),
        (" Paris", "Rome", False),
        ("", "Rome", False),
    ],
)
def test_says(continuation: str, target: str, expected: bool) -> None:
    assert says(continuation, target) is expected


def test_ngram_entropy_by_hand() -> None:
    # a b a b a: bigrams ab ba ab ba -> 1 bit; trigrams aba bab aba -> H(2/3, 1/3)
    trigrams = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * trigrams) / 2)
    # Punctuation is a word of its own: four bigrams, three trigrams, all different.
    expected = (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2
    assert ngram_entropy("one, two three.".replace(".", "")) < expected
    assert ngram_entropy("one, two three.") == pytest.approx(expected)
    assert ngram_entropy("no no no no no no") == 0
    assert ngram_entropy("one") == ngram_entropy("") == 0


# ---------------------------------------------------------------------------------- tiny models


def plain_logprob(model: PreTrainedModel, prompt: str, target: str) -> tuple[float, bool]:
    prompt_ids, target_ids = encode_completion(tiny_tokenizer(), prompt, target)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt_ids + target_ids])).logits[0]
    logits = logits[len(prompt_ids) - 1 : -1]
    wanted = torch.tensor(target_ids)
    logprobs = logits.log_softmax(-1)[torch.arange(len(wanted)), wanted]
    return float(logprobs.mean()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox"])
def test_facts_equal_the_obvious_implementation(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    got = score_facts(model, tokenizer, architecture_of(model.config), FACTS)
    for fact, found in zip(FACTS, got, strict=True):

        def probability(prompt: str, target: str | None) -> float:
            assert target is not None
            return plain_logprob(model, prompt, target)[0]

        new, true, prompts = fact.target_new, fact.target_true, fact.paraphrases
        assert (found.case_id, found.prompt) == (fact.case_id, fact.text)
        assert found.logprob_new == pytest.approx(probability(fact.text, new), abs=1e-5)
        if true is None:
            assert found.efficacy is None and found.logprob_true is None
            assert found.paraphrase == ()
        else:
            assert found.efficacy == (probability(fact.text, new) > probability(fact.text, true))
            assert found.logprob_true == pytest.approx(probability(fact.text, true), abs=1e-5)
            assert found.paraphrase == tuple(
                probability(p, new) > probability(p, true) for p in prompts
            )
        assert found.neighbourhood == tuple(
            probability(n.prompt, n.target) > probability(n.prompt, new) for n in fact.neighbourhood
        )
        assert found.paraphrase_exact == tuple(plain_logprob(model, p, new)[1] for p in prompts)
        length = len(encode_completion(tokenizer, fact.text, new)[1]) + 5
        assert found.continuation == greedy_continuations(model, tokenizer, [fact.text], length)[0]


def test_facts_do_not_depend_on_each_other() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    arch = architecture_of(model.config)
    together = score_facts(model, tokenizer, arch, FACTS)
    portions = score_facts(
        model, tokenizer, arch, FACTS, settings=replace(SMALL, facts_per_portion=1)
    )
    backwards = score_facts(model, tokenizer, arch, FACTS[::-1])[::-1]
    for one, two, three in zip(together, portions, backwards, strict=True):
        assert one.logprob_new == pytest.approx(two.logprob_new, abs=1e-5)
        assert one.logprob_new == pytest.approx(three.logprob_new, abs=1e-5)
        plain = [replace(r, logprob_new=0.0, logprob_true=None) for r in (one, two, three)]
        assert plain[0] == plain[1] == plain[2]


def test_what_the_model_says_is_exact() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    fact, said = FACTS[0], "the"
    (token,) = encode_completion(tokenizer, fact.text, said)[1]
    with torch.no_grad():  # the head gives this word whatever the state
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
        model.lm_head.bias[token] = 1.0
    fact = replace(
        fact,
        target_new=said,
        paraphrases=(fact.text,),
        # The same object: nothing to compare, so it counts as kept while it is what is said.
        neighbourhood=(Neighbour(prompt=fact.text, target=said), *fact.neighbourhood[:1]),
    )
    found = score_facts(model, tokenizer, architecture_of(model.config), [fact])[0]
    assert found.efficacy_exact and found.efficacy and found.generation
    assert found.continuation == " the" * 6
    assert found.paraphrase_exact == (True,)
    assert found.neighbourhood == found.neighbourhood_exact == (True, False)


def test_an_evaluation_of_the_base_and_of_a_changed_model() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    heldout = [tokenizer(f.text)["input_ids"] for f in FACTS]
    before, reference = evaluate(model, FACTS, heldout=heldout, settings=SMALL)
    assert tuple(before.metrics) == METRIC_KEYS
    assert before.metrics["drift_kl"] == 0
    assert before.metrics["drift_top1"] == 100
    assert len(before.facts) == len(FACTS)

    same, _ = evaluate(model, FACTS, heldout=heldout, reference=reference, settings=SMALL)
    assert same.metrics == pytest.approx(before.metrics, abs=1e-5)

    changed = tiny_model("llama")
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight.mul_(-1)
    after, kept = evaluate(changed, FACTS, heldout=heldout, reference=reference, settings=SMALL)
    assert kept is reference
    # KL(base || changed), by hand, over those of the three neighbourhood prompts that are measured.
    near = dict.fromkeys(n.prompt for f in FACTS for n in f.neighbourhood)
    prompts = [p for p in near if hashlib.sha256(p.encode()).digest()[0] % 2]
    assert len(near) == 3 and prompts
    divergences, agreements = [], []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, -1].double().softmax(-1) for m in (model, changed))
        divergences.append(float((p * (p / q).log()).sum()))
        agreements.append(bool(p.argmax() == q.argmax()))
    assert after.metrics["drift_kl"] == pytest.approx(fmean(divergences), rel=1e-4)
    assert after.metrics["drift_top1"] == pytest.approx(100 * fmean(agreements))
    assert fmean(divergences) > 1e-3
    by_prompt = dict(zip(prompts, divergences, strict=True))
    for fact, judged in zip(FACTS, after.facts, strict=True):
        moved = [by_prompt[n.prompt] for n in fact.neighbourhood if n.prompt in by_prompt]
        assert judged.neighbourhood_kl == (pytest.approx(fmean(moved), rel=1e-4) if moved else None)
    per_fact = [f.neighbourhood_kl for f in after.facts if f.neighbourhood_kl is not None]
    assert after.metrics["neighbourhood_kl"] == pytest.approx(fmean(per_fact))
    low, high = after.intervals["neighbourhood_kl"]
    assert low <= fmean(per_fact) <= high
    assert after.metrics["perplexity"] != pytest.approx(before.metrics["perplexity"], rel=1e-3)


def test_what_was_not_asked_for_is_none() -> None:
    model = tiny_model("llama")
    settings = EvaluationSettings(fluency_facts=0, drift_prompts=0)
    evaluation, reference = evaluate(model, FACTS[:1], settings=settings)
    missing = {key for key, value in evaluation.metrics.items() if value is None}
    not_given = {"attribute", "portability", "consistency"}
    assert missing == {"fluency", "perplexity", *DRIFT, *not_given}
    assert measure_drift(model, architecture_of(model.config), reference) is None


def test_fluency_is_the_mean_entropy_of_prompt_and_continuation() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = [fact.text for fact in FACTS]
    texts = [prompt + greedy_continuations(model, tokenizer, [prompt], 20)[0] for prompt in prompts]
    settings = EvaluationSettings(fluency_tokens=20, drift_prompts=0)
    found = measure_side_effects(model, tokenizer, None, FACTS, settings=settings)
    expected = fmean(ngram_entropy(text) for text in texts)
    assert found.metrics["fluency"] == pytest.approx(expected)


def test_fluency_is_of_a_generation_prompt_where_a_fact_has_one() -> None:
    asked = replace(FACTS[0], generation_prompts=("Near the Eiffel Tower", "The Tower"))
    told = Sample.of([asked, *FACTS[1:]], SMALL).told
    assert told == ("Near the Eiffel Tower", FACTS[1].text)


# ----------------------------------------------------------------------------------- real model


@pytest.mark.slow
def test_the_real_model_knows_where_the_tower_stands(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    arch = architecture_of(model.config)
    true = EditRequest(
        case_id="tower",
        subject="Eiffel Tower",
        prompt="The {} is located in the city of",
        target_new="Paris",
        target_true="Rome",
        paraphrases=("The Eiffel Tower stands in the city of",),
        neighbourhood=(Neighbour(prompt="The Colosseum is located in the city of", target="Rome"),),
    )
    false = replace(true, case_id="false", target_new="Berlin", target_true="Paris")
    knows, does_not = score_facts(model, tokenizer, arch, [true, false])
    assert knows.efficacy and knows.efficacy_exact and knows.generation
    assert knows.continuation.startswith(" Paris")
    assert knows.paraphrase == knows.neighbourhood == (True,)
    assert not does_not.efficacy and not does_not.generation
    assert does_not.neighbourhood == (True,)


@pytest.mark.slow
def test_the_unedited_real_model_on_counterfact(smollm2: Path, shared_data: Path) -> None:
    """The base prefers few new objects, and the true ones of most neighbours."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with (shared_data / "counterfact-2000.jsonl").open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(30), strict=False)]
    facts = [
        EditRequest(
            case_id=str(row["case_id"]),
            subject=row["subject"],
            prompt=row["prompt"],
            target_new=row["target_new"],
            target_true=row["target_true"],
            paraphrases=tuple(row["paraphrases"]),
            neighbourhood=tuple(Neighbour(**n) for n in row["neighbourhood"]),
        )
        for row in rows
    ]
    metrics = summarise(score_facts(model, tokenizer, architecture_of(model.config), facts))
    unmeasured = {name for name, value in metrics.items() if value is None}
    assert unmeasured == {"attribute", "portability", "consistency", "neighbourhood_kl"}
    assert metrics["efficacy"] < 60 and metrics["paraphrase"] < 60
    assert 55 < metrics["neighbourhood"] < 90
    assert metrics["efficacy_exact"] <= 10 and metrics["generation"] <= 10
    assert metrics["neighbourhood_exact"] < metrics["neighbourhood"]
