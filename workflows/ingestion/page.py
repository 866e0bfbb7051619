"""The history of a registry as a single HTML page that needs nothing else, not even a script.

Turns a `PageHistory` into what `templates/history.html.j2` shows, with the look of the report of an
edit. Knows how to say what happened (`page_plots` draws it); does not know a registry, a source or
a fact log (whoever fills a `PageHistory` does). Trusts no text in it: names, places, reasons and
rows pass through `_shown` and the template's escaping, and none of them gets into a drawing.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from memedit.writing import whole_file
from workflows.ingestion.page_plots import Band, Timeline, facts_plot, metrics_plot
from workflows.metrics import METRIC, metrics_to_show
from workflows.pages import page_templates
from workflows.plots import SERIES
from workflows.version_tables import time_text
from workflows.wording import plural, without_keys

SHOWN_VERSIONS = 25
"""How many versions stand open; the older ones are folded."""
SHOWN_REJECTS = 200
SHOWN_REASONS = 20
"""How many reasons have their own group; the rarer ones share one."""
SHOWN_SOURCES = len(SERIES)
"""How many sources have a colour; the smaller ones share one."""
SHOWN_CHARACTERS = 300
"""Of any text of a source, a fact or a person."""
COLUMNS = ("score", "efficacy", "paraphrase", "neighbourhood", "perplexity")
"""The metrics in the table of versions; all of them stand beside the current version."""
LINES = COLUMNS[:4]
"""The metrics in percent that share a drawing."""
STATES = {
    "active": "what the model should know",
    "superseded": "a newer row says otherwise",
    "retracted": "the source says it no longer",
    "quarantined": "held back, in no version",
}


@dataclass(frozen=True, kw_only=True)
class PageVersion:
    """One published version."""

    run_id: str
    created_at: str
    """ISO 8601, UTC; so are all times here."""
    moved_at: str | None = None
    """When CURRENT last moved to it."""
    current: bool = False
    method: str = ""
    facts: int
    """In the version, over all sources."""
    added: int | None = None
    """Against the version before it, as `superseded` and `retracted`; None: not known."""
    superseded: int | None = None
    retracted: int | None = None
    rejected: int | None = None
    """Rows that could not become facts in this run."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """By `memedit.outcome.METRIC_KEYS`."""
    path: str = ""
    pinned: bool = False
    problems: tuple[str, ...] = ()
    by: Literal["publish", "rollback", ""] = ""
    """What moved CURRENT to it."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """Active facts by the name of their source; empty: not known."""


@dataclass(frozen=True, kw_only=True)
class PageSource:
    """A place that facts come from."""

    name: str
    kind: str
    place: str
    active: int
    """Its facts that are active now."""
    last_read: str | None = None
    snapshot: str | None = None
    """What was read then."""


@dataclass(frozen=True, kw_only=True)
class PageReject:
    """A row that could not become a fact."""

    at: str
    source: str
    place: str
    row: int | None = None
    field: str | None = None
    reason: str
    raw: str = ""


@dataclass(frozen=True, kw_only=True)
class PageHistory:
    """All that the page tells."""

    registry: str
    model: str
    generated_at: str
    current: str | None
    versions: tuple[PageVersion, ...] = ()
    """The newest first."""
    sources: tuple[PageSource, ...] = ()
    rejects: tuple[PageReject, ...] = ()
    """The newest ones, the newest first."""
    rejects_total: int = 0
    states: Mapping[str, int] = field(default_factory=dict)
    """How many facts of the registry are in each of `STATES`."""


def write_page(history: PageHistory, path: Path) -> None:
    """Write the page of `history` to `path`, whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    text = render_page(history)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def render_page(history: PageHistory) -> str:
    """The page as text."""
    environment = page_templates()
    environment.filters |= {"shown": _shown, "isolated": _isolated, "time": _time, "count": _count}
    return environment.get_template("history.html.j2").render(_context(history))


def _context(history: PageHistory) -> dict[str, Any]:
    versions = history.versions
    at = next((i for i, v in enumerate(versions) if v.current), None)
    now = None if at is None else versions[at]
    before = None if at is None or at + 1 == len(versions) else versions[at + 1]
    bands = _bands(versions)
    colours = {b.source: i for i, b in enumerate(bands) if b.source is not None}
    measured = [k for k in COLUMNS if any(_real(v.metrics.get(k)) for v in versions)]
    rows = [_version(v, measured) for v in versions]
    old_to_new = versions[::-1]
    line = Timeline(
        times=tuple(v.created_at for v in old_to_new),
        current=None if at is None else len(versions) - 1 - at,
    )
    measures = {k: [v.metrics.get(k) for v in old_to_new] for k in COLUMNS}
    shares = {k: measures[k] for k in LINES}
    perplexity = {"perplexity": measures["perplexity"]}
    return {
        "history": history,
        "now": now,
        "newer": at or 0,
        "facts_change": _signed(now.facts - before.facts) if now and before else "",
        "headline": _headline(now, before),
        "metrics": _metrics(now, before),
        "before": before,
        "measured": [METRIC[k] for k in measured],
        "open_rows": rows[:SHOWN_VERSIONS],
        "folded_rows": rows[SHOWN_VERSIONS:],
        "facts_plot": Markup(facts_plot(line, bands, [v.facts for v in old_to_new])),
        "bands": bands,
        "metrics_plot": Markup(metrics_plot("shares", line, shares)),
        "perplexity_plot": Markup(metrics_plot("perplexity", line, perplexity)),
        "states": _states(history.states),
        "sources": [(s, colours.get(s.name)) for s in history.sources],
        "groups": _groups(history.rejects[:SHOWN_REJECTS]),
        "n_shown": len(history.rejects[:SHOWN_REJECTS]),
        "plural": plural,
    }


# The words -------------------------------------------------------------------------------------


def _real(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shown(text: object, characters: int = SHOWN_CHARACTERS) -> str:
    """A text on one line, cut, without secrets and without signs that steer a terminal or a line.

    A lone surrogate cannot be written as UTF-8, and an override of the direction of writing would
    let a text look like another one.
    """
    line = " ".join(without_keys(str(text)[: 10 * characters]).split())
    if len(line) > characters:
        line = line[: characters - 1].rstrip() + "…"
    kept = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in kept
        else c
        for c in line
    )


def _isolated(text: object, characters: int = SHOWN_CHARACTERS) -> Markup:
    """`_shown`, escaped, as an element of its own direction of writing."""
    return Markup('<bdi dir="auto">{}</bdi>').format(_shown(text, characters))


def _time(text: str | None) -> str:
    return _shown(time_text(text))


def _signed(number: int) -> str:
    return f"{number:+,}".replace("-", "\N{MINUS SIGN}") if number else "the same"


def _count(number: int | None) -> str:
    return "n/a" if number is None else f"{number:,}"


def _headline(now: PageVersion | None, before: PageVersion | None) -> list[dict[str, Any]]:
    """The metrics of the current version that stand large above everything."""
    if now is None:
        return []
    return [
        _metric(key, now, before)
        for key in ("score", "efficacy", "neighbourhood")
        if _real(now.metrics.get(key))
    ]


def _metrics(now: PageVersion | None, before: PageVersion | None) -> list[dict[str, Any]]:
    if now is None:
        return []
    shown = metrics_to_show(now.metrics)
    return [_metric(m.key, now, before) for m in shown if _real(now.metrics.get(m.key))]


def _metric(key: str, now: PageVersion, before: PageVersion | None) -> dict[str, Any]:
    metric = METRIC[key]
    new, old = now.metrics.get(key), before.metrics.get(key) if before else None
    change, tone = metric.change(old, new)
    return {
        "metric": metric,
        "before": metric.show(old),
        "now": metric.show(new),
        "change": change.replace("-", "\N{MINUS SIGN}"),
        "tone": tone,
    }


def _version(version: PageVersion, measured: Sequence[str]) -> dict[str, Any]:
    signs = {"added": "+", "superseded": "↻", "retracted": "\N{MINUS SIGN}"}
    found = {name: getattr(version, name) for name in signs}
    known = {name: number for name, number in found.items() if number is not None}
    some = {name: number for name, number in known.items() if number}
    return {
        "version": version,
        "known": bool(known),
        "signs": " ".join(f"{signs[n]}{number:,}" for n, number in some.items()),
        "words": ", ".join(f"{number:,} {n}" for n, number in some.items()),
        "metrics": [(METRIC[k].label, METRIC[k].show(version.metrics.get(k))) for k in measured],
    }


def _states(states: Mapping[str, int]) -> list[tuple[str, str, int, float]]:
    """(state, meaning, facts, percent of all), in the order of `STATES`, unknown ones last."""
    total = sum(states.values())
    names = [n for n in STATES if n in states] + [n for n in states if n not in STATES]
    return [(n, STATES.get(n, ""), states[n], 100 * states[n] / max(total, 1)) for n in names]


def _groups(rejects: Sequence[PageReject]) -> list[tuple[str, list[PageReject]]]:
    """(reason, rejects), the commonest first; reasons that differ in a name or a number are one."""
    kinds: dict[str, list[PageReject]] = {}
    for reject in rejects:
        kinds.setdefault(_kind(reject.reason), []).append(reject)
    groups = sorted(kinds.items(), key=lambda group: -len(group[1]))
    rare = [r for _, found in groups[SHOWN_REASONS:] for r in found]
    named = [
        (found[0].reason if len({r.reason for r in found}) == 1 else kind, found)
        for kind, found in groups[:SHOWN_REASONS]
    ]
    return [*named, ("Other reasons", rare)] if rare else named


def _kind(reason: str) -> str:
    """What a reason is without the names and numbers of the row that it is about."""
    text = reason[: 2 * SHOWN_CHARACTERS]
    return re.sub(r"(?<!\w)'[^']*'|\"[^\"]*\"|\d+(?:[.,]\d+)*", "…", text)


def _bands(versions: Sequence[PageVersion]) -> list[Band]:
    """The largest sources, then all other facts; what has no facts anywhere is left out."""
    old_to_new = versions[::-1]
    most: dict[str, int] = {}
    for version in old_to_new:
        for name, count in version.sources.items():
            most[name] = max(count, most.get(name, 0))
    ranked = sorted((n for n in most if most[n] > 0), key=lambda n: -most[n])
    named = ranked[:SHOWN_SOURCES]
    bands = [
        Band(name, name, tuple(max(v.sources.get(name, 0), 0) for v in old_to_new))
        for name in named
    ]
    rest = tuple(
        max(v.facts - sum(v.sources.get(name, 0) for name in named), 0) for v in old_to_new
    )
    others = len(ranked) - len(named)
    label = plural(others, "other source") if others else "source not recorded"
    return [*bands, Band(None, label, rest)] if any(rest) else bands
