"""Raw rows of any known layout of fact tables, turned into `EditRequest`s.

Knows which layouts there are and what tells them apart (`LAYOUTS`); each is read by a small
function in `memedit.layout_readers`. Does not know files (`workflows.facts`) or tokenizers, and
leaves what makes a text valid to `memedit.requests`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from memedit.errors import InputError
from memedit.layout_readers import (
    FOLLOW,
    STAY,
    read_counterfact,
    read_easyedit,
    read_mquake,
    read_native,
    read_ripple_edits,
    read_wikibio,
    read_zsre_mend,
    split_rewrites,
)
from memedit.layout_values import Named, Parts, Row
from memedit.requests import (
    EditRequest,
    Neighbour,
    Provenance,
    as_template,
    clean_text,
    comparable,
    type_name,
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one data set writes a fact.

    `marks`: a row with any of these fields has this layout. `needs`: fields it must have. `nested`:
    those of its fields that hold lists or objects; in a cell of text they are written as JSON.
    """

    name: str
    marks: tuple[str, ...]
    needs: tuple[str, ...]
    nested: tuple[str, ...]
    read: Callable[[Row], Parts]


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


def split_row(row: object) -> list[Any]:
    """The rows of single facts in a raw row: as a rule, itself."""
    return split_rewrites(row) if isinstance(row, Mapping) else [row]


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
    if request.attributes:
        row["attributes"] = list(request.attributes)
    if request.portability:
        row["portability"] = [{"prompt": p.prompt, "target": p.target} for p in request.portability]
    if request.generation_prompts:
        row["generation_prompts"] = list(request.generation_prompts)
    if request.references:
        row["references"] = list(request.references)
    if request.relation_id is not None:
        row["relation_id"] = request.relation_id
    return row


def _case_id(row: Row) -> str | None:
    name = "id" if "id" in row else "case_id"
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value is None else clean_text(value, field=name, one_line=True)


def _request(parts: Parts, case_id: str | None, provenance: Provenance | None) -> EditRequest:
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
        attributes=tuple(dict.fromkeys(_other(p) for p in parts.attributes)),
        portability=tuple(dict.fromkeys(_neighbour(*p) for p in parts.portability)),
        generation_prompts=tuple(
            dict.fromkeys(_paraphrase(p, subject) for p in parts.generation_prompts)
        ),
        references=tuple(
            dict.fromkeys(clean_text(r.value, field=r.field) for r in parts.references)
        ),
        relation_id=_relation_id(parts.relation_id),
        provenance=provenance,
    )
    if case_id is None:
        request = EditRequest(**{**vars(request), "case_id": request.digest[:16]})
    return request


def _paraphrase(paraphrase: Named, subject: str) -> str:
    text = clean_text(paraphrase.value, field=paraphrase.field)
    if text.count("{}") > 1:
        raise InputError(f"several {{}} in {text!r}", field=paraphrase.field)
    return text.replace("{}", subject)


def _neighbour(prompt: Named, target: Named) -> Neighbour:
    return Neighbour(
        prompt=_other(prompt), target=clean_text(target.value, field=target.field, one_line=True)
    )


def _other(prompt: Named) -> str:
    """A prompt about something else than the fact's subject."""
    text = clean_text(prompt.value, field=prompt.field)
    if "{}" in text:
        raise InputError(
            f"{{}} in {text!r}; such a prompt names its own subject", field=prompt.field
        )
    return text


def _relation_id(named: Named | None) -> str | None:
    """A number will do, too."""
    if named is None:
        return None
    value = named.value
    if isinstance(value, float) and value.is_integer():  # as tables of numbers with gaps have them
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return clean_text(value, field=named.field, one_line=True)


_PLAIN = ("subject", "prompt", "target_new")
_LISTS = ("paraphrases", "neighbourhood", "neighborhood")
NATIVE = Layout(name="native", marks=_PLAIN, needs=_PLAIN, nested=_LISTS, read=read_native)

# Of several that fit, the first is taken, so the telling ones come first.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="MQuAKE",
        marks=("new_answer", "new_single_hops"),
        needs=("requested_rewrite", "questions", "new_answer"),
        nested=("requested_rewrite", "questions", "new_single_hops"),
        read=read_mquake,
    ),
    Layout(
        name="CounterFact",
        marks=("requested_rewrite",),
        needs=("requested_rewrite",),
        nested=("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),
        read=read_counterfact,
    ),
    Layout(
        name="native",
        marks=_LISTS,
        needs=_PLAIN,
        nested=_LISTS,
        read=read_native,
    ),
    Layout(
        name="zsRE (MEND)",
        marks=("src", "alt"),
        needs=("subject", "src", "alt"),
        nested=("answers",),
        read=read_zsre_mend,
    ),
    Layout(
        name="KnowEdit WikiBio",
        marks=("concept",),
        needs=("concept", "text", "labels"),
        nested=("locality",),
        read=read_wikibio,
    ),
    Layout(
        name="KnowEdit",
        marks=("locality", "portability"),
        needs=_PLAIN,
        nested=("locality",),
        read=read_easyedit,
    ),
    Layout(
        name="EasyEdit",
        marks=("ground_truth", "rephrase_prompt", "rephrase", "locality_prompt"),
        needs=_PLAIN,
        nested=("locality",),
        read=read_easyedit,
    ),
    NATIVE,
    Layout(
        name="RippleEdits",
        marks=("edit", "Compositionality_I"),
        needs=("edit",),
        nested=("edit", *STAY, *FOLLOW),
        read=read_ripple_edits,
    ),
)
