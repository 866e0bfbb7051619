"""Facts as the method sees them: one `EditRequest` a fact, one `EditBatch` a run.

Knows what makes a fact valid, what makes two facts the same or contradictory, and the canonical
order. Does not know files, layouts or tokenizers (`memedit.layouts`, `workflows.facts`,
`memedit.prompts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A prompt about another subject whose answer must not change."""

    prompt: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a fact came from: the file or table, and the 1-based row (or line) in it."""

    source: str
    row: int


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to write into the model.

    `prompt` holds exactly one `{}`, which stands for `subject`. Texts are NFC-normalised and
    stripped; targets have no leading space (the tokenizer's spacing is added by `memedit.prompts`).
    """

    case_id: str
    subject: str
    prompt: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbourhood: tuple[Neighbour, ...] = ()
    provenance: Provenance | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject, 1)

    @property
    def digest(self) -> str:
        """sha256 over what the z vector depends on: subject, prompt and new object."""
        return _digest([self.subject, self.prompt, self.target_new])


def _digest(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class EditBatch:
    """Unique requests in canonical order (by digest), so that the order of arrival cannot matter."""

    requests: tuple[EditRequest, ...]

    @classmethod
    def of(cls, requests: Iterable[EditRequest]) -> EditBatch:
        """Put requests into canonical order."""
        return cls(tuple(sorted(requests, key=lambda r: (r.digest, r.case_id))))

    @property
    def digest(self) -> str:
        """sha256 over the digests of the facts, in canonical order."""
        return _digest([r.digest for r in self.requests])

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[EditRequest]:
        return iter(self.requests)
