"""Relations together and apart: the paper's third experiment, by `memedit compare --pairs`.

    python -m benchmarks.mixing                                # 60 facts at once, memit and memedit
    python -m benchmarks.mixing --methods memit --count 20

The table names no relations, so they are told from CounterFact's templates; of those with the most
facts, two and two with different objects make four pairs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.job import compare
from benchmarks.material import add_material_arguments
from benchmarks.record import append_row, save_json
from benchmarks.relations import NAMES, with_relation

SHOWN = ("score", "efficacy", "paraphrase", "neighbourhood", "efficacy_exact")


def main() -> None:
    """Edit four pairs of relations, print and store a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_material_arguments(parser)
    parser.add_argument("--methods", default="memit,memedit")
    parser.add_argument("--count", type=int, default=60, help="facts of a relation")
    parser.add_argument("--cache", type=Path, help="kept from run to run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memedit-mixing-") as folder:
        facts = Path(folder) / "facts.jsonl"
        write_facts(args.facts, facts, args.count)
        more = ["--methods", args.methods, "--edits", "1", "--pairs", "4"]
        more += ["--cache", str(args.cache or Path(folder) / "cache")]
        out = Path(folder) / "compared"
        found = compare(model=args.model, facts=facts, corpus=args.corpus, out=out, more=more)
    save_json("mixing", found)
    for row in found["pairs"]:
        names = [f"{NAMES[relation]} ({relation})" for relation in row["relations"]]
        cells = {"relations": " + ".join(names), "facts at once": str(row["edits"])}
        cells |= {"method": row["method"], "λ": f"{row['lam']:g}"}
        cells |= pair_metrics(row)
        append_row("mixing", cells)
        print("  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)


def pair_metrics(row: Mapping[str, Any]) -> dict[str, str]:
    """Together, apart, and the paired interval of the difference; or why there is nothing."""
    if row["failed"]:
        return dict.fromkeys(SHOWN, "-") | {SHOWN[0]: row["failed"].splitlines()[0]}
    cells = {}
    for name in SHOWN:
        low, high = row["changes"][name]
        values = f"{row['together'][name]:.1f} / {row['apart'][name]:.1f}"
        cells[name] = f"{values} ({low:+.1f} to {high:+.1f})"
    return cells


def write_facts(table: Path, to: Path, count: int) -> None:
    """The first facts of each relation, with its id."""
    taken: Counter[str] = Counter()
    with to.open("w", encoding="utf-8") as lines:
        for line in table.read_text(encoding="utf-8").splitlines():
            row = with_relation(line)
            relation = row.get("relation_id")
            if relation is not None and taken[relation] < count:
                taken[relation] += 1
                lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
