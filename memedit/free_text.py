"""What a model writes freely: how varied it is, and whether it is like reference texts.

As in the evaluation of ROME and MEMIT: the entropy of n-grams, and the cosine of TF-IDF vectors of
what the model writes about a subject and of texts about subjects that do have the new object as
their attribute. Knows texts, and which facts are written about; does not know models.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from memedit.config import EvaluationSettings
from memedit.requests import EditRequest

_WORD = re.compile(r"\b\w\w+\b")


def words_of(text: str) -> list[str]:
    """Words of two characters and more, in lower case, as scikit-learn's vectorizer takes them."""
    return _WORD.findall(text.lower())


def inverse_document_frequency(documents: Iterable[str]) -> dict[str, float]:
    """How telling each word is: idf(t) = ln((1 + n) / (1 + df(t))) + 1.

    n is the number of documents and df(t) that of documents with the word t: the smoothed form of
    scikit-learn, with which the reference's vectorizer was fitted.
    """
    frequencies: Counter[str] = Counter()
    count = 0
    for document in documents:
        frequencies.update(set(words_of(document)))
        count += 1
    return {word: math.log((1 + count) / (1 + df)) + 1 for word, df in frequencies.items()}


def tfidf_cosine(text: str, other: str, idf: Mapping[str, float]) -> float:
    """cos(v(text), v(other)) with v_t = tf(t) · idf(t), 0 to 1; words without an idf do not count.

    The reference's `tfidf_similarity` (experiments/py/eval_utils_counterfact.py). 0 where one of
    the texts has no known word, which is not a number there.
    """
    one, two = (
        {word: n * idf[word] for word, n in Counter(words_of(each)).items() if word in idf}
        for each in (text, other)
    )
    norms = math.hypot(*one.values()) * math.hypot(*two.values())
    if not norms:
        return 0.0
    return math.fsum(weight * two.get(word, 0.0) for word, weight in one.items()) / norms


def ngram_entropy(text: str) -> float:
    """Weighted entropy of the bigrams and trigrams of words in a text, in bits.

    `(2/3 · H_2 + 4/3 · H_3) / 2` with `H_n = -Σ f log2 f` over the frequencies f of n-grams, as the
    reference's `compute_n_gram_entropy`; words and punctuation are split by a pattern here, by
    NLTK there. 0 where the text is too short for an n-gram.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()
        size = sum(counts)
        total += weight * -math.fsum(c / size * math.log2(c / size) for c in counts)
    return total / 2


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Which facts a model is to write free text about.

    Chosen once for all models that are compared: on other facts the text would be another, whatever
    an edit did.
    """

    told: tuple[str, ...] = ()
    """What `fluency` is measured on: a generation prompt of each fact, or else its own prompt."""
    asked: tuple[str, ...] = ()
    """The generation prompts of those that `consistency` is."""
    case_ids: frozenset[str] = frozenset()
    """Those."""
    idf: Mapping[str, float] = field(default_factory=dict)
    """How telling each word of their references is."""

    @classmethod
    def of(cls, requests: Sequence[EditRequest], settings: EvaluationSettings) -> Sample:
        """The first facts that have what is needed."""
        known = consistency_sample(requests, settings)
        references = dict.fromkeys(text for request in known for text in request.references)
        return cls(
            told=tuple(
                (*request.generation_prompts, request.text)[0]
                for request in requests[: settings.fluency_facts]
            ),
            asked=tuple(dict.fromkeys(p for r in known for p in r.generation_prompts)),
            case_ids=frozenset(request.case_id for request in known),
            idf=inverse_document_frequency(references),
        )


def consistency_sample(
    requests: Sequence[EditRequest], settings: EvaluationSettings
) -> list[EditRequest]:
    """The first facts that have what `consistency` is measured on."""
    known = [r for r in requests if r.generation_prompts and r.references]
    return known[: settings.consistency_facts]
