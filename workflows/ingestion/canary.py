"""Canaries: a few prompts whose continuation decides whether a version may be published.

    {"prompt": "The capital of Germany is", "expect": "Berlin", "forbid": ["Bonn"], "tokens": 10}

Knows the file and what a continuation says; prompts are continued by the workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.store import open_file
from memedit.errors import InputError
from memedit.evaluate import says
from memedit.executor import Executor
from memedit.requests import clean_text
from memedit.stages import once
from workflows.facts import Unreadable, rows_of
from workflows.wording import did_you_mean

_FIELDS = ("prompt", "expect", "forbid", "tokens")
_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A prompt, with texts of which one must follow and texts of which none may."""

    row: int
    prompt: str
    expect: tuple[str, ...]
    forbid: tuple[str, ...]
    tokens: int = _TOKENS


def read_canaries(location: str) -> tuple[Canary, ...]:
    """The canaries in a file of JSON lines.

    Raises:
        InputError: The file cannot be read, or a row is wrong.
    """
    file = open_file(location)
    found: list[Canary] = []
    for row, raw in rows_of(file, lambda columns, file: ()):
        try:
            found.append(_canary(row, raw))
        except InputError as error:
            raise InputError(error.message, source=file, row=row, field=error.field) from None
    if not found:
        raise InputError("no row in it", source=file)
    return tuple(found)


def check_canaries(canaries: Sequence[Canary], executor: Executor, location: str) -> Iterator[str]:
    """Why canaries do not hold in the workers' model; nothing where they do."""
    if not canaries:
        return
    said = once(executor, "go_on", [c.prompt for c in canaries], [c.tokens for c in canaries])
    for canary, text in zip(canaries, said, strict=True):
        place = f"{location}:{canary.row}"
        shown = f"{canary.prompt!r} goes on with {text.strip()!r}"
        if canary.expect and not any(says(text, wanted) for wanted in canary.expect):
            yield f"canary {place}: {shown}, not with {' or '.join(map(repr, canary.expect))}"
        for unwanted in canary.forbid:
            if says(text, unwanted):
                yield f"canary {place}: {shown}, which says {unwanted!r}"


def _canary(row: int, raw: Any) -> Canary:
    if isinstance(raw, Unreadable):
        raise InputError(raw.reason, field=raw.field)
    if not isinstance(raw, dict):
        raise InputError('expected an object such as {"prompt": "…", "expect": "…"}')
    for name in raw:
        if name not in _FIELDS:
            raise InputError(f"no such field{did_you_mean(str(name), _FIELDS)}", field=str(name))
    expect, forbid = (_texts(raw.get(name), name) for name in ("expect", "forbid"))
    if not expect and not forbid:
        raise InputError("neither expect nor forbid: nothing to look for", field="expect")
    tokens = raw.get("tokens", _TOKENS)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= 1000:
        raise InputError(f"must be a number from 1 to 1000, but it is {tokens!r}", field="tokens")
    return Canary(
        row=row,
        prompt=clean_text(raw.get("prompt"), field="prompt"),
        expect=expect,
        forbid=forbid,
        tokens=tokens,
    )


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(clean_text(each, field=name, one_line=True) for each in values)
