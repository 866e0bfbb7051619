"""Whether free text is like texts about subjects of the same kind: TF-IDF vectors and their cosine.

As in the evaluation of ROME and MEMIT: what the model writes about the subject is compared with
reference texts about subjects that do have the new object as their attribute. Knows texts; does not
know facts or models.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

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
