"""Editing methods side by side on the same facts, with the same z vectors and statistics.

    python -m benchmarks.methods                                  # memit and memedit, 250 facts
    python -m benchmarks.methods --part first --set protect.weight=5    # to choose settings

Facts are drawn by seed from one half of the table: settings are chosen on the first, figures come
from the second. The first method of a draw begins with an empty cache; the others find its
statistics and z vectors there, so that what they take more is what they do more.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.job import run_edit
from benchmarks.material import SCORES, add_material_arguments, shown
from benchmarks.record import append_row, save_json

MEASURES = (*SCORES, "perplexity", "drift_kl", "drift_top1")
DECIMALS = {"drift_kl": 3, "perplexity": 2}


def main() -> None:
    """Run the methods on each draw; print and store a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_material_arguments(parser)
    parser.add_argument("--methods", default="memit,memedit")
    parser.add_argument("--count", type=int, default=250, help="of facts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--part", choices=("first", "second"), default="second", help="of the table"
    )
    parser.add_argument("--cache", type=Path, help="kept from run to run, to try settings")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="FIELD=VALUE")
    args = parser.parse_args()
    lines = args.facts.read_text(encoding="utf-8").splitlines()
    half = len(lines) // 2
    part = lines[:half] if args.part == "first" else lines[half:]
    for seed in args.seeds:
        drawn = random.Random(seed).sample(part, args.count)
        with tempfile.TemporaryDirectory(prefix="memedit-methods-") as folder:
            compare(args, seed, drawn, Path(folder))


def compare(args: argparse.Namespace, seed: int, lines: list[str], folder: Path) -> None:
    """Run each method on the facts of one draw."""
    facts = folder / "facts.jsonl"
    facts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--cache", str(args.cache or folder / "cache"), "--on-bad-row", "skip"]
    words += [word for change in args.changes for word in ("--set", change)]
    plain: dict[str, float] | None = None
    for method in args.methods.split(","):
        done = run_edit(
            model=args.model,
            facts=facts,
            corpus=args.corpus,
            out=folder / method,
            cold=False,
            more=[*words, "--method", method],
        )
        report, took = done.report, done.report["timings_s"]
        plain = plain or took
        if method == args.methods.split(",")[0]:
            keep(args, seed, "unedited", report, report["metrics"]["before"], {})
        extra = sum(took[stage] for stage in ("stats", "targets", "solve")) - plain["solve"]
        cells = {"repairs": repairs(report), "plain job, s": f"{plain['total']:.0f}"}
        if took is not plain:
            cells["more, s"] = f"{extra:.1f}"
            cells["more"] = f"{extra / plain['total']:.3f}"
        keep(args, seed, method, report, report["metrics"]["after"], cells)


def repairs(report: dict[str, Any]) -> str:
    """The rounds of repair: facts not said before and after each, in brackets if not kept."""
    told = [
        (f"{r['unsaid_before']}-{r['unsaid_after']}", r["kept"]) for r in report.get("repairs", ())
    ]
    return ", ".join(text if kept else f"({text})" for text, kept in told)


def keep(
    args: argparse.Namespace,
    seed: int,
    method: str,
    report: dict[str, Any],
    metrics: dict[str, float | None],
    more: dict[str, str],
) -> None:
    """Store a row, and all that the run said."""
    cells = {"facts": str(args.count), "half": args.part, "seed": str(seed), "method": method}
    cells |= shown({name: metrics.get(name) for name in MEASURES}, DECIMALS)
    cells |= {"repairs": "", "plain job, s": "", "more, s": "", "more": ""} | more
    cells["set"] = " ".join(args.changes)
    append_row("methods", cells)
    print("  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
    if method != "unedited":
        save_json(f"methods-{method}-{args.count}-{seed}", report)


if __name__ == "__main__":
    main()
