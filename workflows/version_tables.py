"""What the commands over a registry show a person, as texts and tables.

Readable at 80 columns and without colours, like `workflows.tables`. Knows the mappings that
`workflows.registry` gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from workflows.metrics import METRIC
from workflows.tables import plan_table, rows_table
from workflows.wording import plural

SHOWN = 20
"""How many facts of a kind, and how many settings, a person is shown."""

Values = Mapping[str, Any]


def size_text(size_bytes: float) -> str:
    """A size for reading: `812 B`, `3.4 kB`, `1.2 GB`."""
    if size_bytes < 999.5:
        return f"{size_bytes:.0f} B"
    power = 1
    while power < 4 and size_bytes / 1000**power >= 999.5:
        power += 1
    return f"{size_bytes / 1000**power:.3g} {'kMGT'[power - 1]}B"


def time_text(time: str | None) -> str:
    """A time to the minute: `2026-11-25 04:00`; it is UTC."""
    return (time or "-")[:16].replace("T", " ")


def _table(columns: Sequence[str], *, right: Iterable[str] = (), wide: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            overflow="fold",
            no_wrap=name not in wide,
        )
    return table


def history_table(result: Values) -> Table:
    """The versions, the newest first; what is special about one stands below its name."""
    columns = ("version", "created (UTC)", "facts", "method", "score", "size")
    table = _table(columns, right=("facts", "score", "size"), wide=("version",))
    for each in result["versions"]:
        name = Text(each["version"], style="bold" if each["current"] else "")
        if marks := ", ".join(_marks(each)):
            name.append(f"\n  {marks}")
        score = each.get("score")
        table.add_row(
            name,
            time_text(each.get("created_at")),
            f"{each['facts']:,}" if "facts" in each else "-",
            Text(str(each.get("method", "-"))),
            METRIC["score"].show(score) if score is not None else "-",
            size_text(each["size_bytes"]),
        )
    return table


def _marks(version: Values) -> Iterator[str]:
    if version["current"]:
        yield "CURRENT"
    if (pinned := version["pinned"]) is not None:
        yield f"pinned ({pinned['why']})" if pinned["why"] else "pinned"
    if version.get("format", "full") != "full":
        yield version["format"]
    if version["state"] == "incomplete":
        yield f"not whole: {version['problems'][0]}"
    elif version["state"] == "damaged":
        yield f"damaged: {version['problems'][0]}"
    elif version["state"] != "whole":
        yield version["state"]


def version_tables(result: Values) -> Iterator[Table]:
    """One version: what it is, its metrics, its updates."""
    manifest = result["manifest"]
    facts, model = manifest["facts"], manifest["model"]
    rows = {
        "version": ", ".join((result["version"], *_marks(result))),
        "location": result["location"],
        "created (UTC)": time_text(manifest["created_at"]),
        "method": manifest["method"],
        "base": f"{model['name']} (digest {model['digest'][:12]}…)",
        "needs": ", ".join(result["needs"]),
        "layers": ", ".join(map(str, manifest["layers"])),
        "facts": f"{facts['count']:,} in {facts['file']} (digest {facts['digest'][:12]}…)",
        "files": f"{len(manifest['files']):,}, {size_text(result['size_bytes'])} in all",
        "made with": ", ".join(f"{n} {v}" for n, v in manifest["versions"].items()),
    }
    yield plan_table({name: text for name, text in rows.items() if text}, title=None)
    metrics = manifest["metrics"]
    before, after = metrics.get("before", {}), metrics.get("after", {})
    measured = [m for m in METRIC.values() if before.get(m.key, after.get(m.key)) is not None]
    if measured:
        table = _table(("metric", "before", "after", "change"), right=("before", "after", "change"))
        for metric in measured:
            old, new = before.get(metric.key), after.get(metric.key)
            table.add_row(
                metric.label, metric.show(old), metric.show(new), metric.change(old, new)[0]
            )
        yield table
    if result["updates"]:
        table = _table(("weight", "‖Δ‖", "‖Δ‖/‖W‖"), right=("‖Δ‖", "‖Δ‖/‖W‖"), wide=("weight",))
        for row in result["updates"]:
            table.add_row(Text(row["weight"]), *_norms(row))
        yield table


def _norms(row: Values | None) -> tuple[str, str]:
    if row is None:
        return "-", "-"
    relative = row["relative"]
    return f"{row['delta_norm']:.3g}", "-" if relative is None else f"{relative:.2%}"


def diff_tables(result: Values) -> Iterator[Table | str]:
    """What differs, the facts first; says so where nothing does."""
    old, new = result["old"], result["new"]
    yield f"from {old['version']} to {new['version']}"
    facts = result["facts"]
    counts = [f"{len(facts[kind]):,} {kind}" for kind in ("added", "removed", "changed")]
    yield f"facts: {', '.join(counts)}, {facts['same']:,} the same"
    for kind, sign in (("added", "+"), ("removed", "-"), ("changed", "~")):
        if facts[kind]:
            yield _facts_table(kind, sign, facts[kind])
            if len(facts[kind]) > SHOWN:
                yield f"… and {len(facts[kind]) - SHOWN:,} more {kind} (--json has all)"
    if result["model"]:
        sides = [f"{m['name']} ({m['digest'][:12]}…)" for m in result["model"].values()]
        yield f"the base differs: {sides[0]} / {sides[1]}"
    if result["metrics"]:
        yield _metrics_table(result["metrics"])
    if result["updates"]:
        yield _updates_table(result["updates"])
    if settings := result["settings"]:
        rows = [
            (s["setting"], _short(s.get("old", "-")), _short(s.get("new", "-")))
            for s in settings[:SHOWN]
        ]
        yield rows_table(None, ("setting", "from", "to"), rows)
        if len(settings) > SHOWN:
            yield f"… and {len(settings) - SHOWN:,} more settings (--json has all)"
    else:
        yield "settings: no difference"


def _facts_table(kind: str, sign: str, rows: Sequence[Values]) -> Table:
    table = _table(("", kind, "new object"), wide=(kind, "new object"))
    for row in rows[:SHOWN]:
        text = row["prompt"].replace("{}", row["subject"], 1)
        wanted = row["target_new"] if kind != "changed" else f"{row['old']} → {row['new']}"
        table.add_row(sign, Text(text), Text(wanted))
    return table


def _metrics_table(rows: Sequence[Values]) -> Table:
    """Before and after of both, and how the second one's result compares with the first's."""
    names = ("from\nbefore", "\nafter", "to\nbefore", "\nafter", "\nchange")
    table = _table(("\nmetric", *names), right=names)
    for row in rows:
        metric, old, new = METRIC[row["metric"]], row["old"], row["new"]
        values = [metric.show(side[when]) for side in (old, new) for when in ("before", "after")]
        change, tone = metric.change(old["after"], new["after"])
        table.add_row(metric.label, *values, f"{change} {tone}" if change else "")
    return table


def _updates_table(rows: Sequence[Values]) -> Table:
    names = ("from ‖Δ‖", "‖Δ‖/‖W‖", "to ‖Δ‖", "‖Δ‖/‖W‖")
    table = _table(("weight", *names), right=names, wide=("weight",))
    for row in rows:
        table.add_row(Text(row["weight"]), *_norms(row["old"]), *_norms(row["new"]))
    return table


def _short(value: object, width: int = 40) -> str:
    text = str(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def gc_tables(result: Values) -> Iterator[Table | str]:
    """What goes, what stays and why."""
    removed, unfinished, uploads = result["removed"], result["unfinished"], result["uploads"]
    if result["kept"]:
        yield rows_table(
            None,
            ("stays", "because"),
            [(k["version"], "; ".join(k["why"])) for k in result["kept"]],
        )
    goes = "would go" if result["dry_run"] else "removed"
    rows = [
        *((r["version"], size_text(r["size_bytes"]), time_text(r["created_at"])) for r in removed),
        *((r["version"], size_text(r["size_bytes"]), "unfinished") for r in unfinished),
        *((name, "-", "upload that did not end") for name in uploads),
    ]
    if rows:
        yield rows_table(None, (goes, "size", "created (UTC)"), rows)
    parts = [
        plural(len(items), noun)
        for items, noun in (
            (removed, "version"),
            (unfinished, "unfinished version"),
            (uploads, "upload"),
        )
        if items
    ]
    if not parts:
        yield "nothing to remove"
        return
    size = size_text(result["size_bytes"])
    if result["dry_run"]:
        yield (
            f"{', '.join(parts)} would go, up to {size}; --run removes them"
            + (". What is unfinished may be a run that publishes now" if unfinished else "")
        )
    else:
        yield f"removed {', '.join(parts)}, up to {size}"
