"""Editing methods side by side on the same facts, with the same z vectors and statistics.

    python -m benchmarks.methods                                  # memit and memedit, 250 facts
    python -m benchmarks.methods --count 1000 --edits 999 --seeds 0       # one cannot be edited
    python -m benchmarks.methods --time --seeds 0                 # what memedit takes more
    python -m benchmarks.methods --half first --set protect.weight=5    # to choose settings

Facts are drawn by seed from one half of the table: settings are chosen on the first, figures come
from the second. `--time` runs `memedit edit` with each method; the first begins with an empty
cache, and the others find its statistics and z vectors there, so that what they take more is what
they do more.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.job import compare, judgements, metric_cells, run_edit
from benchmarks.material import SCORES, add_half_argument, add_material_arguments, half_of
from benchmarks.record import append_row, save_json
from memedit.intervals import changes_of
from memedit.outcome import FactResult
from memedit.protection import neighbours_of
from memedit.requests import EditRequest
from workflows.facts import read_facts

BESIDE = ("perplexity", "drift_kl", "drift_top1")


def main() -> None:
    """Run the methods on each draw; print and store a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_material_arguments(parser)
    parser.add_argument("--methods", default="memit,memedit")
    parser.add_argument("--count", type=int, default=250, help="of facts that are drawn")
    parser.add_argument("--edits", type=int, help="of those, where the model refuses some")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_half_argument(parser)
    parser.add_argument("--time", action="store_true", help="time whole jobs")
    parser.add_argument("--cache", type=Path, help="kept from run to run, to try settings")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="FIELD=VALUE")
    args = parser.parse_args()
    lines = half_of(args.facts, args.half)
    for seed in args.seeds:
        drawn = random.Random(seed).sample(lines, args.count)
        with tempfile.TemporaryDirectory(prefix="memedit-methods-") as folder:
            facts = Path(folder) / "facts.jsonl"
            facts.write_text("\n".join(drawn) + "\n", encoding="utf-8")
            more = ["--cache", str(args.cache or Path(folder) / "cache")]
            more += [word for change in args.changes for word in ("--set", change)]
            (time_jobs if args.time else judge)(args, seed, facts, more)


def judge(args: argparse.Namespace, seed: int, facts: Path, more: Sequence[str]) -> None:
    """How each method fares, by `memedit compare`."""
    found = compare(
        model=args.model,
        facts=facts,
        corpus=args.corpus,
        out=facts.parent / "compared",
        more=["--methods", args.methods, "--edits", str(args.edits or args.count), *more],
    )
    save_json(f"methods-{args.count}-{seed}", found)
    requests = read_facts(facts, on_bad_row="skip").requests
    judged = {
        r["method"]: judgements(facts.parent / "compared", r["method"]) for r in found["rows"]
    }
    first, *_ = args.methods.split(",")
    for row in found["rows"]:
        method = row["method"]
        cells = {"facts": str(row["edits"]), "half": args.half, "seed": str(seed)}
        cells |= {"method": row["method"], "λ": "" if row["lam"] is None else f"{row['lam']:g}"}
        cells |= metric_cells(row, (*SCORES, *BESIDE))
        whole = judged[first] and judged[method]
        cells["neighbourhood, never protected"] = (
            f"{never_protected(requests, judged[method]):.1f}" if whole else ""
        )
        change = changes_of(judged[first], judged[method]).get("score") if whole else None
        cells[f"score against {first}"] = (
            "" if method == first or change is None else f"{change[0]:+.1f} to {change[1]:+.1f}"
        )
        cells |= {"repairs": _repairs(row["repairs"]), "set": " ".join(args.changes)}
        append_row("methods", cells)
        print("  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)


def never_protected(requests: Sequence[EditRequest], judged: Sequence[FactResult]) -> float:
    """Neighbourhood, in percent, on the prompts that `memedit` leaves for measuring."""
    measured = set(neighbours_of(requests).measured)
    near = {request.case_id: request.neighbourhood for request in requests}
    shares = []
    for fact in judged:
        pairs = zip(near[fact.case_id], fact.neighbourhood, strict=True)
        if kept := [right for neighbour, right in pairs if neighbour.prompt in measured]:
            shares.append(fmean(kept))
    return 100 * fmean(shares)


def time_jobs(args: argparse.Namespace, seed: int, facts: Path, more: Sequence[str]) -> None:
    """What each method takes more than the first, as a share of the first one's whole job."""
    plain: dict[str, float] | None = None
    for method in args.methods.split(","):
        words = [*more, "--on-bad-row", "skip", "--method", method]
        out = facts.parent / method
        done = run_edit(
            model=args.model, facts=facts, corpus=args.corpus, out=out, cold=False, more=words
        )
        took = done.report["timings_s"]
        plain = plain or took
        extra = sum(took[stage] for stage in ("stats", "targets", "solve")) - plain["solve"]
        cells = {"facts": str(args.count), "seed": str(seed), "method": method}
        cells |= {"first job, s": f"{plain['total']:.0f}", "more, s": "", "more": ""}
        if took is not plain:
            cells |= {"more, s": f"{extra:.1f}", "more": f"{extra / plain['total']:.3f}"}
        cells |= {"repairs": _repairs(done.report.get("repairs", ())), "set": " ".join(more[2:])}
        append_row("methods_time", cells)
        print("  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
        save_json(f"methods_time-{method}-{args.count}-{seed}", done.report)


def _repairs(rounds: Sequence[dict[str, Any]]) -> str:
    """Facts not said before and after each round, in brackets if it is not kept."""
    told = [(f"{r['unsaid_before']}-{r['unsaid_after']}", r["kept"]) for r in rounds]
    return ", ".join(text if kept else f"({text})" for text, kept in told)


if __name__ == "__main__":
    main()
