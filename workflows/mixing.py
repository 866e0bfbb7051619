"""Whether facts of two relations harm each other when they are edited at once.

The paper's third experiment: facts of two relations together, against each relation apart. As many
facts are edited at once in either case, and the same ones are judged, so that what differs is only
whether their neighbours in the batch are like them. Knows facts and judgements; does not know
methods (`workflows.compare`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from memedit.errors import InputError
from memedit.evaluate import evaluation_of
from memedit.intervals import changes_of
from memedit.outcome import Evaluation
from memedit.requests import EditRequest
from workflows.wording import plural


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Facts of two relations, an even number and as many of each."""

    relations: tuple[str, str]
    facts: tuple[Sequence[EditRequest], Sequence[EditRequest]]

    @property
    def edits(self) -> int:
        """How many are edited at once."""
        return len(self.facts[0])

    @property
    def judged(self) -> tuple[Sequence[EditRequest], Sequence[EditRequest]]:
        """Of each relation those that are edited together with the other: half of its facts."""
        first, second = self.facts
        half = self.edits // 2
        return first[:half], second[:half]


def pairs_of(requests: Sequence[EditRequest], number: int) -> list[Pair]:
    """The relations with the most facts, two and two, whose objects are not mostly the same.

    Args:
        requests: The facts.
        number: How many pairs.

    Raises:
        InputError: There are too few such relations with at least two facts.
    """
    found: dict[str, list[EditRequest]] = {}
    for request in requests:
        found.setdefault(request.relation, []).append(request)
    groups = sorted(found.items(), key=lambda group: (-len(group[1]), group[0]))
    pairs: list[Pair] = []
    while len(pairs) < number:
        groups = [group for group in groups if len(group[1]) > 1]
        if len(groups) < 2:
            raise InputError(
                f"{plural(number, 'pair')} of relations take {2 * number} relations with two facts"
                " or more each, two and two with different objects; beginning with those that have"
                f" the most facts, {plural(len(pairs), 'pair')} can be made",
                field="pairs",
            )
        (one, of_one), *groups = groups
        other = next((group for group in groups if not _alike(of_one, group[1])), None)
        if other is None:
            continue
        groups.remove(other)
        edits = len(other[1]) // 2 * 2
        facts = (of_one[:edits], other[1][:edits])
        pairs.append(Pair(relations=(one, other[0]), facts=facts))
    return pairs


def _alike(one: Sequence[EditRequest], other: Sequence[EditRequest]) -> bool:
    """Whether two relations have mostly the same objects, as two wordings of one relation have."""
    first, second = (
        {text for fact in facts for text in (fact.target_new, fact.target_true) if text}
        for facts in (one, other)
    )
    return 2 * len(first & second) > min(len(first), len(second))


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A method on one pair of relations."""

    method: str
    relations: tuple[str, str]
    edits: int
    lam: float | None
    together: Evaluation | None = None
    apart: Evaluation | None = None
    failed: str | None = None
    """Why there are no evaluations."""

    def with_judgements(self, together: Evaluation, *apart: Evaluation) -> Mixed:
        """With what was judged after an edit of both relations, and after one of each."""
        facts = [fact for each in apart for fact in each.facts]
        return replace(self, together=together, apart=evaluation_of(facts, {}))

    def summary(self) -> dict[str, Any]:
        """Without the judgements of single facts; `changes` is together less apart, 95%."""
        changes = {}
        if self.together is not None and self.apart is not None:
            changes = changes_of(self.apart.facts, self.together.facts)
        return {
            "method": self.method,
            "relations": list(self.relations),
            "edits": self.edits,
            "lam": self.lam,
            "together": _measured(self.together),
            "apart": _measured(self.apart),
            "changes": {name: list(pair) for name, pair in changes.items()},
            "failed": self.failed,
        }


def _measured(found: Evaluation | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {name: value for name, value in found.metrics.items() if value is not None}
