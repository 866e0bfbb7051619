"""What a kill costs: a job killed when half of its z vectors are kept, and run again.

    python -m benchmarks.resume                            # about 6 minutes
    python -m benchmarks.resume --facts-count 24 --rounds 1        # smaller

Each round runs `memedit edit --executor ray` as a person does, twice with caches of its own that
hold the statistics and nothing else: once undisturbed, once killed with SIGKILL (the command, and
with it its local Ray) as soon as half of the z vectors are kept, and run again. The order
alternates.

The figure is the z stage (`timings_s.targets`) of the second run over that of the undisturbed one:
from the first unit handed out to the last z vector stored; the work that was under way at the kill,
which is lost, is part of it. Start-up (imports, Ray, loading), statistics, solving, publishing and
evaluating are not: a resume does them again, or has them. The wall time of the whole command is
stored beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.job import ROOT, edit_words, run_edit
from benchmarks.material import add_material_arguments, first_rows
from benchmarks.record import append_row, save_json
from tests.cluster.processes import comes_true, processes_with

ASKED = 0.55
_PATIENCE_S = 1800.0
_QUICK = (
    "evaluation.drift_prompts=8",
    "evaluation.fluency_facts=1",
    "evaluation.fluency_tokens=4",
    "evaluation.heldout_tokens=256",
)
"""Evaluating is no part of the figure."""


class Job:
    """The command, with caches of the caller's."""

    def __init__(self, args: argparse.Namespace, facts: Path, scratch: Path) -> None:
        self.model, self.facts, self.corpus, self.scratch = args.model, facts, args.corpus, scratch
        self.more = ["--executor", "ray", "--workers", str(args.workers)]
        self.more += ["--on-bad-row", "skip"]
        self.more += [word for change in (*_QUICK, *args.changes) for word in ("--set", change)]
        self._outs = 0

    def _out(self) -> Path:
        self._outs += 1
        return self.scratch / f"out-{self._outs}"

    def whole(self, cache: Path) -> dict[str, Any]:
        """Run it to its end."""
        done = run_edit(
            model=self.model,
            facts=self.facts,
            corpus=self.corpus,
            out=self._out(),
            cold=False,
            more=[*self.more, "--cache", str(cache)],
        )
        timings = done.report["timings_s"]
        return {"wall_s": done.wall_s, "z_s": timings["targets"], "timings_s": timings}

    def killed(self, cache: Path, *, at: int) -> dict[str, Any]:
        """Run it until so many z vectors are kept, and kill it.

        Raises:
            RuntimeError: It ended before, or does not come so far.
        """
        words = edit_words(model=self.model, facts=self.facts, corpus=self.corpus, out=self._out())
        words += [*self.more, "--cache", str(cache)]
        mark = f"memedit-resume-{secrets.token_hex(8)}"
        variables = {**os.environ, "MEMEDIT_BENCHMARK": mark}
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=ROOT, env=variables)
        try:
            while kept_targets(cache) < at:
                if process.poll() is not None:
                    raise RuntimeError(f"it ended with {process.returncode} before it was killed")
                if time.perf_counter() - started > _PATIENCE_S:
                    raise RuntimeError(f"it kept no {at} z vectors in {_PATIENCE_S:g} s")
                time.sleep(0.02)
        finally:
            end(process, mark)
        return {"wall_s": time.perf_counter() - started, "kept": kept_targets(cache)}


def kept_targets(cache: Path) -> int:
    """How many z vectors are kept."""
    return sum(1 for _ in (cache / "targets").glob("*/*.safetensors"))


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill a process at once, and wait until whatever it has started is gone.

    Args:
        process: The process.
        mark: What the environment of all of them holds.
    """
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not comes_true(lambda: not processes_with(mark), within_s=30.0):
        for left in processes_with(mark):  # a local Ray follows its driver
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


def main() -> None:
    """Run the rounds; print, store and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_material_arguments(parser)
    parser.add_argument("--facts-count", type=int, default=100, metavar="N")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="FIELD=VALUE")
    parser.add_argument("--share", type=float, default=0.5, help="of the z vectors, at the kill")
    args = parser.parse_args()
    if args.threads:
        parser.error("--threads: the workers share the machine's cores, as on any local Ray")
    # As Ctrl+C: what was started is ended, what was made is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    rounds: list[dict[str, Any]] = []
    with (
        first_rows(args.facts, args.facts_count) as facts,
        tempfile.TemporaryDirectory(prefix="memedit-resume-") as made,
    ):
        scratch = Path(made)
        job = Job(args, facts, scratch)
        # The statistics, for all runs alike; it also tells how many facts are accepted.
        warm = scratch / "warm"
        first = job.whole(warm)
        accepted = kept_targets(warm)
        shutil.rmtree(warm / "targets")
        at = max(1, round(args.share * accepted))
        print(f"{accepted} facts; killed once {at} z vectors are kept")
        for number in range(args.rounds):
            found: dict[str, Any] = {}
            for side in ("whole", "killed")[:: -1 if number % 2 else 1]:
                cache = scratch / f"{side}-{number}"
                shutil.copytree(warm, cache)
                if side == "killed":
                    found["killed"] = job.killed(cache, at=at)
                    found["resumed"] = job.whole(cache)
                else:
                    found["whole"] = job.whole(cache)
                shutil.rmtree(cache)
            found["ratio"] = found["resumed"]["z_s"] / found["whole"]["z_s"]
            rounds.append(found)
            print(f"round {number + 1}: {json.dumps(short(found))}")
    result = {
        "facts": accepted,
        "workers": args.workers,
        "killed_at": at,
        "warm_up": first,
        "rounds": rounds,
        **summary(rounds, accepted),
    }
    show(result)
    save_json("resume", result)
    append_row("resume", cells(result))


def short(found: Mapping[str, Any]) -> dict[str, Any]:
    """A round in a line."""
    return {
        "kept at the kill": found["killed"]["kept"],
        "z, whole, s": round(found["whole"]["z_s"], 1),
        "z, resumed, s": round(found["resumed"]["z_s"], 1),
        "ratio": round(found["ratio"], 3),
    }


def summary(rounds: Sequence[Mapping[str, Any]], accepted: int) -> dict[str, Any]:
    """Medians, and whether they are what is asked for."""
    ratio = median(each["ratio"] for each in rounds)
    missing = median(1 - each["killed"]["kept"] / accepted for each in rounds)
    walls = [each["resumed"]["wall_s"] / each["whole"]["wall_s"] for each in rounds]
    return {
        "ratio": ratio,
        "missing_share": missing,
        "wall_ratio": median(walls),
        "asked": ASKED,
        "met": ratio <= ASKED,
    }


def show(result: Mapping[str, Any]) -> None:
    """Print a run for a person."""
    verdict = "met" if result["met"] else "NOT met"
    print(
        f"\nresume: {result['ratio']:.3f} of a whole z stage, with {result['missing_share']:.1%}"
        f" of the z vectors missing at the kill; asked at most {ASKED}: {verdict}"
    )
    print(f"the command's wall time: {result['wall_ratio']:.3f} of a whole one")


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of a run in the table of all runs."""
    rounds = result["rounds"]
    return {
        "facts": str(result["facts"]),
        "workers": str(result["workers"]),
        "rounds": str(len(rounds)),
        "missing at the kill": f"{result['missing_share']:.1%}",
        "z, whole, s": f"{median(each['whole']['z_s'] for each in rounds):.1f}",
        "z, resumed, s": f"{median(each['resumed']['z_s'] for each in rounds):.1f}",
        "resumed / whole": f"{result['ratio']:.3f}",
        "wall, resumed / whole": f"{result['wall_ratio']:.3f}",
        "asked": "met" if result["met"] else "not met",
    }


if __name__ == "__main__":
    main()
