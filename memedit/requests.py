"""Facts as the method sees them: one `EditRequest` a fact, one `EditBatch` a run.

Knows what makes a fact valid, what makes two facts the same or contradictory, and the canonical
order. Does not know files, layouts or tokenizers (`memedit.layouts`, `workflows.facts`,
`memedit.prompts`).
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from memedit.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A prompt about something else, with the answer that it must keep or get."""

    prompt: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a fact came from: the file or table, and the 1-based row (or line) in it."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


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
    attributes: tuple[str, ...] = ()
    """Prompts about other subjects whose answer is the new object already."""
    portability: tuple[Neighbour, ...] = ()
    """Prompts about other things, with what follows for them from the fact."""
    generation_prompts: tuple[str, ...] = ()
    """Openings of free text about the subject."""
    references: tuple[str, ...] = ()
    """Texts about subjects that have the new object as their attribute."""
    relation_id: str | None = None
    """As the data set names the relation."""
    provenance: Provenance | None = field(default=None, compare=False)

    @property
    def relation(self) -> str:
        """What facts of one kind share: the data set's relation id, or else the template."""
        return self.relation_id or self.prompt

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
    """Unique requests in canonical order (by digest): the order of arrival cannot matter."""

    requests: tuple[EditRequest, ...]

    @classmethod
    def of(cls, requests: Iterable[EditRequest]) -> EditBatch:
        """Merge exact duplicates and put the rest into canonical order.

        Raises:
            InputError: Two requests contradict each other (see `resolve`).
        """
        # Sorted first, so that which of two duplicates stays does not depend on the order.
        resolution = resolve(sorted(requests, key=lambda r: (r.digest, r.case_id)))
        for conflict in resolution.conflicts:
            raise conflict.error()
        return cls(resolution.requests)

    @property
    def digest(self) -> str:
        """sha256 over the digests of the facts, in canonical order."""
        return _digest([r.digest for r in self.requests])

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[EditRequest]:
        return iter(self.requests)


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """`dropped` says the same as `kept`: same subject, prompt and new object."""

    kept: EditRequest
    dropped: EditRequest


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Requests that cannot all hold; `field` is what they disagree on: "target_new" or "id"."""

    field: str
    requests: tuple[EditRequest, ...]

    @property
    def reason(self) -> str:
        """What contradicts what, with the place of each."""
        places = "; ".join(
            f'"{r.text}" -> "{r.target_new}" (id {r.case_id}'
            + (f", {r.provenance})" if r.provenance else ")")
            for r in self.requests
        )
        what = {
            "target_new": "the same subject and prompt with different targets, keep one",
            "id": "the same id for different facts, ids must be unique",
        }[self.field]
        return f"{what}: {places}"

    def error(self) -> InputError:
        """The same as an exception, placed at the last of the requests."""
        place = self.requests[-1].provenance
        return InputError(
            self.reason,
            source=place.source if place else None,
            row=place.row if place else None,
            field=self.field,
        )


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """Requests that can be edited together, and what was left out for it."""

    requests: tuple[EditRequest, ...]
    duplicates: tuple[Duplicate, ...]
    conflicts: tuple[Conflict, ...]


def resolve(requests: Iterable[EditRequest]) -> Resolution:
    """Merge duplicates into the first of them and take contradictory requests out.

    The first gets what the others bring for the evaluation alone: other questions, say, that follow
    from the same fact. Texts are compared in NFC with runs of whitespace as one space. None of the
    requests of a conflict is kept, because nothing says which of them is right. Order is kept.
    """
    kept: dict[tuple[str, str, str], EditRequest] = {}
    duplicates = []
    for request in requests:
        fact = (*_question(request), comparable(request.target_new))
        first = kept.setdefault(fact, request)
        if first is not request:
            kept[fact] = _with_prompts_of(request, first)
            duplicates.append(Duplicate(kept=kept[fact], dropped=request))

    questions: dict[tuple[str, str], list[EditRequest]] = {}
    ids: dict[str, list[EditRequest]] = {}
    for request in kept.values():
        questions.setdefault(_question(request), []).append(request)
    conflicts = [
        Conflict(field="target_new", requests=tuple(group))
        for group in questions.values()
        if len(group) > 1
    ]
    contradictory = {id(r) for conflict in conflicts for r in conflict.requests}
    for request in kept.values():
        if id(request) not in contradictory:
            ids.setdefault(request.case_id, []).append(request)
    clashes = [
        Conflict(field="id", requests=tuple(group)) for group in ids.values() if len(group) > 1
    ]
    contradictory |= {id(r) for conflict in clashes for r in conflict.requests}
    return Resolution(
        requests=tuple(r for r in kept.values() if id(r) not in contradictory),
        duplicates=tuple(duplicates),
        conflicts=(*conflicts, *clashes),
    )


def _with_prompts_of(other: EditRequest, request: EditRequest) -> EditRequest:
    """A request with what another of the same fact has for the evaluation alone."""

    def both(one: tuple[T, ...], two: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(dict.fromkeys((*one, *two)))

    return replace(
        request,
        attributes=both(request.attributes, other.attributes),
        portability=both(request.portability, other.portability),
        generation_prompts=both(request.generation_prompts, other.generation_prompts),
        references=both(request.references, other.references),
        relation_id=request.relation_id or other.relation_id,
    )


def comparable(text: str) -> str:
    """The form in which two texts are compared: NFC, stripped, whitespace runs as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _question(request: EditRequest) -> tuple[str, str]:
    return comparable(request.subject), comparable(request.prompt)


# Unicode's control characters, and halves of surrogate pairs, which cannot be written as UTF-8.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def clean_text(value: object, *, field: str, one_line: bool = False) -> str:
    """NFC-normalise and strip a text of a fact.

    Args:
        value: What the row holds.
        field: Its name in the row, for the error.
        one_line: Refuse line breaks and tabs too, as in a subject or a target.

    Raises:
        InputError: Not a text, nothing visible in it, or a control character.
    """
    if not isinstance(value, str):
        raise InputError(f"expected text, found {type_name(value)}", field=field)
    text = value.strip()
    if text and text.isascii() and text.isprintable():
        return text  # as most are, in a million rows
    text = unicodedata.normalize("NFC", value).strip()
    for match in _CONTROL.finditer(text):
        if one_line or match[0] not in "\n\r\t":
            raise InputError(
                f"control character U+{ord(match[0]):04X} in {text[:60]!r}; take it out",
                field=field,
            )
    if all(unicodedata.category(c)[0] in "ZC" for c in text):
        found = "is empty" if value == "" else "holds only whitespace or invisible characters"
        raise InputError(f"{found}; write the text", field=field)
    return text


def type_name(value: object) -> str:
    """The type of a value in a row, in the words of JSON."""
    names = {
        "NoneType": "nothing (null)",
        "dict": "an object",
        "list": "a list",
        "bool": "a boolean",
        "int": "a number",
        "float": "a number",
    }
    return names.get(type(value).__name__, f"a value of type {type(value).__name__}")


def as_template(prompt: str, subject: str, *, field: str) -> tuple[str, str]:
    """Return (template with one `{}`, subject); a filled-in prompt is turned into a template.

    The subject must occur once as a whole word: as it is written or, if it does not, ignoring
    case. In the latter case the prompt's spelling becomes the subject, so that the template filled
    in is always the prompt that was given.

    Raises:
        InputError: Several `{}`, or none and the subject does not occur exactly once.
    """
    holes = prompt.count("{}")
    if holes == 1:
        return prompt, subject
    if holes > 1:
        raise InputError(
            f"{holes} times {{}} in {prompt!r}; mark the subject's place once", field=field
        )
    for flags in (0, re.IGNORECASE):
        # The lookahead finds overlapping occurrences too.
        found = [
            (match.start(), match.start() + len(match[1]))
            for match in re.finditer(f"(?=({re.escape(subject)}))", prompt, flags)
            if whole_word(prompt, match.start(), match.start() + len(match[1]))
        ]
        if len(found) == 1:
            start, end = found[0]
            return f"{prompt[:start]}{{}}{prompt[end:]}", prompt[start:end]
        if found:
            raise InputError(
                f"the subject {subject!r} occurs {len(found)} times in {prompt!r}; "
                "write {} at the place that is meant",
                field=field,
            )
    raise InputError(
        f"neither {{}} nor the subject {subject!r} in {prompt!r}; "
        "write {} where the subject belongs",
        field=field,
    )


def whole_word(text: str, start: int, end: int) -> bool:
    """Whether no word runs over an edge of text[start:end], in scripts that separate words."""

    def joined(position: int) -> bool:
        # Scripts with upper and lower case put spaces between words; others may not.
        return 0 < position < len(text) and all(
            c.isdecimal() or c.lower() != c.upper() for c in text[position - 1 : position + 1]
        )

    return not joined(start) and not joined(end)
