"""The record of each run in a registry, and the watermark: what of each source is published.

    runs/<run_id>.json    who made the version, from which facts, and how it ended
    facts/WATERMARK       how far each source is in what CURRENT says; moves last

A record is claimed before the work and finished after it. The lock of the registry keeps two runs
from making the same version at once; the record tells the next one what a killed run was doing.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.current import now
from cluster.store import ABSENT, Guard, Store, join
from memedit.errors import InputError, LockError
from memedit.outcome import EditOutcome
from workflows.ingestion.head import Head
from workflows.ingestion.verdict import Verdict
from workflows.wording import without_keys

WATERMARK = "facts/WATERMARK"
_ATTEMPTS = 20
"""How many a record remembers."""


class Runs:
    """The records of a registry.

    Args:
        store: The registry's.
        guard: The lock under which records are written; nothing is, once it was lost.
    """

    def __init__(self, store: Store, guard: Guard | None = None) -> None:
        self.store, self._guard = store, guard

    def record(self, run_id: str) -> dict[str, Any] | None:
        """What is known of a run; None where there was none, as of an edit by hand."""
        return self._read(_name(run_id))[0]

    def sequence_of(self, run_id: str) -> int:
        """The change of the facts that a version says; 0 where it is not known."""
        record = self.record(run_id) or {}
        return int(record.get("sequence", 0))

    def watermark(self) -> dict[str, Any] | None:
        """How far each source is published."""
        return self._read(WATERMARK)[0]

    def claim(self, run_id: str, *, attempt: str, facts: Mapping[str, Any]) -> None:
        """Write down that a version is being made.

        Args:
            run_id: The version.
            attempt: The run that makes it.
            facts: What is known of its facts, with the `sequence` of their last change.

        Raises:
            LockError: Somebody else claims it at this moment.
        """
        found, token = self._read(_name(run_id))
        attempts = [*(found or {}).get("attempts", ()), attempt]
        self._write(
            _name(run_id),
            {
                "run_id": run_id,
                "status": "running",
                "attempts": attempts[-_ATTEMPTS:],
                "started_at": now(),
                "host": socket.gethostname(),
                "process": os.getpid(),
                **facts,
            },
            token,
        )

    def published(self, run_id: str, head: Head, outcome: EditOutcome, verdict: Verdict) -> None:
        """The version is there, and CURRENT."""
        self._end(
            run_id,
            status="published",
            metrics=outcome.summary()["metrics"],
            groups=verdict.groups,
            timings_s=outcome.timings_s,
        )
        self.finish(run_id, head)

    def finish(self, run_id: str, head: Head) -> None:
        """Move the watermark to what CURRENT says; also what a killed run has left to do.

        Args:
            run_id: CURRENT.
            head: The facts that it was found to say.
        """
        record = self.record(run_id)
        if record is not None and record.get("status") != "published":
            self._end(run_id, status="published")
        found, token = self._read(WATERMARK)
        value = {"run_id": run_id, "sequence": head.sequence, "read": _plain(head.read)}
        if found is None or {name: found.get(name) for name in value} != value:
            self._write(WATERMARK, value | {"published_at": now()}, token)

    def gated(self, run_id: str, verdict: Verdict) -> str | None:
        """A gate was not met; gives the place of the report."""
        report: str | None = None
        if verdict.outcome is not None:
            report = self._report(run_id, verdict.outcome)
        self._end(
            run_id,
            status="gated",
            missed=list(verdict.missed),
            hurt=[dict(h) for h in verdict.hurt],
            metrics=dict(verdict.metrics),
            groups=verdict.groups,
            report=report,
        )
        return report

    def failed(self, run_id: str, why: str) -> None:
        """The run ended with an error."""
        with suppress(LockError):  # the record is another run's by now
            self._end(run_id, status="failed", error=without_keys(why))

    def _report(self, run_id: str, outcome: EditOutcome) -> str:
        from workflows.report import write_report

        name = f"runs/{run_id}.html"
        with tempfile.TemporaryDirectory(prefix="memedit-report-") as folder:
            path = Path(folder) / "report.html"
            write_report(outcome, path)
            found = self.store.get(name)
            self.store.put(name, path.read_bytes(), expected=found[1] if found else ABSENT)
        return join(self.store.location, name)

    def _end(self, run_id: str, **values: Any) -> None:
        found, token = self._read(_name(run_id))
        self._write(
            _name(run_id), {**(found or {"run_id": run_id}), **values, "ended_at": now()}, token
        )

    def _read(self, name: str) -> tuple[dict[str, Any] | None, str]:
        found = self.store.get(name)
        if found is None:
            return None, ABSENT
        try:
            value = json.loads(found[0])
        except (ValueError, RecursionError) as error:
            source = join(self.store.location, name)
            raise InputError(f"not JSON: {error}; remove it", source=source) from error
        return (value if isinstance(value, dict) else {}), found[1]

    def _write(self, name: str, value: Mapping[str, Any], token: str) -> None:
        if self._guard is not None:
            self._guard.check()
        content = json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
        self.store.put(name, f"{content}\n".encode(), expected=token)


def _name(run_id: str) -> str:
    return f"runs/{run_id}.json"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
