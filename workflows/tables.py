"""The tables on a terminal: before and after, continuations, plan, doctor.

Readable at 80 columns and without colours; words carry the meaning, colour repeats it. Knows what
to show; `workflows.cli` decides where it is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from memedit.outcome import Evaluation, FactResult
from workflows.findings import sample
from workflows.metrics import change_interval_text, interval_text, metrics_to_show, resting_on

_TONES = {"better": "blue", "worse": "dark_orange3", "same": "dim"}
"""Blue against orange: told apart by every common kind of colour blindness."""


def _table(title: str | None = None, **options: object) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
        **options,  # type: ignore[arg-type]
    )


def before_after_table(
    before: Evaluation,
    after: Evaluation,
    changes: Mapping[str, Sequence[float]] | None = None,
) -> Table:
    """The metrics before and after, the change, and whether it is for the better.

    Args:
        before: The evaluation of the base.
        after: That of the edited model.
        changes: The 95% interval of each change; without them, those of the metrics after the edit
            are shown, and on how many judgements they rest.
    """
    table = _table()
    table.add_column("metric", no_wrap=True)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("95%", "of") if changes is None else ("95% of change",):
        table.add_column(name, justify="right", no_wrap=True, style="dim")
    counts = resting_on(after.facts)
    for metric in metrics_to_show(before.metrics, after.metrics):
        key = metric.key
        old, new = before.metrics.get(key), after.metrics.get(key)
        change, tone = metric.change(old, new)
        if changes is None:
            count = f"{counts[key]:,}" if key in counts else ""
            certainty = [interval_text(after.intervals.get(key), metric), count]
        else:
            interval = change_interval_text(changes.get(key), metric)
            certainty = [interval.replace("\N{MINUS SIGN}", "-")]
        table.add_row(
            metric.label + (" %" if metric.percent else ""),
            metric.show(old),
            Text(metric.show(new), style="bold"),
            Text(change, style=_TONES[tone]),
            Text(tone if change else "", style=_TONES[tone]),
            *certainty,
            end_section=key in ("score", "generation"),
        )
    return table


def continuations_table(
    before: Sequence[FactResult], after: Sequence[FactResult], n: int = 6
) -> Table:
    """What the model says after `n` evenly chosen prompts, before and after, and what it should."""
    table = _table()
    table.add_column("prompt", ratio=5, overflow="fold")
    table.add_column("before", ratio=4, overflow="fold", style="dim")
    table.add_column("after", ratio=4, overflow="fold")
    table.add_column("wanted", ratio=3, overflow="fold")
    for old, new in sample(before, after, n):
        mark = "yes" if new.generation else "no"
        wanted = Text(f"{new.target_new} ")
        wanted.append(f"({mark})", style=_TONES["better" if new.generation else "worse"])
        table.add_row(Text(new.prompt), Text(said(old)), Text(said(new)), wanted)
    return table


def said(fact: FactResult | None, width: int = 60) -> str:
    """A continuation on one line, cut at `width` characters; a dash where there is none."""
    text = " ".join(fact.continuation.split()) if fact else ""
    return (text if len(text) <= width else text[: width - 1].rstrip() + "…") or "-"


def rows_table(title: str | None, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A plain table of texts; the last column takes what room is left."""
    table, names = _table(title), list(columns)
    for name in names[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(names[-1], overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def plan_table(plan: Mapping[str, object], title: str | None = "plan") -> Table:
    """What a run would do, a line per item: `{"layers": "5-9", "shards touched": "1 of 2"}`."""
    table = _table(title, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in plan.items():
        table.add_row(name, Text(_value(value)))
    return table


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return "-" if value is None else str(value)


_STATES = {"ok": "green", "missing": "bold red", "failed": "bold red", "warning": "dark_orange3"}


def doctor_table(rows: Iterable[tuple[str, str, str]], title: str | None = None) -> Table:
    """Rows of (name, state, remedy or detail); states are `ok`, `warning`, `missing`, `failed`."""
    table = _table(title)
    table.add_column("what", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("detail or remedy", overflow="fold")
    for name, state, remedy in rows:
        table.add_row(Text(name), Text(state, style=_STATES.get(state, "")), Text(remedy))
    return table
