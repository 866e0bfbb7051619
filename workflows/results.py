"""What a person sees on stdout when a command is done; `--json` prints the same as one object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memedit.outcome import EditOutcome
from workflows.fact_tables import (
    changed_tables,
    facts_tables,
    ingest_tables,
    rejects_tables,
    why_tables,
)
from workflows.metrics import (
    METRIC,
    SHOWN_RELATIONS,
    interval_text,
    metrics_to_show,
    pair_cells,
    pairs_metric,
)
from workflows.submit_tables import run_table, runs_table
from workflows.tables import (
    before_after_table,
    continuations_table,
    doctor_table,
    plan_table,
    rows_table,
)
from workflows.version_tables import diff_tables, gc_tables, history_table, version_tables
from workflows.wording import SETTING_NAMES, plural, setting_text

if TYPE_CHECKING:
    from workflows.evaluate import Evaluated


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, soft_wrap=False)


def show_edit(outcome: EditOutcome, stream: TextIO) -> None:
    """Metrics before and after, some continuations, and where everything lies."""
    console = _console(stream)
    console.print(before_after_table(outcome.before, outcome.after))
    console.print(continuations_table(outcome.before.facts, outcome.after.facts))
    facts = outcome.facts
    heldout = outcome.settings.get("heldout")
    rows = [
        ("facts", f"{facts.accepted} of {facts.read} accepted"),
        ("perplexity of", "text sampled from the model" if heldout == "self" else heldout),
        ("settings", outcome.settings.get("origin")),
        ("rejects", facts.rejects),
        (_PUBLISHED[outcome.format], outcome.out),
        ("adapter", _adapter(outcome)),
        ("manifest", outcome.manifest),
        ("report", outcome.report),
    ]
    console.print(
        rows_table(None, ("", ""), [(name, value) for name, value in rows if value]),
    )


_PUBLISHED = {"full": "checkpoint", "delta": "delta", "lora": "LoRA adapter"}


def _adapter(outcome: EditOutcome) -> str | None:
    """The ranks of an adapter, and the most that one took from its update."""
    ranks = sorted({u.rank for u in outcome.updates if u.rank is not None})
    if not ranks:
        return None
    lost = max(u.truncation_error or 0.0 for u in outcome.updates)
    return f"rank {', '.join(map(str, ranks))}; {100 * lost:.2g} % of an update lost at most"


def show_plan(plan: Mapping[str, Any], stream: TextIO) -> None:
    """A line per item; a mapping inside becomes lines of its own."""
    _console(stream).print(plan_table(dict(_flat(plan)), title=None))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for name, value in values.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        lines += _flat(value, f"{label} ") if isinstance(value, Mapping) else [(label, value)]
    return lines


def show_metrics(found: Evaluated, stream: TextIO) -> None:
    """The metrics, beside the base's and with the verdict where the base was judged, too."""
    console, result = _console(stream), found.summary()
    if found.before is not None:
        console.print(before_after_table(found.before, found.after, found.changes))
        told = found.verdict
        console.print(Text(" ".join(filter(None, (told.headline, told.success, told.damage)))))
    else:
        metrics = found.after.metrics
        rows = [
            (
                metric.label,
                metric.show(metrics[metric.key]),
                interval_text(found.after.intervals.get(metric.key), metric),
                metric.meaning,
            )
            for metric in metrics_to_show(metrics)
        ]
        console.print(rows_table(None, ("metric", "value", "95%", "meaning"), rows))
    _show_relations(result["relations"], console)
    facts = result["facts"]
    if result["out"]:
        console.print(f"all of it: {result['out']}")
    if facts["rejected"]:
        console.print(f"{facts['accepted']} of {facts['read']} rows judged; the others are wrong")


_OF_A_RELATION = ("score", "efficacy_exact", "neighbourhood")
"""As many as 80 columns hold."""


def _show_relations(relations: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A line a relation, where some have several facts."""
    shown = [row for row in relations if row["facts"] > 1][:SHOWN_RELATIONS]
    if len(relations) < 2 or not shown:
        return
    keys = [key for key in _OF_A_RELATION if any(key in row["metrics"] for row in shown)]
    rows = []
    for row in shown:
        cells = [f"{row['facts']:,}"]
        for key in keys:
            interval = interval_text(row["intervals"].get(key))
            cells.append(f"{METRIC[key].show(row['metrics'].get(key))} {interval}".strip())
        name = row["relation"] or plural(row["relations"], "other relation")
        rows.append((*cells, name))
    names = ("facts", *(METRIC[key].label for key in keys), "relation")
    console.print(rows_table(None, names, rows))


_COMPARED = ("score", "efficacy_exact", "paraphrase", "neighbourhood", "drift_kl")
"""As many as 80 columns hold."""


def show_comparison(result: Mapping[str, Any], stream: TextIO) -> None:
    """A line a method and number of facts, with the metrics that matter most; then the pairs."""
    console = _console(stream)
    rows = []
    for row in result["rows"]:
        found = row["metrics"] or {}
        shown = (METRIC[key].show(found.get(key)) for key in _COMPARED)
        rows.append((f"{row['edits']:,}", row["method"], *shown, ""))
    labels = (METRIC[key].label.replace(", ", ",\n") for key in _COMPARED)
    console.print(rows_table(None, ("facts", "method", *labels, ""), rows))
    if result["pairs"]:
        metric = pairs_metric(result["pairs"])
        names = ("facts", "method", "together", "apart", "change", "95%", "relations")
        rows = [
            (
                f"{row['edits']:,}",
                row["method"],
                *pair_cells(row, metric),
                "\n".join(row["relations"]),
            )
            for row in result["pairs"]
        ]
        console.print(rows_table(f"{metric.label}, two relations at once", names, rows))
    failed = [(row, plural(row["edits"], "fact")) for row in result["rows"]]
    failed += [(row, " + ".join(row["relations"])) for row in result["pairs"]]
    for row, what in failed:
        if row["failed"]:
            console.print(Text(f"{row['method']}, {what}: {row['failed']}"))
    console.print(f"all of it: {result['out']}")


def show_tuning(result: Mapping[str, Any], stream: TextIO) -> None:
    """A line a trial, what was chosen, and the verdict."""
    console = _console(stream)
    keys = list(dict.fromkeys((result["objective"], "efficacy_exact", "neighbourhood", "drift_kl")))
    rows = []
    for trial in result["trials"]:
        found, moved = trial["metrics"] or {}, trial["moved"]
        value = setting_text(trial["settings"][moved]) if moved else ""
        shown = (METRIC[key].show(found.get(key)) for key in keys)
        what = f"{SETTING_NAMES[moved]} {value}" if moved else "as at first"
        mark = " (chosen)" if trial["trial"] == result["trial"] else ""
        rows.append((f"{trial['trial']}: {what}{mark}", *shown))
    console.print(rows_table(None, ("trial", *(METRIC[key].label for key in keys)), rows))
    chosen = result["chosen"].items()
    lines = [
        *(f"trial {t['trial']}: {t['failed']}" for t in result["trials"] if t["failed"]),
        ", ".join(f"{SETTING_NAMES[name]} {setting_text(value)}" for name, value in chosen),
        result["verdict"]["text"],
        *(f"on the held-out half, {missed}" for missed in result["verdict"]["gates_missed"]),
        result["command"],
    ]
    _print(stream, lines)


def show_trace(result: Mapping[str, Any], stream: TextIO) -> None:
    """What was traced, and the layers to edit."""
    console = _console(stream)
    facts, total = result["facts"], result["total_effect"]
    console.print(
        f"{plural(facts['traced'], 'fact')} traced, {facts['skipped']} skipped; the noise takes"
        f" {100 * total['mean']:.1f} points of {100 * result['clean']:.1f}% from the object"
    )
    proposal = result["proposal"]
    if proposal is None:
        console.print("no layers to propose: no MLP shows at the subject's last token")
    else:
        console.print(f"--layers {proposal['flag']}")
    console.print(f"all of it: {result['out']}")


def show_continuations(result: Mapping[str, Any], stream: TextIO) -> None:
    """Each prompt with its continuation, and a blank line between."""
    texts = [f"{each['prompt']}{each['continuation']}" for each in result["continuations"]]
    stream.write("\n\n".join(texts) + "\n")


def show_problems(result: Mapping[str, Any], stream: TextIO) -> None:
    """One line when all is as published, else a line per file that is not."""
    console = _console(stream)
    if result["ok"]:
        console.print(f"{result['version']}: all {result['files']} files are as published")
        return
    rows = [(p["file"], p["kind"], p["message"]) for p in result["problems"]]
    console.print(rows_table(None, ("file", "problem", ""), rows))


def show_checks(diagnosis: Any, stream: TextIO) -> None:
    """A line per check; the remedy where something is missing."""
    rows = [(c.name, c.state, c.remedy or c.detail) for c in diagnosis.checks]
    _console(stream).print(doctor_table(rows))


def show_history(result: Mapping[str, Any], stream: TextIO) -> None:
    """A line per version, the newest first."""
    if result["versions"]:
        _print(stream, [history_table(result)])
    if result["current"] is None:
        _print(stream, [f"{result['registry']}: nothing is CURRENT yet"])


def show_version(result: Mapping[str, Any], stream: TextIO) -> None:
    """What a version is, its metrics and its updates."""
    _print(stream, version_tables(result))


def show_diff(result: Mapping[str, Any], stream: TextIO) -> None:
    """What is new in one version against another."""
    _print(stream, diff_tables(result))


def show_rollback(result: Mapping[str, Any], stream: TextIO) -> None:
    """From where to where."""
    if result["moved"]:
        start = f"from {result['from']} " if result["from"] else ""
        _print(stream, [f"CURRENT: {start}to {result['to']}"])
    else:
        _print(stream, [f"CURRENT is at {result['to']} already"])


def show_pin(result: Mapping[str, Any], stream: TextIO) -> None:
    """What became of the pin."""
    state = "pinned" if result["pinned"] else "not pinned"
    if not result["pinned"] and result["changed"]:
        state = "not pinned any more"
    _print(stream, [f"{result['version']}: {state}"])


def show_gc(result: Mapping[str, Any], stream: TextIO) -> None:
    """What goes, what stays and why."""
    _print(stream, gc_tables(result))


def show_submitted(submitted: Any, stream: TextIO) -> None:
    """What became of a submission, and how to go on from there."""
    run = submitted.summary()
    _print(stream, [_submitted(run, waited=submitted.waited), run_table(run)])


def _submitted(run: Mapping[str, Any], *, waited: bool) -> str:
    name, address = run["run_id"], run["address"]
    if not run["submitted"] and run["state"] in ("STOPPED", "FAILED"):
        hint = "; to go on, submit it under another run id: what is finished is not done again"
    elif waited:
        hint = ""
    else:
        hint = f"; memedit logs {name} --follow --address {address}"
    return f"{name}: {'submitted' if run['submitted'] else 'was submitted before'}{hint}"


def show_status(result: Mapping[str, Any], stream: TextIO) -> None:
    """One run in full, or a line per run."""
    if "runs" not in result:
        _print(stream, [run_table(result)])
    elif result["runs"]:
        _print(stream, [runs_table(result["runs"])])
    else:
        _print(stream, [f"{result['address']}: no run of memedit yet"])


def show_log(log: Any, stream: TextIO) -> None:
    """The log as it is, as it comes."""
    log.write(stream)


def show_stopped(result: Mapping[str, Any], stream: TextIO) -> None:
    """What became of the run."""
    if result["stopped"]:
        told = "stopped; to go on, submit it under another run id"
    else:
        told = f"{result['state']}, so there was nothing to stop"
        if result["state"] in ("PENDING", "RUNNING"):
            told = "told to stop, but has not ended yet"
    _print(stream, [f"{result['run_id']}: {told}"])


def show_rendered(rendered: Any, stream: TextIO) -> None:
    """The text as it is, to be piped on; or where it lies."""
    rendered.write(stream)


def _print(stream: TextIO, parts: Iterable[Table | str]) -> None:
    console = _console(stream)
    for part in parts:
        # A sentence is never cut into lines, so that it can be searched for.
        console.print(part, markup=False, soft_wrap=isinstance(part, str))


def show_ingest(outcome: Any, stream: TextIO) -> None:
    """What a run of ingest has done."""
    _print(stream, ingest_tables(outcome))


def show_facts(result: Mapping[str, Any], stream: TextIO) -> None:
    """Facts of a registry."""
    _print(stream, facts_tables(result))


def show_changed_facts(result: Mapping[str, Any], stream: TextIO) -> None:
    """What a change by hand came to."""
    _print(stream, changed_tables(result))


def show_why(result: Mapping[str, Any], stream: TextIO) -> None:
    """Facts with their history."""
    _print(stream, why_tables(result))


def show_rejects(result: Mapping[str, Any], stream: TextIO) -> None:
    """Rows that no fact was made of."""
    _print(stream, rejects_tables(result))
