"""The whole job as a user runs it: `memedit edit` in a process of its own, timed and weighed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.material import shown
from memedit.outcome import FactResult

ROOT = Path(__file__).resolve().parents[1]
_DECIMALS = {"fluency": 2, "perplexity": 2, "drift_kl": 3}


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What `edit --json` printed, the wall time, and the peak resident memory of the process."""

    report: dict[str, Any]
    wall_s: float
    peak_bytes: int


def edit_words(*, model: str, facts: Path, corpus: Path, out: Path) -> list[str]:
    """The command line of the main job; the model is the one that the usual cache has.

    It is the paper's method, whose stages are what is compared, unless words that follow say more.
    """
    from workflows.models import resolve_model

    folder = resolve_model(model).files.here
    words = [sys.executable, "-m", "workflows.cli", "edit", "--model", str(folder)]
    words += ["--method", "memit"]
    return [*words, "--facts", str(facts), "--corpus", str(corpus), "--out", str(out), "--json"]


def run_edit(
    *, model: str, facts: Path, corpus: Path, out: Path, cold: bool = True, more: Sequence[str] = ()
) -> JobResult:
    """Run the command line's main job.

    With `cold`, statistics and z vectors are cached in a fresh folder, so nothing is reused; the
    model is the one that the usual cache has.

    Raises:
        subprocess.CalledProcessError: The job failed; its messages went to stderr.
    """
    words = edit_words(model=model, facts=facts, corpus=corpus, out=out)
    with tempfile.TemporaryDirectory() as cache:
        words += ["--cache", cache] if cold else []
        words += more
        started = time.perf_counter()
        with tempfile.TemporaryFile("w+") as printed:
            process = subprocess.Popen(words, stdout=printed, cwd=ROOT)
            # wait4 gives the usage of this one process; getrusage(RUSAGE_CHILDREN) mixes all.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall_s = time.perf_counter() - started
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, words)
            printed.seek(0)
            report = json.load(printed)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return JobResult(report=report, wall_s=wall_s, peak_bytes=usage.ru_maxrss * unit)


def compare(
    *, model: str, facts: Path, corpus: Path, out: Path, more: Sequence[str]
) -> dict[str, Any]:
    """What `memedit compare` says; rows that cannot be edited are left out.

    Raises:
        subprocess.CalledProcessError: The job failed; its messages went to stderr.
    """
    from workflows.models import resolve_model

    folder = resolve_model(model).files.here
    words = [sys.executable, "-m", "workflows.cli", "compare", "--model", str(folder), "--json"]
    words += ["--facts", str(facts), "--on-bad-row", "skip", "--corpus", str(corpus)]
    words += ["--out", str(out), *more]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def metric_cells(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Metrics of one row of a comparison as cells of a table, two of them with 95% intervals."""
    if row["failed"]:
        return dict.fromkeys(names, "") | {names[0]: f"failed: {row['failed']}"}
    cells = shown({name: row["metrics"][name] for name in names}, _DECIMALS)
    for name in ("score", "efficacy_exact"):
        if interval := row["intervals"].get(name):
            cells[name] += f" ({interval[0]:.1f} to {interval[1]:.1f})"
    return cells


def judgements(compared: Path, method: str) -> list[FactResult]:
    """What the folder of a comparison has of one method's facts, in the order of the others."""
    names = FactResult.__annotations__
    rows = pq.read_table(compared / "judgements.parquet").to_pylist()
    return [
        FactResult(**{name: _value(row[name]) for name in names})
        for row in rows
        if row["method"] == method
    ]


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def checkpoint_bytes_float32(folder: Path) -> int:
    """Size of a checkpoint's parameters if all were float32, from the safetensors headers."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                count = 1
                for side in file.get_slice(name).get_shape():
                    count *= side
                total += 4 * count
    return total
