"""Getting at the values of a raw row: each with the field that it came from, for the errors.

Knows rows as JSON has them. Does not know which data set names what (`memedit.layout_readers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from memedit.errors import InputError
from memedit.requests import type_name

Row = Mapping[str, Any]


class Named(NamedTuple):
    """A value and the field of the row it came from, so that an error can name that field."""

    field: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A row's values by their roles, not yet checked."""

    subject: Named
    prompt: Named
    target_new: Named
    target_true: Named | None = None
    paraphrases: Iterable[Named] = ()
    neighbourhood: Iterable[tuple[Named, Named]] = ()
    attributes: Iterable[Named] = ()
    portability: Iterable[tuple[Named, Named]] = ()
    generation_prompts: Iterable[Named] = ()
    references: Iterable[Named] = ()
    relation_id: Named | None = None


def get(row: Row, *path: str) -> Named:
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
    return Named(".".join(path), value)


def maybe(row: Row, *names: str) -> Named | None:
    """The first of these fields that the row has."""
    return next((Named(n, row[n]) for n in names if row.get(n) is not None), None)


def items(named: Named | None) -> Iterator[Named]:
    """The items of a list; none for an absent field."""
    if named is None:
        return
    if not isinstance(named.value, list | tuple):
        raise InputError(f"expected a list, found {type_name(named.value)}", field=named.field)
    for index, value in enumerate(named.value):
        yield Named(f"{named.field}[{index}]", value)


def one_or_many(named: Named | None) -> Iterator[Named]:
    """As `items`, but a single text will do; empty ones mean that there is none."""
    if named is not None and isinstance(named.value, str):
        named = Named(named.field, [named.value] if named.value.strip() else [])
    return items(named)


def pairs(
    prompts: Iterable[Named], answers: Iterable[Named], field: str
) -> Iterator[tuple[Named, Named]]:
    """Prompts and answers that stand side by side in two lists; no answers means no pairs."""
    left, right = list(prompts), list(answers)
    if right and len(left) != len(right):
        raise InputError(
            f"{len(left)} prompts but {len(right)} answers; there must be one for each",
            field=field,
        )
    for prompt, answer in zip(left, right, strict=False):
        first = next(texts_in(answer), None)
        if first is not None:
            yield prompt, first


def texts_in(named: Named | None) -> Iterator[Named]:
    """The texts in arbitrarily nested lists of equally good answers; placeholders are left out."""
    if named is None:
        return
    if isinstance(named.value, list | tuple):
        for item in items(named):
            yield from texts_in(item)
    elif named.value not in ("", None, "<|endoftext|>"):
        yield named


def inside(item: Named, name: str) -> Named | None:
    """A field of an object in the row; None where it is absent."""
    if not isinstance(item.value, Mapping):
        raise InputError(f"expected an object, found {type_name(item.value)}", field=item.field)
    value = item.value.get(name)
    return None if value is None else Named(f"{item.field}.{name}", value)
