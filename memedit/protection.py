"""Prompts about other subjects in the words of the facts: what an edit must leave as it is.

A key of "The capital of {} is" looks much the same for an edited subject and for any other. Corpus
text hardly ever says it in these words, so that its second moment C leaves those other keys nearly
free to move. Knows facts and text; does not know models or tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from memedit.config import ProtectSettings
from memedit.requests import EditRequest, comparable

_MOST_WORDS = 4
_MOST_NAMES = 2000
_ENDS = (".", "!", "?", ":", "…")
_QUOTES = "\"'“‘«"
_AROUND = _QUOTES + "”’»()[],;"
_JOINING = frozenset(("of", "the", "de", "la", "van", "von", "der", "del", "di", "al", "bin"))


@dataclass(frozen=True, kw_only=True)
class ProtectingPrompts:
    """Prompts whose keys are protected, and others like them on which drift is measured."""

    protected: tuple[str, ...]
    heldout: tuple[str, ...]


def protecting_prompts(
    requests: Sequence[EditRequest],
    texts: Iterable[str],
    *,
    settings: ProtectSettings,
    heldout: int,
) -> ProtectingPrompts:
    """Choose prompts for a batch of facts; the same ones for the same facts in the same order.

    Where there are too few for both, each gets its share of them.

    Args:
        requests: The facts.
        texts: Text that the model may know, in which names are looked for.
        settings: How many to protect, and where they come from.
        heldout: How many to measure on.
    """
    edited, wanted = _edited(requests), settings.prompts + heldout
    random = Random(settings.seed)
    # Half of what is made, about, is on the side that is measured.
    made = templated(requests, names_in(texts), count=4 * wanted, random=random)
    near = neighbours_of(requests)
    given = near.protectable if settings.source == "neighbourhood" else []
    random.shuffle(given)
    prompts = [
        prompt
        for prompt in dict.fromkeys((*given, *made))
        if prompt not in edited and not is_for_measuring(prompt)
    ]
    prompts = prompts[:wanted]
    kept = -(-len(prompts) * settings.prompts // max(1, wanted))
    if heldout and kept == len(prompts) > 1:  # or drift would not limit repair
        kept -= 1
    return ProtectingPrompts(protected=tuple(prompts[:kept]), heldout=tuple(prompts[kept:]))


def is_for_measuring(prompt: str) -> bool:
    """Whether drift may be measured on a prompt; then it is never protected, whatever the batch.

    Every other prompt by its digest, so that what measures one edit was not protected in another.
    """
    return bool(hashlib.sha256(prompt.encode()).digest()[0] % 2)


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Neighbourhood prompts of some facts, each once, that none of the facts edits."""

    measured: list[str]
    """Those that drift is measured on, and that are never protected."""
    protectable: list[str]


def neighbours_of(requests: Sequence[EditRequest]) -> Neighbours:
    """The two sides of the neighbourhood prompts (`is_for_measuring`); either may be empty."""
    edited = _edited(requests)
    prompts = dict.fromkeys(n.prompt for r in requests for n in r.neighbourhood)
    found = Neighbours(measured=[], protectable=[])
    for prompt in (prompt for prompt in prompts if prompt not in edited):
        (found.measured if is_for_measuring(prompt) else found.protectable).append(prompt)
    return found


def _edited(requests: Sequence[EditRequest]) -> set[str]:
    return {text for request in requests for text in (request.text, *request.paraphrases)}


def prompts_elsewhere(
    requests: Sequence[EditRequest], texts: Iterable[str], *, count: int
) -> list[str]:
    """The facts' prompts with names out of text, to measure drift on; at most `count`, each once.

    For facts without neighbourhood prompts on that side: none of them is ever protected
    (`is_for_measuring`).
    """
    edited = _edited(requests)
    made = templated(requests, names_in(texts), count=4 * count, random=Random(0))
    free = (prompt for prompt in dict.fromkeys(made) if is_for_measuring(prompt))
    return [prompt for prompt in free if prompt not in edited][:count]


def templated(
    requests: Sequence[EditRequest], names: Sequence[str], *, count: int, random: Random
) -> list[str]:
    """The facts' prompts with other names in place of their subjects, at most `count`, each once.

    A name that is the subject of a fact is left out.
    """
    templates = list(dict.fromkeys(request.prompt for request in requests))
    subjects = {comparable(request.subject) for request in requests}
    others = [name for name in names if comparable(name) not in subjects]
    pairs = len(templates) * len(others)
    return [
        templates[pair % len(templates)].replace("{}", others[pair // len(templates)], 1)
        for pair in random.sample(range(pairs), min(count, pairs))
    ]


def names_in(texts: Iterable[str], *, most: int = _MOST_NAMES) -> list[str]:
    """Names in running text, in their order, each once: words with a capital inside a sentence.

    A name has up to four such words, which small words like "of" may join. Scripts without capitals
    give none.
    """
    names: dict[str, None] = {}
    for line in (line for text in texts for line in text.splitlines()):
        for name in _names(line):
            names.setdefault(name)
            if len(names) >= most:
                return list(names)
    return list(names)


def _names(text: str) -> Iterable[str]:
    run: list[str] = []
    begins = True  # of a sentence, where any word has a capital
    for raw in text.split():
        word = raw.strip(_AROUND + "".join(_ENDS))
        opening = raw[: len(raw) - len(raw.lstrip(_AROUND))]
        begins = begins or any(mark in _QUOTES for mark in opening)
        capital = word[:1].isupper() and word[1:2].isalpha() and not begins
        if opening:
            yield from _name(run)
            run = []
        if capital or (run and word in _JOINING):
            run.append(word)
        else:
            yield from _name(run)
            run = []
        if raw[-1] in _AROUND or raw[-1] in _ENDS:
            yield from _name(run)
            run = []
        if raw.strip(_AROUND):  # marks alone neither begin nor end a sentence
            begins = raw.rstrip(_AROUND)[-1] in _ENDS
    yield from _name(run)


def _name(run: Sequence[str]) -> Iterable[str]:
    words = list(run)
    while words and words[-1] in _JOINING:
        words.pop()
    # One long run is a heading or a list.
    if words and len(words) <= _MOST_WORDS:
        yield " ".join(words)
