"""Raw rows of any known layout of fact tables, turned into `EditRequest`s.

Knows how each data set names its fields (`LAYOUTS`: one row and one small function a layout).
Does not know files (`workflows.facts`) or tokenizers, and leaves what makes a text valid to
`memedit.requests`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from memedit.errors import InputError
from memedit.requests import (
    EditRequest,
    Neighbour,
    Provenance,
    as_template,
    clean_text,
    comparable,
    type_name,
)

Row = Mapping[str, Any]


class _Named(NamedTuple):
    """A value and the field of the row it came from, so that an error can name that field."""

    field: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """A row's values by their roles, not yet checked."""

    subject: _Named
    prompt: _Named
    target_new: _Named
    target_true: _Named | None = None
    paraphrases: Iterable[_Named] = ()
    neighbourhood: Iterable[tuple[_Named, _Named]] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one data set writes a fact.

    `marks`: a row with any of these fields has this layout. `needs`: fields it must have.
    """

    name: str
    marks: tuple[str, ...]
    needs: tuple[str, ...]
    read: Callable[[Row], _Parts]


def read_row(
    row: object, *, provenance: Provenance | None = None, layout: Layout | None = None
) -> EditRequest:
    """Turn one raw row into a request; a row without an id gets one from its content.

    Args:
        row: A mapping of fields to values.
        provenance: Where it is from.
        layout: Where it is known; otherwise the fields tell.

    Raises:
        InputError: The row cannot be a fact; names the place and the field.
    """
    try:
        if not isinstance(row, Mapping):
            raise InputError(f"expected an object with the fact's fields, found {type_name(row)}")
        # Tables have a column for every field of any row, so null means absent.
        present = {name: value for name, value in row.items() if value is not None}
        layout = layout or layout_of(present)
        for name in layout.needs:
            if name not in present:
                raise InputError(f"{name!r} is missing ({layout.name} layout)", field=name)
        return _request(layout.read(present), _case_id(present), provenance)
    except InputError as error:
        if provenance is None:
            raise
        raise InputError(
            error.message, source=provenance.source, row=provenance.row, field=error.field
        ) from None


def layout_of(fields: Collection[str]) -> Layout:
    """The layout that a row with these fields has.

    Raises:
        InputError: No layout has any of them.
    """
    marked = [x for x in LAYOUTS if any(mark in fields for mark in x.marks)]
    if marked:
        # A complete one wins, so that a further column cannot make a row look like another layout.
        complete = (x for x in marked if all(name in fields for name in x.needs))
        return next(complete, marked[0])
    known = "; ".join(f"{x.name}: {', '.join(x.needs)}" for x in LAYOUTS)
    found = ", ".join(sorted(map(str, fields))) or "none"
    raise InputError(f"unknown layout; fields found: {found}. Fields expected: {known}")


def to_row(request: EditRequest) -> dict[str, Any]:
    """The request as a native row; `read_row` gives the request back."""
    row: dict[str, Any] = {
        "id": request.case_id,
        "subject": request.subject,
        "prompt": request.prompt,
        "target_new": request.target_new,
    }
    if request.target_true is not None:
        row["target_true"] = request.target_true
    if request.paraphrases:
        row["paraphrases"] = list(request.paraphrases)
    if request.neighbourhood:
        row["neighbourhood"] = [
            {"prompt": n.prompt, "target": n.target} for n in request.neighbourhood
        ]
    return row


def _case_id(row: Row) -> str | None:
    name = "id" if "id" in row else "case_id"
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value is None else clean_text(value, field=name, one_line=True)


def _request(parts: _Parts, case_id: str | None, provenance: Provenance | None) -> EditRequest:
    subject = clean_text(parts.subject.value, field=parts.subject.field, one_line=True)
    if "{}" in subject:
        raise InputError(
            f"{{}} in the subject {subject!r}; it belongs into the prompt only",
            field=parts.subject.field,
        )
    prompt = clean_text(parts.prompt.value, field=parts.prompt.field)
    prompt, subject = as_template(prompt, subject, field=parts.prompt.field)
    target_new = clean_text(parts.target_new.value, field=parts.target_new.field, one_line=True)
    target_true = None
    if parts.target_true is not None:
        target_true = clean_text(
            parts.target_true.value, field=parts.target_true.field, one_line=True
        )
        if comparable(target_true) == comparable(target_new):
            raise InputError(
                f"target_new equals target_true ({target_new!r}): there is nothing to edit",
                field=parts.target_new.field,
            )
    request = EditRequest(
        case_id=case_id or "",
        subject=subject,
        prompt=prompt,
        target_new=target_new,
        target_true=target_true,
        # A dict keeps the order and drops repetitions, which would count twice in the metrics.
        paraphrases=tuple(dict.fromkeys(_paraphrase(p, subject) for p in parts.paraphrases)),
        neighbourhood=tuple(dict.fromkeys(_neighbour(*n) for n in parts.neighbourhood)),
        provenance=provenance,
    )
    if case_id is None:
        request = EditRequest(**{**vars(request), "case_id": request.digest[:16]})
    return request


def _paraphrase(paraphrase: _Named, subject: str) -> str:
    text = clean_text(paraphrase.value, field=paraphrase.field)
    if text.count("{}") > 1:
        raise InputError(f"several {{}} in {text!r}", field=paraphrase.field)
    return text.replace("{}", subject)


def _neighbour(prompt: _Named, target: _Named) -> Neighbour:
    text = clean_text(prompt.value, field=prompt.field)
    if "{}" in text:
        raise InputError(
            f"{{}} in {text!r}; a neighbourhood prompt names its own subject", field=prompt.field
        )
    return Neighbour(
        prompt=text, target=clean_text(target.value, field=target.field, one_line=True)
    )


# --- Getting at values -------------------------------------------------------------------------


def _get(row: Row, *path: str) -> _Named:
    """The value at a path of nested objects."""
    value: Any = row
    for depth, name in enumerate(path):
        field = ".".join(path[: depth + 1])
        if not isinstance(value, Mapping):
            raise InputError(
                f"expected an object, found {type_name(value)}", field=".".join(path[:depth])
            )
        value = value.get(name)
        if value is None:
            raise InputError(f"{field!r} is missing", field=field)
    return _Named(".".join(path), value)


def _maybe(row: Row, *names: str) -> _Named | None:
    """The first of these fields that the row has."""
    return next((_Named(n, row[n]) for n in names if row.get(n) is not None), None)


def _items(named: _Named | None) -> Iterator[_Named]:
    """The items of a list; none for an absent field."""
    if named is None:
        return
    if not isinstance(named.value, list | tuple):
        raise InputError(f"expected a list, found {type_name(named.value)}", field=named.field)
    for index, value in enumerate(named.value):
        yield _Named(f"{named.field}[{index}]", value)


def _one_or_many(named: _Named | None) -> Iterator[_Named]:
    """As `_items`, but a single text will do; empty ones mean that there is none."""
    if named is not None and isinstance(named.value, str):
        named = _Named(named.field, [named.value] if named.value.strip() else [])
    return _items(named)


def _answers(named: _Named | None) -> Iterator[_Named]:
    """The texts in arbitrarily nested lists of equally good answers; placeholders are left out."""
    if named is None:
        return
    if isinstance(named.value, list | tuple):
        for item in _items(named):
            yield from _answers(item)
    elif named.value not in ("", None, "<|endoftext|>"):
        yield named


def _old_answer(answers: Iterable[_Named], target_new: _Named) -> _Named | None:
    """The first answer that is not the new object; if there is no other, the first."""
    found = list(answers)
    return next((a for a in found if a.value != target_new.value), found[0] if found else None)


# --- One reader a layout -----------------------------------------------------------------------


def _native(row: Row) -> _Parts:
    return _Parts(
        subject=_get(row, "subject"),
        prompt=_get(row, "prompt"),
        target_new=_get(row, "target_new"),
        target_true=_maybe(row, "target_true"),
        paraphrases=_items(_maybe(row, "paraphrases")),
        neighbourhood=[
            _native_neighbour(n) for n in _items(_maybe(row, "neighbourhood", "neighborhood"))
        ],
    )


def _native_neighbour(item: _Named) -> tuple[_Named, _Named]:
    if not isinstance(item.value, Mapping) or not {"prompt", "target"} <= item.value.keys():
        raise InputError(
            'expected an object {"prompt": "…", "target": "…"}, '
            f"found {type_name(item.value)}: {str(item.value)[:60]}",
            field=item.field,
        )
    return (
        _Named(f"{item.field}.prompt", item.value["prompt"]),
        _Named(f"{item.field}.target", item.value["target"]),
    )


def _counterfact(row: Row) -> _Parts:
    """CounterFact as published with ROME: its neighbours share the fact's true object."""
    target_true = _get(row, "requested_rewrite", "target_true", "str")
    return _Parts(
        subject=_get(row, "requested_rewrite", "subject"),
        prompt=_get(row, "requested_rewrite", "prompt"),
        target_new=_get(row, "requested_rewrite", "target_new", "str"),
        target_true=target_true,
        paraphrases=_items(_maybe(row, "paraphrase_prompts")),
        neighbourhood=[(n, target_true) for n in _items(_maybe(row, "neighborhood_prompts"))],
    )


def _zsre_mend(row: Row) -> _Parts:
    """The zsRE published with MEND: questions, and one unrelated question as the neighbour."""
    target_new = _get(row, "alt")
    answers = [*_one_or_many(_maybe(row, "answers")), *_one_or_many(_maybe(row, "pred"))]
    locality = _maybe(row, "loc")
    neighbourhood = []
    if locality is not None and isinstance(locality.value, str):
        # "nq question: " is a task tag for the T5 of that paper, and its questions end openly.
        question = locality.value.strip().removeprefix("nq question: ").rstrip("? ") + "?"
        neighbourhood = [(_Named("loc", question), _get(row, "loc_ans"))]
    return _Parts(
        subject=_get(row, "subject"),
        prompt=_get(row, "src"),
        target_new=target_new,
        target_true=_old_answer(answers, target_new),
        paraphrases=_one_or_many(_maybe(row, "rephrase")),
        neighbourhood=neighbourhood,
    )


def _easyedit(row: Row) -> _Parts:
    """EasyEdit's CounterFact and zsRE, flat or with a nested `locality`, and KnowEdit."""
    return _edit_row(row, subject="subject", prompt="prompt", target_new="target_new")


def _wikibio(row: Row) -> _Parts:
    """KnowEdit's WikiBio, which names the same things differently."""
    return _edit_row(row, subject="concept", prompt="text", target_new="labels")


def _edit_row(row: Row, *, subject: str, prompt: str, target_new: str) -> _Parts:
    new = _get(row, target_new)
    rephrased = _maybe(row, "rephrase_prompt", "rephrase_prompts", "rephrase")
    return _Parts(
        subject=_get(row, subject),
        prompt=_get(row, prompt),
        target_new=new,
        target_true=_old_answer(_answers(_maybe(row, "ground_truth", "target_true")), new),
        paraphrases=_one_or_many(rephrased),
        neighbourhood=[*_flat_locality(row), *_nested_locality(_maybe(row, "locality"))],
    )


def _flat_locality(row: Row) -> Iterator[tuple[_Named, _Named]]:
    prompts = _one_or_many(_maybe(row, "locality_prompt"))
    return _pairs(prompts, _one_or_many(_maybe(row, "locality_ground_truth")), "locality_prompt")


def _nested_locality(locality: _Named | None) -> Iterator[tuple[_Named, _Named]]:
    """Every group of a `locality`: {group: [{prompt, ground_truth}]} or one such object of lists.

    A prompt without any answer is left out: nothing can be measured on it.
    """
    if locality is None:
        return
    if not isinstance(locality.value, Mapping):
        raise InputError(
            f"expected an object of groups, found {type_name(locality.value)}",
            field=locality.field,
        )
    for group, value in locality.value.items():
        named = _Named(f"{locality.field}.{group}", value)
        if isinstance(value, Mapping):
            yield from _pairs(
                _one_or_many(_inside(named, "prompt")),
                _one_or_many(_inside(named, "ground_truth")),
                named.field,
            )
        elif value is not None:
            for item in _items(named):
                prompt, answers = _inside(item, "prompt"), _inside(item, "ground_truth")
                answer = next(_answers(answers), None)
                if prompt is not None and answer is not None:
                    yield from ((p, answer) for p in _one_or_many(prompt))


def _inside(item: _Named, name: str) -> _Named | None:
    if not isinstance(item.value, Mapping):
        raise InputError(f"expected an object, found {type_name(item.value)}", field=item.field)
    value = item.value.get(name)
    return None if value is None else _Named(f"{item.field}.{name}", value)


def _pairs(
    prompts: Iterable[_Named], answers: Iterable[_Named], field: str
) -> Iterator[tuple[_Named, _Named]]:
    """Prompts and answers that stand side by side in two lists; no answers means no pairs."""
    left, right = list(prompts), list(answers)
    if right and len(left) != len(right):
        raise InputError(
            f"{len(left)} prompts but {len(right)} answers; there must be one for each",
            field=field,
        )
    for prompt, answer in zip(left, right, strict=False):
        first = next(_answers(answer), None)
        if first is not None:
            yield prompt, first


_PLAIN = ("subject", "prompt", "target_new")
NATIVE = Layout(name="native", marks=_PLAIN, needs=_PLAIN, read=_native)

# Of several that fit, the first is taken, so the telling ones come first.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="CounterFact",
        marks=("requested_rewrite",),
        needs=("requested_rewrite",),
        read=_counterfact,
    ),
    Layout(
        name="native",
        marks=("paraphrases", "neighbourhood", "neighborhood"),
        needs=_PLAIN,
        read=_native,
    ),
    Layout(
        name="zsRE (MEND)", marks=("src", "alt"), needs=("subject", "src", "alt"), read=_zsre_mend
    ),
    Layout(
        name="KnowEdit WikiBio",
        marks=("concept",),
        needs=("concept", "text", "labels"),
        read=_wikibio,
    ),
    Layout(name="KnowEdit", marks=("locality", "portability"), needs=_PLAIN, read=_easyedit),
    Layout(
        name="EasyEdit",
        marks=("ground_truth", "rephrase_prompt", "rephrase", "locality_prompt"),
        needs=_PLAIN,
        read=_easyedit,
    ),
    NATIVE,
)

STRUCTURED = frozenset(
    {
        *("paraphrases", "neighbourhood", "neighborhood", "requested_rewrite", "answers"),
        *("paraphrase_prompts", "neighborhood_prompts", "locality", "portability"),
    }
)
"""Fields that hold lists or objects; in a cell of text they are written as JSON."""
