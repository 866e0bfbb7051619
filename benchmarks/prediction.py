"""What `memedit plan` foretells, and what `memedit edit` then takes: time, memory, bytes.

    python -m benchmarks.prediction                          # about 6 minutes
    python -m benchmarks.prediction --facts-count 12

Three jobs, each in processes of its own with a cold cache: in one process; on one Ray worker; on
two. Nothing is left out that the plan counts: no z vector stops early
(`targets.loss_threshold=0`). A ratio is the plan over what was measured, so one above 1 is a
promise that was kept. Time is that of the stages (`timings_s`), without start-up; memory is the
peak resident memory of the process, or of the largest worker and the driver; bytes are the sizes
of the shards that the plan says are rewritten.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.job import ROOT, run_edit
from benchmarks.material import add_material_arguments, first_rows
from benchmarks.record import append_row, save_json

_SETTINGS = ("targets.loss_threshold=0",)
_JOBS = {
    "inline": (),
    "one worker": ("--executor", "ray", "--workers", "1"),
    "two workers": ("--executor", "ray", "--workers", "2"),
}
_STAGES = {
    "stats": ("statistics",),
    "targets": ("targets",),
    "solve": ("keys", "solve"),
    "evaluate": ("evaluation",),
}
"""The stages of an edit, and the plan's that stand for them."""


def plan(args: argparse.Namespace, facts: Path, more: Sequence[str]) -> dict[str, Any]:
    """What `memedit plan` says."""
    from workflows.models import resolve_model

    folder = resolve_model(args.model).files.here
    words = [sys.executable, "-m", "workflows.cli", "plan", "--json", "--model", str(folder)]
    words += ["--method", "memit"]
    words += ["--facts", str(facts), "--corpus", str(args.corpus), *more]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Peaks:
    """The peak resident memory of the processes below this one, by what they are."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    words = (folder / "cmdline").read_bytes()
                    if words.startswith(b"ray::Actor"):
                        kind = "worker"
                    elif b"workflows.cli\0edit" in words:
                        kind = "driver"
                    else:
                        continue
                    status = (folder / "status").read_text()
                except OSError:  # it has ended
                    continue
                high = next(line for line in status.splitlines() if line.startswith("VmHWM"))
                self.bytes[kind] = max(self.bytes.get(kind, 0), int(high.split()[1]) * 1024)


def compared(planned: Mapping[str, Any], done: Any, peaks: Mapping[str, int]) -> dict[str, Any]:
    """Plan over measurement, by what is measured."""
    seconds = {name: stage["seconds"] for name, stage in planned["stages"].items()}
    if "schedule" in planned:
        told = planned["schedule"]
        seconds = {name: float(told[name].split(" s:")[0]) for name in seconds}
    timings = done.report["timings_s"]
    found: dict[str, Any] = {}
    for stage, names in _STAGES.items():
        expected = sum(seconds[name] for name in names)
        found[stage] = {"planned_s": expected, "took_s": timings[stage]}
    found["whole"] = {
        "planned_s": sum(seconds.values()),
        "took_s": sum(timings[name] for name in (*_STAGES, "load", "publish")),
    }
    memory = planned["memory"]
    if "process_mb" in memory:
        found["memory"] = {"planned_mb": memory["process_mb"], "peak_mb": done.peak_bytes / 1e6}
    else:
        for kind, name in (("worker", "each_worker_mb"), ("driver", "driver_mb")):
            peak_mb = peaks[kind] / 1e6
            found[f"memory of {kind}"] = {"planned_mb": memory[name], "peak_mb": peak_mb}
    for each in found.values():
        expected, measured = each.values()
        each["ratio"] = expected / measured
    return found


def main() -> None:
    """Plan and run each job; print, store and append a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_material_arguments(parser)
    parser.add_argument("--facts-count", type=int, default=50, metavar="N")
    parser.add_argument("--jobs", nargs="+", choices=_JOBS, default=list(_JOBS))
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    result: dict[str, Any] = {"facts": args.facts_count, "jobs": {}}
    with (
        first_rows(args.facts, args.facts_count) as facts,
        tempfile.TemporaryDirectory(prefix="memedit-prediction-") as made,
    ):
        for name in args.jobs:
            more = [*_JOBS[name], "--on-bad-row", "skip"]
            more += [word for change in _SETTINGS for word in ("--set", change)]
            planned = plan(args, facts, more)
            out = Path(made) / name.replace(" ", "-")
            with Peaks() as peaks:
                done = run_edit(
                    model=args.model, facts=facts, corpus=args.corpus, out=out, more=more
                )
            found = compared(planned, done, peaks.bytes)
            rewritten = sum(
                (out / shard).stat().st_size for shard in planned["shards"]["rewritten"]
            )
            found["bytes"] = {
                "planned": planned["shards"]["bytes_rewritten"],
                "written": rewritten,
                "ratio": planned["shards"]["bytes_rewritten"] / rewritten,
            }
            result["jobs"][name] = found
            print(f"{name}: {json.dumps({k: round(v['ratio'], 2) for k, v in found.items()})}")
            time.sleep(2)  # what a local Ray leaves behind is to be gone
    save_json("prediction", result)
    for name, found in result["jobs"].items():
        cells = {"facts": str(args.facts_count), "job": name}
        for part in (*_STAGES, "whole"):
            cells[f"{part}, s"] = f"{found[part]['planned_s']:.3g} / {found[part]['took_s']:.3g}"
        for part in ("memory", "memory of worker", "memory of driver"):
            values = found.get(part)
            cells[f"{part}, MB"] = (
                f"{values['planned_mb']:,.0f} / {values['peak_mb']:,.0f}" if values else ""
            )
        cells["bytes"] = f"{found['bytes']['ratio']:.4f}"
        append_row("prediction", cells)


if __name__ == "__main__":
    main()
