"""Which answers stand, row by row, where what contradicts them is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Stands:
    """An answer that may not be contradicted, and how it is called where it is."""

    fact: str
    id: str
    why: str


class Standing:
    """Which answer stands to each question, while a source speaks row by row."""

    def __init__(self) -> None:
        self._own: dict[str, Stands] = {}
        self._others: dict[str, Stands] = {}
        self._questions: dict[str, str] = {}
        """By the id of an own answer."""

    def put(self, question: str, stands: Stands, *, own: bool) -> None:
        """From now on this is the answer; of several of others the last."""
        if not own:
            self._others[question] = stands
            return
        self._drop(question)
        self._own[question] = stands
        self._questions[stands.id] = question

    def of(self, question: str) -> Stands | None:
        """The answer that stands; the others' where the source has none that is active."""
        return self._own.get(question) or self._others.get(question)

    def let_go(self, name: str) -> None:
        """An id names something else from now on."""
        if (question := self._questions.get(name)) is not None:
            self._drop(question)

    def retract(self, question: str | None, fact: str | None, name: str | None) -> None:
        """The source takes an answer of its own back."""
        if question is None:
            self.let_go(name or "")
        elif (stands := self._own.get(question)) and fact in (None, stands.fact):
            self._drop(question)

    def _drop(self, question: str) -> None:
        if (stands := self._own.pop(question, None)) is not None:
            del self._questions[stands.id]
