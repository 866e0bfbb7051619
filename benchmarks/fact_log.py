"""A million facts into the fact log, the same again with some changed, and questions to it.

    python -m benchmarks.fact_log                     # about two minutes
    python -m benchmarks.fact_log --count 100000      # smaller

Facts are triples with made-up subjects and a template; some are delivered twice. Measured are whole
readings from Parquet files, each in a process of its own so that the peak of memory is its own: the
first (all new), a second of the whole table in which 1 % is corrected, 1 % gone and 1 % new, and
the difference between the two; then single questions, as `memedit facts` asks them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.job import ROOT
from benchmarks.record import append_row, save_json
from memedit.progress import Silent
from workflows.ingestion.fact_log import FactLog
from workflows.ingestion.register import register
from workflows.ingestion.settings import IngestJob

ASKED_S, ASKED_GB = 60.0, 2.0
_FILES = 4
_QUESTIONS = 20


def write_table(folder: Path, count: int, *, changed: bool) -> None:
    """The table in a few Parquet files; `changed` is how it looks the next night."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end = (count // 100, count + count // 100) if changed else (0, count)
    for part in range(_FILES):
        numbers = list(range(start + part, end, _FILES))
        numbers += numbers[:: 100 * _FILES]  # delivered twice
        corrected = {n for n in numbers if changed and n % 100 == 7}
        table = pa.table(
            {
                "statement": [f"Q{n}" for n in numbers],
                "subject": [f"The village of {_name(n)}" for n in numbers],
                "relation": [f"P{n % 20}" for n in numbers],
                "object": [_name(n * 7 + (n in corrected)) for n in numbers],
            }
        )
        pq.write_table(table, folder / f"part-{part}.parquet")


def _name(number: int) -> str:
    parts = ("ba", "lo", "mi", "ten", "gar", "sol", "vik", "ra", "du", "nes")
    return "".join(parts[int(digit)] for digit in str(number)).capitalize()


def job_of(folder: Path) -> IngestJob:
    """The job that reads the table."""
    columns = {"id": "statement", "target_new": "object"}
    return IngestJob(
        registry=str(folder / "registry"),
        cache=folder / "cache",
        source={
            "path": str(folder / "table"),
            "complete": True,
            "columns": columns,
            "templates": {f"P{n}": f"{{}} has the property {n} of" for n in range(20)},
        },
    )


def read_once(folder: Path) -> dict[str, Any]:
    """Register what is new; seconds, and the peak of this process and its helpers together."""
    peak = Peak()
    peak.start()
    began = time.perf_counter()
    log = FactLog(str(folder / "registry"), cache=folder / "cache")
    before = log.head()
    registered = register(job_of(folder), log, run="benchmark", progress=Silent())
    read_s = time.perf_counter() - began
    head = log.head()
    difference = log.difference(head, before.sequence)
    digest = log.digest(head)
    total_s = time.perf_counter() - began
    return {
        "rows": registered.read,
        "counts": dict(head.counts),
        "read_s": read_s,
        "total_s": total_s,
        "peak_gb": peak.stop() / 1e9,
        "added": len(difference.added),
        "superseded": len(difference.superseded),
        "retracted": len(difference.retracted),
        "digest": digest,
    }


class Peak(threading.Thread):
    """The largest memory of this process and its children together, looked at all the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._bytes, self._ended = 0, threading.Event()

    def run(self) -> None:
        """Look every 20 ms."""
        while not self._ended.wait(0.02):
            self._bytes = max(self._bytes, sum(map(_resident, [os.getpid(), *_children()])))

    def stop(self) -> int:
        """The peak so far."""
        self._ended.set()
        self.join()
        return self._bytes


def _children() -> list[int]:
    tasks = Path("/proc/self/task").iterdir()
    texts = [(task / "children").read_text() for task in tasks if (task / "children").exists()]
    return [int(number) for text in texts for number in text.split()]


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_its_own_process(folder: Path) -> dict[str, Any]:
    """As `read_once`, in a fresh process."""
    words = [sys.executable, "-m", "benchmarks.fact_log", "--read", str(folder)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def questions(folder: Path, count: int) -> dict[str, float]:
    """Median milliseconds of single questions."""
    log = FactLog(str(folder / "registry"), cache=folder / "cache")
    head = log.head()
    asked: Mapping[str, Callable[[int], object]] = {
        "one fact by its id": lambda n: log.select(
            head, "SELECT * FROM state WHERE id = $id", {"id": f"Q{n}"}
        ),
        "its history": lambda n: log.history(head, "id = $id", {"id": f"Q{n}"}),
        "the first hundred": lambda n: log.select(
            head,
            "SELECT id, state, subject FROM state WHERE state = 'active' ORDER BY id LIMIT 100",
        ),
        "counts by state": lambda n: log.head().counts,
    }
    found = {}
    for name, ask in asked.items():
        times = []
        for turn in range(_QUESTIONS):
            began = time.perf_counter()
            assert ask(count // 2 + turn * 101), name
            times.append(1000 * (time.perf_counter() - began))
        found[name] = median(times)
    return found


def main() -> None:
    """Measure, and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        print(json.dumps(read_once(args.read)))
        return
    with tempfile.TemporaryDirectory(prefix="memedit-log-") as made:
        folder = Path(made)
        write_table(folder / "table", args.count, changed=False)
        first = in_its_own_process(folder)
        write_table(folder / "table", args.count, changed=True)
        second = in_its_own_process(folder)
        asked = questions(folder, args.count)
        log_bytes = sum(p.stat().st_size for p in (folder / "registry").rglob("*.parquet"))
    result = {"first": first, "second": second, "questions_ms": asked, "bytes": log_bytes}
    print(json.dumps(result, indent=1))
    save_json("fact_log", result)
    peak = max(first["peak_gb"], second["peak_gb"])
    slowest = max(first["total_s"], second["total_s"])
    met = slowest <= ASKED_S and peak <= ASKED_GB
    append_row(
        "fact_log",
        {
            "facts": f"{args.count:,}",
            "first reading, s": f"{first['total_s']:.1f}",
            "second, s": f"{second['total_s']:.1f}",
            "peak, GB": f"{peak:.2f}",
            "one fact, ms": f"{asked['one fact by its id']:.0f}",
            "its history, ms": f"{asked['its history']:.0f}",
            "first hundred, ms": f"{asked['the first hundred']:.0f}",
            "asked": "met" if met else f"short ({ASKED_S:g} s, {ASKED_GB:g} GB)",
        },
    )


if __name__ == "__main__":
    main()
