"""Whole commands on a tiny model, in this process, with what they said and what they left."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memedit.outcome import EditOutcome
from workflows.cli import run

# Both neighbours of these facts are of those that drift is measured on (`is_for_measuring`).
LOUVRE = {"prompt": "The Louvre stands in the city of", "target": "Paris"}
FACTS: tuple[dict[str, Any], ...] = (
    {
        "subject": "Eiffel Tower",
        "prompt": "{} is located in the city of",
        "target_new": "Rome",
        "target_true": "Paris",
        "paraphrases": ["Where is Eiffel Tower? It stands in"],
        "neighbourhood": [LOUVRE],
    },
    {
        "subject": "Danielle Darrieux",
        "prompt": "The mother tongue of {} is",
        "target_new": "English",
        "target_true": "French",
        "paraphrases": ["Danielle Darrieux, a native speaker of"],
        "neighbourhood": [{"prompt": "The mother tongue of Bill Gates is", "target": "English"}],
    },
    {"subject": "Toyota", "prompt": "{} produces cars in", "target_new": "Spain"},
)

COUNTING = ("moments.tokens=1024", "moments.window=32")
SETTINGS = (
    *COUNTING,
    *("targets.steps=6", "solve.lam=1"),
    *("evaluation.fluency_tokens=4", "evaluation.heldout_tokens=128"),
)
"""Enough to do every step of a job, and quickly."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The object on stdout of a run that went well."""
        assert self.code == 0, self.stderr
        value: dict[str, Any] = json.loads(self.stdout)
        return value

    @property
    def error(self) -> dict[str, Any]:
        """The error on stdout of a run with --json that did not."""
        assert self.code != 0, self.stdout
        value: dict[str, Any] = json.loads(self.stdout)["error"]
        return value


def memedit(*arguments: object) -> Ran:
    """Run a command line; nothing but the exit code, stdout and stderr comes back."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Ran(code=code, stdout=out.getvalue(), stderr=err.getvalue())


def setting(*assignments: str) -> list[str]:
    """`--set` before each of them."""
    return [part for each in assignments for part in ("--set", each)]


def quick(
    model: Path | str,
    cache: Path,
    *,
    layers: str = "1-2",
    settings: Sequence[str] = SETTINGS,
) -> list[str]:
    """The flags that every quick job over a model has."""
    flags = ["--model", str(model), "--cache", str(cache), "--layers", layers, "--json"]
    return [*flags, *setting(*settings)]


PLAIN = ("--method", "memit")
"""Without repair, so that what an edit does can be counted."""


def edit(model: Path | str, facts: Path, out: Path, cache: Path, *more: object) -> Ran:
    """Run a quick `memedit edit`, with the plain method unless `more` names another."""
    return memedit("edit", *quick(model, cache), *PLAIN, "--facts", facts, "--out", out, *more)


def stats(model: Path | str, out: Path, cache: Path, *more: object, layers: str = "1-2") -> Ran:
    """Run a quick `memedit stats`."""
    flags = quick(model, cache, layers=layers, settings=COUNTING)
    return memedit("stats", *flags, "--out", out, *more)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any] | str] = FACTS) -> Path:
    """Write JSON lines; a text is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def measured(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The metrics that the facts gave something to measure on."""
    return {name: value for name, value in metrics.items() if value is not None}


def without_plots(patch: pytest.MonkeyPatch) -> None:
    """Replace the report, which takes longer than all the rest of a quick run."""

    def write(outcome: EditOutcome, path: Path) -> None:
        path.write_text(f"<html>{outcome.run_id}</html>")

    patch.setattr("workflows.report.write_report", write)


def one_thread() -> dict[str, str]:
    """The environment for a process on a machine that does other things as well."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by its path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def shards(folder: Path) -> dict[str, bytes]:
    """The safetensors files of a checkpoint."""
    return {n: b for n, b in contents(folder).items() if n.endswith(".safetensors")}
