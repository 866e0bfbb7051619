"""What a night costs: 20 new facts on 500 active ones, against writing all of them from nothing.

    python -m benchmarks.incremental                          # about 12 minutes
    python -m benchmarks.incremental --active 50 --new 2 --rounds 1     # smaller

Each round has a registry of its own. The full run counts the statistics and finds the z vectors of
the active facts; then the new ones are delivered and ingested; then as often again as there are
rounds. The full run leaves the new facts out, so the true ratio is a little smaller.

The figure is the time of an incremental run over that of the full one, each from the start of the
work to the published version, without the evaluations, which a setting makes as long as one likes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ingest_runs import Inbox, add_arguments, busy_s, fact_rows
from benchmarks.material import add_material_arguments
from benchmarks.record import append_row, save_json

ASKED = 0.15


def main() -> None:
    """Measure, and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_material_arguments(parser)
    add_arguments(parser)
    parser.add_argument("--active", type=int, default=500)
    parser.add_argument("--new", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="incremental runs after the full one")
    args = parser.parse_args()
    rows = fact_rows(args.facts, args.active + args.new * args.rounds)
    with tempfile.TemporaryDirectory(prefix="memedit-incremental-") as folder:
        inbox = Inbox(
            folder=Path(folder), model=args.model, corpus=args.corpus, changes=args.changes
        )
        inbox.deliver("0", rows[: args.active])
        full = inbox.ingest()
        assert full["targets"]["computed"] > 0, full
        nights: list[dict[str, Any]] = []
        for night in range(args.rounds):
            start = args.active + night * args.new
            inbox.deliver(str(night + 1), rows[start : start + args.new])
            nights.append(inbox.ingest())
            assert nights[-1]["targets"]["reused"] >= args.active * 0.9, nights[-1]
    seconds = [busy_s(night) for night in nights]
    ratio = median(seconds) / busy_s(full)
    save_json("incremental", {"full": full, "nights": nights, "ratio": ratio})
    append_row(
        "incremental",
        {
            "active": args.active,
            "new": args.new,
            "full run, s": f"{busy_s(full):.1f}",
            "its z vectors, s": f"{full['timings_s']['targets']:.1f}",
            "incremental, s": " ".join(f"{s:.1f}" for s in seconds),
            "incremental / full": f"{ratio:.3f}",
            "asked": "met" if ratio <= ASKED else f"short ({ASKED})",
        },
    )


if __name__ == "__main__":
    main()
