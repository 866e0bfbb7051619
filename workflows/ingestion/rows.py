"""From rows of a source to statements: this is so, or this is not so any more.

Knows the mapping of columns to the fields of a fact, and the templates that make prompts of
relations. What makes a fact valid is in `memedit.layouts` and `memedit.requests`; what follows from
a statement is in `workflows.ingestion.merge`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa

from memedit.errors import InputError
from memedit.layout_readers import EVALUATION_ONLY
from memedit.layouts import NATIVE, layout_of, read_row, to_row
from memedit.requests import (
    EditRequest,
    Provenance,
    as_template,
    clean_text,
    comparable,
    type_name,
)
from workflows.ingestion.source import SourceRow, Unreadable
from workflows.wording import did_you_mean

FIELDS = (
    "id",
    "subject",
    "prompt",
    "target_new",
    "target_true",
    "paraphrases",
    "neighbourhood",
    "relation",
    "asserted_at",
    "retracted",
)
"""What a column can be mapped to."""
_BESIDE = ("relation", "asserted_at", "retracted")
"""Those that are not part of a fact."""
MAX_ROW_BYTES = 1 << 20
_MAX_RAW = 1 << 16
"""How much of a row is kept in the dead letter."""
_YES = {1: True, 0: False}
_WORDS = {
    **dict.fromkeys(("true", "yes", "1", "d", "delete", "deleted", "retract", "retracted"), True),
    **dict.fromkeys(("false", "no", "0", "", "c", "r", "u", "create", "insert", "update"), False),
    **dict.fromkeys(("upsert", "assert", "i"), False),
}

TEXTS = pa.list_(pa.string())
NEIGHBOURS = pa.list_(pa.struct([("prompt", pa.string()), ("target", pa.string())]))
TIME = pa.timestamp("us", tz="UTC")
STATEMENTS = pa.schema(
    [
        ("op", pa.string()),
        ("again", pa.bool_()),
        ("rewritten", pa.bool_()),
        ("fact", pa.string()),
        ("content", pa.string()),
        ("question", pa.string()),
        ("id", pa.string()),
        ("subject", pa.string()),
        ("prompt", pa.string()),
        ("target_new", pa.string()),
        ("target_true", pa.string()),
        ("paraphrases", TEXTS),
        ("neighbourhood", NEIGHBOURS),
        ("relation", pa.string()),
        ("asserted_at", TIME),
        ("place", pa.string()),
        ("row", pa.int64()),
    ]
)
"""`fact`: digest of what the model should say, `content`: of all that the row says of it,
`question`: of subject and prompt, of which one answer can be right at a time. `again`,
`rewritten`: see `SourceRow`."""
DIGEST = 32
"""Hexadecimal digits of a digest in the registry."""


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A row that no fact was made of."""

    place: str
    row: int
    field: str | None
    reason: str
    raw: str
    id: str | None = None
    """Where it can be told."""


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Reads the rows of one source; small enough to be sent to another process."""

    columns: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Relation -> the prompt with `{}`, then its paraphrases."""

    def read(self, rows: Sequence[SourceRow]) -> tuple[pa.RecordBatch, list[DeadLetter]]:
        """Statements (`STATEMENTS`) in the order of the rows, and the rows that are none."""
        statements: list[dict[str, Any]] = []
        dead: list[DeadLetter] = []
        for row in rows:
            try:
                statements.append(self._statement(row))
            except InputError as error:
                dead.append(
                    DeadLetter(
                        place=row.place,
                        row=row.row,
                        field=error.field,
                        reason=error.message,
                        raw=raw_text(row.raw),
                        id=self._id(row.raw),
                    )
                )
        columns = {name: [s.get(name) for s in statements] for name in STATEMENTS.names}
        return pa.RecordBatch.from_pydict(columns, schema=STATEMENTS), dead

    def _statement(self, row: SourceRow) -> dict[str, Any]:
        if isinstance(row.raw, Unreadable):
            raise InputError(row.raw.reason, field=row.raw.field)
        if not isinstance(row.raw, Mapping):
            raise InputError(f"expected an object with the fact's fields, found {_type(row.raw)}")
        _check_size(row.raw)
        fields = self._fields(row.raw)
        beside = {name: fields.pop(name, None) for name in _BESIDE}
        relation = _text(beside["relation"], "relation")
        retracted = _truth(beside["retracted"])
        statement: dict[str, Any] = {
            "op": "retract" if retracted else "assert",
            "again": row.again,
            "rewritten": row.rewritten,
            "asserted_at": _time(beside["asserted_at"]),
            "relation": relation,
            "place": row.place,
            "row": row.row,
        }
        if statement["op"] == "retract" and not (
            fields.get("target_new")
            and fields.get("subject")
            and ("prompt" in fields or relation is not None)
        ):
            return statement | self._named(fields, relation)
        fields = self._with_prompts(fields, relation)
        provenance = Provenance(source=row.place, row=row.row)
        layout = NATIVE if self.columns or relation is not None else layout_of(fields)
        # What serves the evaluation alone is not kept, so it cannot make a fact a bad one either.
        fields = {name: value for name, value in fields.items() if name not in EVALUATION_ONLY}
        request = read_row(fields, provenance=provenance, layout=layout)
        return statement | statement_of(request, relation)

    def _id(self, raw: Any) -> str | None:
        """The id in a row that is wrong otherwise."""
        with suppress(InputError):
            return _id(self._fields(raw)) if isinstance(raw, Mapping) else None
        return None

    def _fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The row by the names of a fact's fields; without a mapping, as it is."""
        if not self.columns:
            return {name: value for name, value in raw.items() if value is not None}
        named = {name: raw.get(self.columns.get(name, name)) for name in FIELDS}
        return {name: value for name, value in named.items() if value is not None}

    def _with_prompts(self, fields: dict[str, Any], relation: str | None) -> dict[str, Any]:
        """The row with the prompts of its relation, where it has none of its own."""
        if relation is None or "prompt" in fields:
            return fields
        templates = self.templates.get(relation)
        if templates is None:
            near = did_you_mean(relation, self.templates)
            raise InputError(f"no template for the relation {relation!r}{near}", field="relation")
        prompt, *paraphrases = templates
        return {"prompt": prompt, "paraphrases": paraphrases} | fields

    def _named(self, fields: Mapping[str, Any], relation: str | None) -> dict[str, Any]:
        """What a retraction without a full fact names: a question, or an id."""
        if "subject" in fields and ("prompt" in fields or relation is not None):
            prompted = self._with_prompts(dict(fields), relation)
            subject = clean_text(prompted["subject"], field="subject", one_line=True)
            prompt = clean_text(prompted["prompt"], field="prompt")
            prompt, subject = as_template(prompt, subject, field="prompt")
            return {"question": question_of(subject, prompt), "id": _id(fields)}
        if (name := _id(fields)) is not None:
            return {"id": name}
        raise InputError("a retraction names an id, or a subject and its prompt", field="id")


def statement_of(request: EditRequest, relation: str | None) -> dict[str, Any]:
    """The columns of a fact, with what it is known by."""
    # What serves the evaluation alone is not kept, and a fact stays what it was without it.
    row = {name: value for name, value in to_row(request).items() if name in FIELDS}
    content = json.dumps([row, relation], ensure_ascii=False, sort_keys=True)
    return {
        "fact": request.digest[:DIGEST],
        "content": _digest(content),
        "question": question_of(request.subject, request.prompt),
        "relation": relation,
        "target_true": None,
        "paraphrases": [],
        "neighbourhood": [],
        **row,
    }


def question_of(subject: str, prompt: str) -> str:
    """What two facts share that cannot both be right."""
    # Neither text has a control character.
    return _digest(f"{comparable(subject)}\0{comparable(prompt)}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST]


def raw_text(raw: Any) -> str:
    """A row as JSON for the dead letter; cut where it is very long."""
    if isinstance(raw, Unreadable):
        text = raw.text
    else:
        text = json.dumps(raw, ensure_ascii=False, default=str)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _MAX_RAW else f"{text[:_MAX_RAW]}… ({len(text):,} characters)"


def _type(value: object) -> str:
    return type_name(value)


def _check_size(raw: Mapping[str, Any]) -> None:
    size = 0
    for value in raw.values():
        if isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, list | Mapping):
            size += len(json.dumps(value, default=str))
    if size > MAX_ROW_BYTES:
        raise InputError(f"the row has {size:,} characters; at most {MAX_ROW_BYTES:,} make sense")


def _id(fields: Mapping[str, Any]) -> str | None:
    value = fields.get("id", fields.get("case_id"))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value is None else clean_text(value, field="id", one_line=True)


def _text(value: Any, name: str) -> str | None:
    return None if value is None else clean_text(value, field=name, one_line=True)


def _truth(value: Any) -> bool:
    if value is None:
        return False
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    if isinstance(value, float) and math.isnan(value):  # how a table of floats says nothing
        return False
    if isinstance(value, bool | int | float) and value in _YES:
        return _YES[int(value)]
    raise InputError(f"expected true or false, found {str(value)[:60]!r}", field="retracted")


def _time(value: Any) -> datetime | None:
    if value is None:
        return None
    found = value
    if isinstance(value, str):
        try:
            found = datetime.fromisoformat(value.strip())
        except ValueError:
            found = None
    if isinstance(found, date) and not isinstance(found, datetime):
        found = datetime(found.year, found.month, found.day, tzinfo=UTC)
    if isinstance(found, datetime):
        with suppress(OverflowError):  # in the first or the last hours of the calendar
            return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    raise InputError(
        f"expected a time such as 2026-11-27T02:00:00Z, found {str(value)[:60]!r}",
        field="asserted_at",
    )
