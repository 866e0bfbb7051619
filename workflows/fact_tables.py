"""Tables of facts and of ingestions, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from workflows.metrics import metrics_to_show
from workflows.tables import rows_table
from workflows.wording import plural


def ingest_tables(outcome: Any) -> Iterable[Table | str]:
    """What a run of ingest has done."""
    if isinstance(outcome, Mapping):
        yield str(outcome["status"])
        return
    facts = outcome.facts
    headline = {
        "published": f"published {outcome.version}",
        "unchanged": f"unchanged: CURRENT is {outcome.version or 'nothing'}",
        "gated": f"not published: {outcome.run_id}; CURRENT stays {outcome.version or 'nothing'}",
        "planned": f"a dry run: {outcome.changes.get('would')} ({outcome.run_id})",
    }[outcome.status]
    yield headline
    rows = [
        (
            "facts",
            f"{facts['active']:,} active: +{facts['added']:,} new, {facts['superseded']:,}"
            f" superseded, {facts['retracted']:,} retracted",
        ),
        ("rejected", f"{plural(facts['rejected'], 'row')}; memedit facts rejects"),
        (
            "z vectors",
            f"{outcome.targets['computed']:,} computed, {outcome.targets['reused']:,} reused",
        ),
        ("report", outcome.report),
    ]
    if not facts["rejected"]:
        del rows[1]
    yield rows_table(None, ("", ""), [(name, value) for name, value in rows if value])
    before, after = (outcome.metrics.get(when) or {} for when in ("before", "after"))
    shown = [
        (m.label, m.show(before.get(m.key)), m.show(after.get(m.key)))
        for m in metrics_to_show(before, after)
        if after.get(m.key) is not None
    ]
    if shown:
        yield rows_table(None, ("metric", "base", "edited"), shown)
    if outcome.hurt:
        hurt = [
            (h["id"], "new" if h["new"] else "", f"{h['prompt']} {h['target_new']}", h["reason"])
            for h in outcome.hurt[:20]
        ]
        yield rows_table("facts that went badly", ("id", "", "fact", ""), hurt)
    for name in ("added", "superseded", "retracted"):
        if some := outcome.changes.get(name):
            lines = [(f["id"], f["subject"], f["target_new"]) for f in some]
            yield rows_table(name, ("id", "subject", "target"), lines)
    yield from outcome.notes


def facts_tables(result: Mapping[str, Any]) -> Iterable[Table | str]:
    """Facts, one a line."""
    if "written" in result:
        yield f"{plural(result['written'], 'fact')} written to {result['out']}"
        return
    rows = [
        (
            f["id"],
            f["state"],
            f["subject"],
            f["target_new"],
            f"{f['source']} {f['place']}:{f['row']}",
        )
        for f in result["facts"]
    ]
    if rows:
        yield rows_table(None, ("id", "state", "subject", "target", "from"), rows)
    states = ", ".join(f"{n:,} {state}" for state, n in sorted(result["states"].items()))
    yield f"{len(rows):,} of {result['matching']:,} shown; in the registry: {states or 'none'}"


def changed_tables(result: Mapping[str, Any]) -> Iterable[Table | str]:
    """What a change by hand came to."""
    rows = [(f["id"], f["state"], f["subject"], f["target_new"]) for f in result["facts"]]
    if rows:
        yield rows_table(None, ("id", "is now", "subject", "target"), rows)
    yield (
        f"{plural(result['changed'], 'fact')} changed; {result['active']:,} active."
        " The next memedit ingest publishes this"
    )


def why_tables(result: Mapping[str, Any]) -> Iterable[Table | str]:
    """A fact with its history."""
    for fact in result["facts"]:
        names = ("state", "reason", "source", "place", "row", "snapshot", "valid_from", "valid_to")
        rows = [("fact", f"{fact['prompt'].replace('{}', fact['subject'])} → {fact['target_new']}")]
        rows += [
            (name.replace("_", " "), str(fact[name])) for name in names if fact[name] is not None
        ]
        rows.append(("versions that say it", ", ".join(fact["versions"]) or "none"))
        yield rows_table(f"fact {fact['id']}", ("", ""), rows)
        events = [
            (e["changed_at"], e["state"], e["reason"] or "", f"{e['place']}:{e['row']}", e["run"])
            for e in fact["history"]
        ]
        yield rows_table(None, ("when", "became", "why", "from", "run"), events)


def rejects_tables(result: Mapping[str, Any]) -> Iterable[Table | str]:
    """Dead letters, one a line."""
    if "written" in result:
        yield f"{plural(result['written'], 'row')} written to {result['out']}"
        return
    rows = [
        (r["rejected_at"], f"{r['place']}:{r['row']}", r["field"] or "", r["reason"], r["raw"][:80])
        for r in result["rejects"]
    ]
    if rows:
        yield rows_table(None, ("when", "row", "field", "reason", "raw"), rows)
    else:
        yield "no row was rejected"
