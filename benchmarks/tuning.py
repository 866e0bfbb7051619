"""What `memedit tune` finds against the settings it begins with, on facts that it never saw.

    python -m benchmarks.tuning                                   # 60 facts, 12 trials
    python -m benchmarks.tuning --from-guess --trials 24          # as for a model nobody knows

Facts are drawn by seed; one half is searched with, the other judged with. The search begins with
the settings that memedit has for the model (for SmolLM2 found by hand, `sweep`); with
`--from-guess`, with those that it has for a model that it does not know, and those found by hand
are judged on the same half as well. Each draw begins with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.material import add_material_arguments
from benchmarks.record import append_row, save_json
from workflows.metrics import METRIC
from workflows.wording import setting_text

# Of `memedit.defaults`, for a model without a row; the layers are 5 to 9 in both.
GUESSED = ("solve.lam=15000", "targets.lr=0.5", "targets.steps=20")
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
    parser.add_argument("--from-guess", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="FIELD=VALUE")
    args = parser.parse_args()
    lines = args.facts.read_text(encoding="utf-8").splitlines()
    for seed in args.seeds:
        drawn = random.Random(seed).sample(lines, args.count)
        with tempfile.TemporaryDirectory(prefix="memedit-tuning-") as folder:
            began = time.perf_counter()
            result = tune(args, seed, drawn, Path(folder), GUESSED if args.from_guess else ())
            wall_s = time.perf_counter() - began
            if args.from_guess:  # a search of one trial tries nothing but what it begins with
                by_hand = tune(args, seed, drawn, Path(folder), (), trials=1)
                keep_row(args, seed, by_hand, "start", "by hand", {})
            keep(args, seed, result, wall_s)


def tune(
    args: argparse.Namespace,
    seed: int,
    lines: list[str],
    folder: Path,
    more: Sequence[str],
    *,
    trials: int | None = None,
) -> dict[str, Any]:
    """Run the command on the facts of one draw, in a process of its own."""
    facts = folder / "facts.jsonl"
    facts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--model", args.model, "--corpus", args.corpus, "--facts", facts]
    words += ["--out", folder / f"out-{trials}", "--cache", folder / "cache", "--seed", seed]
    words += [
        "--trials",
        trials or args.trials,
        "--objective",
        args.objective,
        "--on-bad-row",
        "skip",
    ]
    words += ["--method", args.method] if args.method else []
    words += [word for change in (*more, *args.changes) for word in ("--set", change)]
    command = [sys.executable, "-m", "workflows.cli", "tune", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def keep(args: argparse.Namespace, seed: int, result: dict[str, Any], wall_s: float) -> None:
    """Store a row for the first settings and one for the chosen, and all that the run said."""
    verdict, trials = result["verdict"], result["trials"]
    interval = verdict["interval"]
    sure = "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
    found, reused = (sum(trial[name] for trial in trials) for name in ("z_found", "z_reused"))
    searched = {
        "change": "" if verdict["change"] is None else f"{verdict['change']:+.1f}{sure}",
        "trials": str(len(trials)),
        "z found, reused": f"{found}, {reused}",
        "run, s": f"{wall_s:.0f}",
    }
    begins = "guessed" if args.from_guess else "by hand"
    keep_row(args, seed, result, "start", begins, {})
    keep_row(args, seed, result, "chosen", "found", searched)
    save_json(f"tuning-{result['method']}-{seed}", {"wall_s": wall_s, "result": result})


def keep_row(
    args: argparse.Namespace,
    seed: int,
    result: dict[str, Any],
    which: str,
    name: str,
    searched: Mapping[str, str],
) -> None:
    """Store and print what some settings came to on the held-out half."""
    metrics = result["heldout"][which]["metrics"] or {}
    cells = {
        "facts": f"{result['facts']['tuning']} + {result['facts']['heldout']}",
        "seed": str(seed),
        "method": result["method"],
        "settings": name,
        **{setting: setting_text(value) for setting, value in result[which].items()},
    }
    for key in dict.fromkeys((args.objective, *MEASURES)):
        cells[key] = METRIC[key].show(metrics.get(key))
    cells |= dict.fromkeys(("change", "trials", "z found, reused", "run, s"), "") | dict(searched)
    append_row("tuning", cells)
    print("  ".join(f"{key} {value}" for key, value in cells.items()), flush=True)


if __name__ == "__main__":
    main()
