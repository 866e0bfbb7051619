"""Quality of the main job at several numbers of facts, through the command line.

    python -m benchmarks.quality                 # 10, 100 and 1,000 facts
    python -m benchmarks.quality --count 100 --set solve.lam=800

Each job is a process of its own with cold caches, the statistics included; its metrics are of the
checkpoint that it saved.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.job import run_edit
from benchmarks.material import SCORES, add_material_arguments, first_rows, shown
from benchmarks.record import append_row, save_json

MEASURES = (*SCORES, "perplexity", "drift_kl", "drift_top1")
DECIMALS = {"drift_kl": 3, "perplexity": 2}


def main() -> None:
    """Run the jobs; print and store a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_material_arguments(parser)
    parser.add_argument("--count", type=int, nargs="+", default=[10, 100, 1000], help="of facts")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="FIELD=VALUE")
    args = parser.parse_args()
    more = [word for change in args.changes for word in ("--set", change)]
    # One prompt of 400 is an attention sink, which memedit refuses.
    more += ["--on-bad-row", "skip"]
    for count in args.count:
        with tempfile.TemporaryDirectory() as folder, first_rows(args.facts, count) as facts:
            done = run_edit(
                model=args.model,
                facts=facts,
                corpus=args.corpus,
                out=Path(folder) / "out",
                more=more,
            )
        metrics = done.report["metrics"]
        save_json(
            f"quality-{count}",
            {
                "facts": count,
                "wall_s": done.wall_s,
                "peak_bytes": done.peak_bytes,
                "report": done.report,
            },
        )
        for when in ("before", "after"):
            cells = {"facts": str(count), "model": "unedited" if when == "before" else "edited"}
            cells |= shown({name: metrics[when].get(name) for name in MEASURES}, DECIMALS)
            cells["job, s"] = f"{done.wall_s:.0f}" if when == "after" else ""
            append_row("quality", cells)
            print("  ".join(f"{name} {value}" for name, value in cells.items()))


if __name__ == "__main__":
    main()
