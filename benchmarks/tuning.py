"""What `memedit tune` finds against the settings it begins with, on facts that it never saw.

    python -m benchmarks.tuning                                   # 60 facts, 12 trials
    python -m benchmarks.tuning --seeds 0 1 2 --set solve.lam=15000    # beginning elsewhere

Facts are drawn by seed; one half is searched with, the other judged with. The first settings are
those that memedit has for the model (for SmolLM2 found by hand, `sweep`), unless `--set` or
`--layers` says otherwise. Each draw begins with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.material import add_material_arguments
from benchmarks.record import append_row, save_json
from workflows.findings import METRIC, setting_text

MEASURES = ("efficacy_exact", "paraphrase", "neighbourhood", "drift_kl", "perplexity")


def main() -> None:
    """Search on each draw; print and store a row for the first settings and one for the chosen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_material_arguments(parser)
    parser.add_argument("--count", type=int, default=60, help="of facts, both halves together")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--method", help="as it is by default, unless given")
    parser.add_argument("--objective", default="score")
    parser.add_argument("--layers", help="where the search begins")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="FIELD=VALUE")
    args = parser.parse_args()
    lines = args.facts.read_text(encoding="utf-8").splitlines()
    for seed in args.seeds:
        drawn = random.Random(seed).sample(lines, args.count)
        with tempfile.TemporaryDirectory(prefix="memedit-tuning-") as folder:
            began = time.perf_counter()
            result = tune(args, seed, drawn, Path(folder))
            keep(args, seed, result, time.perf_counter() - began)


def tune(args: argparse.Namespace, seed: int, lines: list[str], folder: Path) -> dict[str, Any]:
    """Run the command on the facts of one draw, in a process of its own."""
    facts = folder / "facts.jsonl"
    facts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--model", args.model, "--corpus", args.corpus, "--facts", facts]
    words += ["--out", folder / "out", "--cache", folder / "cache", "--seed", seed]
    words += ["--trials", args.trials, "--objective", args.objective, "--on-bad-row", "skip"]
    words += ["--method", args.method] if args.method else []
    words += ["--layers", args.layers] if args.layers else []
    words += [word for change in args.changes for word in ("--set", change)]
    command = [sys.executable, "-m", "workflows.cli", "tune", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def keep(args: argparse.Namespace, seed: int, result: dict[str, Any], wall_s: float) -> None:
    """Store two rows, and all that the run said."""
    verdict, trials = result["verdict"], result["trials"]
    for which in ("start", "chosen"):
        metrics = result["heldout"][which]["metrics"] or {}
        last = which == "chosen"
        cells = {
            "facts": f"{result['facts']['tuning']} + {result['facts']['heldout']}",
            "seed": str(seed),
            "method": result["method"],
            "settings": which,
            **{name: setting_text(value) for name, value in result[which].items()},
        }
        for key in dict.fromkeys((args.objective, *MEASURES)):
            cells[key] = METRIC[key].show(metrics.get(key))
        interval = verdict["interval"]
        sure = "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
        cells["change"] = f"{verdict['change']:+.1f}{sure}" if last and verdict["change"] else ""
        cells["trials"] = str(len(trials)) if last else ""
        cells["z found, reused"] = (
            f"{sum(t['z_found'] for t in trials)}, {sum(t['z_reused'] for t in trials)}"
            if last
            else ""
        )
        cells["run, s"] = f"{wall_s:.0f}" if last else ""
        append_row("tuning", cells)
        print("  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
    save_json(f"tuning-{result['method']}-{seed}", {"wall_s": wall_s, "result": result})


if __name__ == "__main__":
    main()
