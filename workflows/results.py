"""What a person sees on stdout when a command is done; `--json` prints the same as one object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console

from memedit.outcome import EditOutcome
from workflows.findings import METRICS
from workflows.tables import (
    before_after_table,
    continuations_table,
    doctor_table,
    plan_table,
    rows_table,
)


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, soft_wrap=False)


def show_edit(outcome: EditOutcome, stream: TextIO) -> None:
    """Metrics before and after, some continuations, and where everything lies."""
    console = _console(stream)
    console.print(before_after_table(outcome))
    console.print(continuations_table(outcome))
    facts = outcome.facts
    heldout = outcome.settings.get("heldout")
    rows = [
        ("facts", f"{facts.accepted} of {facts.read} accepted"),
        ("perplexity of", "text sampled from the model" if heldout == "self" else heldout),
        ("rejects", facts.rejects),
        ("checkpoint", outcome.out),
        ("manifest", outcome.manifest),
        ("report", outcome.report),
    ]
    console.print(
        rows_table(None, ("", ""), [(name, value) for name, value in rows if value]),
    )


def show_plan(plan: Mapping[str, Any], stream: TextIO) -> None:
    """A line per item; a mapping inside becomes lines of its own."""
    _console(stream).print(plan_table(dict(_flat(plan)), title=None))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for name, value in values.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        lines += _flat(value, f"{label} ") if isinstance(value, Mapping) else [(label, value)]
    return lines


def show_metrics(result: Mapping[str, Any], stream: TextIO) -> None:
    """The metrics by name, with what each means."""
    metrics = result["metrics"]
    rows = [
        (metric.label, metric.show(metrics[metric.key]), metric.meaning)
        for metric in METRICS
        if metrics.get(metric.key) is not None
    ]
    console = _console(stream)
    console.print(rows_table(None, ("metric", "value", "meaning"), rows))
    facts = result["facts"]
    if facts["rejected"]:
        console.print(f"{facts['accepted']} of {facts['read']} rows judged; the others are wrong")


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
