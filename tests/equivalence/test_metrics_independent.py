"""The metrics against other ways to compute them: other libraries, other formulas, plain loops.

Nothing here shares code with `memedit` but the tokenisation of prompts and targets. The model is a
tiny one whose head leans towards some tokens, so that a fact can be said, half said, or not at all.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memedit.architecture import architecture_of
from memedit.config import EvaluationSettings
from memedit.drift import DriftReference
from memedit.evaluate import (
    evaluation_of,
    score_facts,
    summarise,
    with_side_effects,
)
from memedit.free_text import inverse_document_frequency, ngram_entropy, tfidf_cosine
from memedit.generate import greedy_continuations
from memedit.intervals import intervals_of
from memedit.outcome import Evaluation, FactResult
from memedit.prompts import encode_completion
from memedit.requests import EditRequest, Neighbour
from memedit.scoring import Completion, score_completions
from memedit.side_effects import Entropies, Likelihoods, Part, Shift, side_effects_of
from tests.measured import measure_side_effects
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CITIES = ("Rome", "Paris", "London", "Berlin", "Warsaw")
SUBJECTS = ("Eiffel Tower", "Big Ben", "Colosseum", "Toyota", "Danielle Darrieux", "Microsoft")
FACTS = [
    EditRequest(
        case_id=str(i),
        subject=subject,
        prompt="The {} is located in the city of" if i % 2 else "You know the {}. It stands in",
        target_new=CITIES[i % 5],
        target_true=CITIES[(i + 2) % 5],
        paraphrases=(f"Where is {subject}? In", f"I think that {subject} is in")[: 1 + i % 2],
        neighbourhood=tuple(
            Neighbour(prompt=f"The {other} is located in the city of", target=CITIES[(i + k) % 5])
            for k, other in enumerate(SUBJECTS)
            if other != subject and k < 4
        ),
        attributes=(f"{SUBJECTS[i - 1]} belongs to", f"The capital is {SUBJECTS[i - 2]} of"),
        portability=(Neighbour(prompt=f"{subject} is in the country of", target="Italy"),),
        generation_prompts=(f"{subject} stands", f"Near {subject} there is"),
        references=(f"The tower of {CITIES[i % 5]} stands in Rome.", "It belongs to Europe."),
    )
    for i, subject in enumerate(SUBJECTS)
]
SETTINGS = EvaluationSettings(
    fluency_facts=3, fluency_tokens=12, consistency_tokens=8, heldout_window=16, heldout_tokens=90
)
HELDOUT = [list(range(3 + k, 60 + k, 2)) for k in range(3)]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return leaning(tiny_model(request.param))


def leaning(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a head that prefers the cities' tokens somewhat."""
    head = model.get_output_embeddings()
    bias = torch.zeros(VOCAB)
    for city in CITIES:
        for n, token in enumerate(encode_completion(TOKENIZER, "It is in", city)[1]):
            bias[token] += 2.0 if n else 4.0
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def judged(model: PreTrainedModel, base: PreTrainedModel | None = None) -> Evaluation:
    """All metrics as memedit gives them."""
    parts = TOKENIZER, architecture_of(model.config), FACTS
    reference = None
    if base is not None:
        reference = measure_side_effects(base, *parts, settings=SETTINGS).reference
    facts = score_facts(model, *parts, settings=SETTINGS)
    effects = measure_side_effects(
        model, *parts, heldout=HELDOUT, reference=reference, settings=SETTINGS
    )
    return evaluation_of(
        with_side_effects(facts, FACTS, effects), effects.metrics, effects.intervals
    )


def full_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double()


# ------------------------------------------------------------------------------ log-likelihoods


def harness_loglikelihood(
    model: PreTrainedModel, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    """As lm-evaluation-harness: all logits, log_softmax, the last positions, gather, sum."""
    whole = context + continuation
    logprobs_TV = torch.nn.functional.log_softmax(full_logits(model, whole[:-1]), dim=-1)
    logprobs_SV = logprobs_TV[len(whole) - 1 - len(continuation) :]
    tokens_S1 = torch.tensor(continuation).unsqueeze(-1)
    greedy = bool((logprobs_SV.argmax(-1, keepdim=True) == tokens_S1).all())
    return float(logprobs_SV.gather(-1, tokens_S1).sum()), greedy


def asked(prompt: str, target: str) -> tuple[list[int], list[int]]:
    return encode_completion(TOKENIZER, prompt, target)


def test_log_likelihoods_are_those_of_the_harness(model: PreTrainedModel) -> None:
    pairs = [asked(f.text, city) for f in FACTS for city in CITIES]
    completions = [Completion(prompt_ids=tuple(p), target_ids=tuple(t)) for p, t in pairs]
    found = score_completions(model, architecture_of(model.config), completions)
    expected = [harness_loglikelihood(model, *pair) for pair in pairs]
    sums = [s.logprob * len(c.target_ids) for s, c in zip(found, completions, strict=True)]
    assert sums == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [s.exact for s in found] == [greedy for _, greedy in expected]
    assert {len(c.target_ids) for c in completions} >= {1, 3}


# ------------------------------------------------------------------- the paper's probability tests


def reference_nll(model: PreTrainedModel, prompt: str, target: str) -> float:
    """The mean -log P per target token, as the reference's `test_batch_prediction`."""
    prompt_ids, target_ids = asked(prompt, target)
    logits = full_logits(model, prompt_ids + target_ids)
    total = 0.0
    for j, token in enumerate(target_ids):
        row = logits[len(prompt_ids) + j - 1].numpy()
        total += float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])
    return total / len(target_ids)


def test_the_papers_metrics_are_those_of_plain_loops(model: PreTrainedModel) -> None:
    metrics = judged(model).metrics
    sums: dict[str, list[float]] = {"efficacy": [], "paraphrase": [], "neighbourhood": []}
    attribute = []
    for fact in FACTS:
        new, true = fact.target_new, str(fact.target_true)

        def wins(prompt: str, one: str, other: str) -> bool:
            return reference_nll(model, prompt, one) < reference_nll(model, prompt, other)

        sums["efficacy"].append(wins(fact.text, new, true))
        sums["paraphrase"].append(np.mean([wins(p, new, true) for p in fact.paraphrases]))
        kept = [
            wins(n.prompt, n.target, new)
            for n in fact.neighbourhood
            if n.target != new  # nothing to compare; memedit then asks for the argmax
        ]
        same = [
            harness_loglikelihood(model, *asked(n.prompt, n.target))[1]
            for n in fact.neighbourhood
            if n.target == new
        ]
        sums["neighbourhood"].append(np.mean([*kept, *same]))
        attribute.append(np.mean([wins(p, new, true) for p in fact.attributes]))
    expected = {name: 100 * float(np.mean(values)) for name, values in sums.items()}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
        assert 0 < value < 100, name
    assert metrics["score"] == pytest.approx(harmonic_mean(expected.values()))
    assert metrics["attribute"] == pytest.approx(100 * float(np.mean(attribute)))


# ----------------------------------------------------------------------------- zsRE's accuracies


def teacher_forced(model: PreTrainedModel, prompt: str, target: str) -> float:
    """As the reference's zsRE evaluation: one prompt for each target token, the argmax after it."""
    prompt_ids, target_ids = asked(prompt, target)
    hits = [
        int(full_logits(model, prompt_ids + target_ids[:i])[-1].argmax()) == token
        for i, token in enumerate(target_ids)
    ]
    return float(np.mean(hits))


def test_accuracies_are_those_of_one_prompt_a_token(model: PreTrainedModel) -> None:
    found = judged(model)
    values: dict[str, list[float]] = {}
    for fact in FACTS:
        new = fact.target_new
        rows = {
            "efficacy_accuracy": [(fact.text, new)],
            "paraphrase_accuracy": [(p, new) for p in fact.paraphrases],
            "neighbourhood_accuracy": [(n.prompt, n.target) for n in fact.neighbourhood],
            "portability": [(p.prompt, p.target) for p in fact.portability],
        }
        for name, pairs in rows.items():
            shares = [teacher_forced(model, prompt, target) for prompt, target in pairs]
            values.setdefault(name, []).append(float(np.mean(shares)))
    for name, per_fact in values.items():
        assert found.metrics[name] == pytest.approx(100 * np.mean(per_fact)), name
    said = [v for name in values for v in values[name]]
    assert any(0 < v < 1 for v in said), "no token is said: nothing was compared"
    exact = [f.efficacy_exact for f in found.facts]
    assert exact == [v == 1 for v in values["efficacy_accuracy"]]


# ------------------------------------------------------------------------------------- free text


def test_generation_is_a_plain_loop_without_a_cache(model: PreTrainedModel) -> None:
    prompts = [prompt for fact in FACTS for prompt in fact.generation_prompts]
    got = greedy_continuations(model, TOKENIZER, prompts, 6)
    ends = {model.generation_config.eos_token_id}
    for prompt, text in zip(prompts, got, strict=True):
        ids = list(TOKENIZER(prompt)["input_ids"])
        new: list[int] = []
        while len(new) < 6:
            token = int(full_logits(model, ids + new)[-1].argmax())
            if token in ends:
                break
            new.append(token)
        whole, start = TOKENIZER.decode(ids + new), TOKENIZER.decode(ids)
        assert text == whole[len(start) :]


@pytest.mark.parametrize(
    "text", ["a b a b a c a b", "Rome is in Italy, and Italy is in Europe.", "no no no no", "one"]
)
def test_entropy_of_n_grams_by_numpy(text: str) -> None:
    words = text.replace(",", " ,").replace(".", " .").split()
    bigrams = [" ".join(pair) for pair in pairwise(words)]
    trigrams = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]

    def entropy(grams: list[str]) -> float:
        _, counts = np.unique(np.array(grams), return_counts=True)
        frequencies = counts / counts.sum()
        return float(-(frequencies * np.log(frequencies)).sum() / np.log(2))

    parts = [entropy(grams) if grams else 0.0 for grams in (bigrams, trigrams)]
    assert ngram_entropy(text) == pytest.approx(np.mean(np.array(parts) * [2 / 3, 4 / 3]))


def sklearn_cosine(one: str, other: str, corpus: list[str]) -> float:
    """By the formulas of scikit-learn's `TfidfVectorizer`, with dense vectors.

    smooth_idf: ln((1 + n) / (1 + df)) + 1; rows of tf · idf, divided by their Euclidean norm.
    """
    documents = [
        [w for w in "".join(c if c.isalnum() or c == "_" else " " for c in d.lower()).split()]
        for d in (*corpus, one, other)
    ]
    documents = [[w for w in words if len(w) > 1] for words in documents]
    fitted, asked_for = documents[: len(corpus)], documents[len(corpus) :]
    vocabulary = sorted({w for words in fitted for w in words})
    counts_DV = np.array([[words.count(v) for v in vocabulary] for words in fitted])
    idf_V = np.log((1 + len(corpus)) / (1 + (counts_DV > 0).sum(0))) + 1
    rows_2V = np.array([[words.count(v) for v in vocabulary] for words in asked_for]) * idf_V
    rows_2V = rows_2V / np.linalg.norm(rows_2V, axis=1, keepdims=True)
    return float(rows_2V[0] @ rows_2V[1])


def test_cosine_of_tf_idf_by_the_formulas_of_scikit_learn() -> None:
    corpus = ["Rome is the capital of Italy.", "The capital of France is Paris.", "A tower, a city"]
    idf = inverse_document_frequency(corpus)
    for one, other in (
        ("The tower of Paris, Paris!", "Paris is a city of France"),
        ("rome ROME Rome", "Rome is the capital of Italy."),
        ("An unknown word of Italy", "the the the capital of it"),
    ):
        expected = sklearn_cosine(one, other, corpus)
        assert 0 < expected <= 1 + 1e-12
        assert tfidf_cosine(one, other, idf) == pytest.approx(expected)
    assert tfidf_cosine("x y z", "Rome", idf) == 0
    # The numbers of scikit-learn's own documentation for one term in all, one in some of three.
    three = inverse_document_frequency(["aa bb", "aa", "aa"])
    assert three == pytest.approx({"aa": 1.0, "bb": math.log(4 / 2) + 1})


def test_consistency_is_that_of_the_texts(model: PreTrainedModel) -> None:
    found = judged(model)
    corpus = list(dict.fromkeys(text for fact in FACTS for text in fact.references))
    cosines = []
    for fact, result in zip(FACTS, found.facts, strict=True):
        told = greedy_continuations(model, TOKENIZER, fact.generation_prompts, 8)
        texts = [p + t for p, t in zip(fact.generation_prompts, told, strict=True)]
        assert list(result.texts) == texts
        cosines.append(sklearn_cosine(" ".join(texts), " ".join(fact.references), corpus))
    assert found.metrics["consistency"] == pytest.approx(100 * float(np.mean(cosines)))
    assert len({round(c, 6) for c in cosines}) > 1


# --------------------------------------------------------------------------- the model as a whole


def test_perplexity_is_the_exponential_of_transformers_own_loss(model: PreTrainedModel) -> None:
    windows, left = [], 90
    for document in HELDOUT:
        text, left = document[:left], left - len(document)
        windows += [text[i : i + 16] for i in range(0, len(text), 16)]
    total, count = 0.0, 0
    for window in windows:
        if len(window) > 1:
            ids = torch.tensor([window])
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids).loss  # the mean over len - 1 tokens
            total += float(loss) * (len(window) - 1)
            count += len(window) - 1
    assert judged(model).metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_drift_is_the_divergence_of_torchs_distributions(model: PreTrainedModel) -> None:
    changed = leaning(tiny_model(model.config.model_type, seed=1))
    found = judged(changed, base=model)

    def next_token(of: PreTrainedModel, prompt: str) -> torch.distributions.Categorical:
        logits = full_logits(of, list(TOKENIZER(prompt)["input_ids"]))[-1]
        return torch.distributions.Categorical(logits=logits)

    edited = {t for f in FACTS for t in (f.text, *f.paraphrases)}
    prompts = dict.fromkeys(n.prompt for f in FACTS for n in f.neighbourhood)
    kl, same = {}, {}
    odd = {p for p in prompts if hashlib.sha256(p.encode()).digest()[0] % 2}  # never protected
    for prompt in odd - edited:
        p, q = next_token(model, prompt), next_token(changed, prompt)
        kl[prompt] = float(torch.distributions.kl_divergence(p, q))
        same[prompt] = bool(p.probs.argmax() == q.probs.argmax())
    assert 0 < len(kl) < len(prompts)
    assert found.metrics["drift_kl"] == pytest.approx(float(np.mean(list(kl.values()))), rel=1e-4)
    assert found.metrics["drift_top1"] == pytest.approx(100 * float(np.mean(list(same.values()))))
    per_fact = []
    for fact, result in zip(FACTS, found.facts, strict=True):
        near = [kl[n.prompt] for n in fact.neighbourhood if n.prompt in kl]
        if near:
            per_fact.append(float(np.mean(near)))
        assert result.neighbourhood_kl == (pytest.approx(per_fact[-1], rel=1e-4) if near else None)
    assert found.metrics["neighbourhood_kl"] == pytest.approx(float(np.mean(per_fact)), rel=1e-4)


# ------------------------------------------------------------------------------------- intervals


def test_intervals_are_those_of_numpys_bootstrap() -> None:
    draws = np.random.default_rng(0)
    facts = [
        FactResult(
            case_id=str(i),
            prompt="p",
            target_new="n",
            target_true="t",
            efficacy=bool(draws.random() < 0.8),
            efficacy_exact=False,
            paraphrase=tuple(bool(x) for x in draws.random(2) < 0.6),
            neighbourhood=tuple(bool(x) for x in draws.random(3) < 0.7),
            neighbourhood_kl=float(draws.exponential()),
            generation=False,
            continuation="",
            logprob_new=-1.0,
        )
        for i in range(60)
    ]
    values = {
        "efficacy": np.array([float(bool(f.efficacy)) for f in facts]),
        "paraphrase": np.array([np.mean(f.paraphrase) for f in facts]),
        "neighbourhood": np.array([np.mean(f.neighbourhood) for f in facts]),
    }
    chosen = draws.integers(0, 60, size=(20_000, 60))
    means = {name: 100 * column[chosen].mean(1) for name, column in values.items()}
    means["score"] = 3 / sum(1 / column for column in means.values())
    kl = np.array([f.neighbourhood_kl for f in facts])
    means["neighbourhood_kl"] = kl[chosen].mean(1)
    found = intervals_of(facts, resamples=20_000)
    for name, column in means.items():
        expected = np.quantile(column, [0.025, 0.975])
        width = expected[1] - expected[0]
        assert found[name] == pytest.approx(expected.tolist(), abs=0.05 * width), name
    middle = summarise(facts)["neighbourhood_kl"]
    assert middle == pytest.approx(float(kl.mean()))


def test_intervals_of_the_whole_model_are_those_of_numpys_bootstrap() -> None:
    """A window counts with its tokens, so the interval is of a ratio and not of a mean."""
    draws = np.random.default_rng(1)
    lengths = draws.integers(4, 40, size=50)
    totals = -lengths * draws.normal(3.0, 0.3, size=50)
    shifts = [(f"p{i}", float(draws.exponential()), bool(draws.random() < 0.7)) for i in range(60)]
    entropies = draws.normal(5.0, 1.0, size=30)
    parts: tuple[tuple[Part, list[Any]], ...] = (
        (Likelihoods(windows=()), list(zip(totals.tolist(), lengths.tolist(), strict=True))),
        (Shift(reference=DriftReference.join([])), shifts),
        (Entropies(prompts=(), tokens=1), entropies.tolist()),
    )
    kinds, results = zip(*parts, strict=True)
    found = side_effects_of(kinds, results, DriftReference.join([])).intervals

    def drawn(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        chosen = np.random.default_rng(2).integers(0, len(values), size=(20_000, len(values)))
        return values[chosen].sum(1)

    expected = {
        "perplexity": np.exp(-drawn(totals) / drawn(lengths)),
        "drift_kl": drawn(np.array([kl for _, kl, _ in shifts])) / 60,
        "drift_top1": 100 * drawn(np.array([same for _, _, same in shifts])) / 60,
        "fluency": drawn(entropies) / 30,
    }
    assert found.keys() == expected.keys()
    for name, draw in expected.items():
        low, high = np.quantile(draw, [0.025, 0.975])
        assert found[name] == pytest.approx((low, high), abs=0.15 * (high - low)), name
    # Of four windows, or of some that nobody could say, there is no interval.
    few = ([(-3.0, 1)] * 4, [(-1e9, 1)] * 5)
    for likelihoods in few:
        none = side_effects_of([Likelihoods(windows=())], [likelihoods], None)
        assert none.intervals == {}


def test_a_fact_with_one_prompt_weighs_as_one_with_many(model: PreTrainedModel) -> None:
    """The mean over facts, not over prompts, which here is another number."""
    arch, first = architecture_of(model.config), FACTS[1]
    (scored,) = score_facts(model, TOKENIZER, arch, [first])
    assert len(scored.paraphrase) == 2
    # The second fact asks for the other of two objects, with one of those prompts.
    new, true = first.target_true, first.target_new
    assert new is not None
    second = replace(first, target_new=new, target_true=true, paraphrases=first.paraphrases[:1])
    facts = score_facts(model, TOKENIZER, arch, [first, second])
    shares = [fmean(fact.paraphrase) for fact in facts]
    prompts = [prompt for fact in facts for prompt in fact.paraphrase]
    assert fmean(shares) != fmean(prompts)
    assert summarise(facts)["paraphrase"] == pytest.approx(100 * fmean(shares))
