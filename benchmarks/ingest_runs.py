"""What the ingestion benchmarks share: a registry of its own, and runs of `memedit ingest` into it.

Runs are commands of their own, as a person starts them. Knows the job file; does not know what is
measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.job import ROOT
from benchmarks.material import first_rows

QUICK = {"drift_prompts": 0, "fluency_facts": 0, "heldout_tokens": 0}
"""Evaluating is no part of these figures."""


@dataclass(frozen=True, kw_only=True)
class Inbox:
    """A folder of facts and a registry; each file is a night's delivery."""

    folder: Path
    model: str
    corpus: Path
    mode: str = "desired"
    changes: Sequence[str] = ()

    @property
    def registry(self) -> Path:
        """Where versions lie."""
        return self.folder / "registry"

    def deliver(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put a file of facts into the inbox."""
        inbox = self.folder / "inbox"
        inbox.mkdir(parents=True, exist_ok=True)
        write_rows(inbox / f"{name}.jsonl", rows)

    def current(self) -> Path:
        """The version in use."""
        current: dict[str, str] = json.loads((self.registry / "CURRENT").read_text())
        return self.registry / current["path"]

    def ingest(self) -> dict[str, Any]:
        """Run `memedit ingest --json` to its end.

        Raises:
            CalledProcessError: It failed; its stderr was shown.
        """
        job = {
            "model": self.model,
            "registry": "registry",
            "source": {"kind": "files", "path": "inbox/*.jsonl"},
            "corpus": str(self.corpus.resolve()),
            "mode": self.mode,
            "judged_new": 0,
            "judged_all": 8,
            "evaluation": QUICK,
        }
        path = self.folder / "ingest.yaml"
        path.write_text(yaml.safe_dump(job))
        words = [sys.executable, "-m", "workflows.cli", "ingest", "--config", str(path), "--json"]
        words += [word for change in self.changes for word in ("--set", change)]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write facts as JSON lines."""
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def fact_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a JSON lines fact table."""
    with first_rows(path, count) as some:
        return [json.loads(line) for line in some.read_text(encoding="utf-8").splitlines()]


def busy_s(result: Mapping[str, Any]) -> float:
    """The seconds of a run without its evaluation."""
    timings = result["timings_s"]
    return float(timings["total"] - timings["evaluate"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every ingestion benchmark can be told."""
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="F=V")
