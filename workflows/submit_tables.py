"""What a person sees of the runs on a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from workflows.progress import duration
from workflows.tables import rows_table


def runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """A line per run, the newest first."""
    rows = [
        (
            run["run_id"],
            run["command"] or "-",
            run["state"] + ("" if run["exit_code"] is None else f" ({run['exit_code']})"),
            _clock(run["started"])[5:16],
            _took(run),
        )
        for run in runs
    ]
    return rows_table(None, ("run", "command", "state (code)", "started, UTC", "took"), rows)


def run_table(run: Mapping[str, Any]) -> Table:
    """All that the cluster says of a run."""
    rows = [
        ("run", run["run_id"]),
        ("command", run["command"]),
        ("state", run["state"]),
        ("started", _clock(run["started"])),
        ("ended", _clock(run["ended"])),
        ("took", _took(run)),
        ("exit code", run["exit_code"]),
        ("message", run["message"]),
        ("dashboard", run.get("dashboard")),
    ]
    shown = [(name, str(value)) for name, value in rows if value not in (None, "", "-")]
    return rows_table(None, ("", ""), shown)


def _clock(time: str | None) -> str:
    return "-" if time is None else f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M:%SZ}"


def _took(run: Mapping[str, Any]) -> str:
    if run["started"] is None or run["ended"] is None:
        return "-"
    began, ended = map(datetime.fromisoformat, (run["started"], run["ended"]))
    return duration((ended - began).total_seconds())
