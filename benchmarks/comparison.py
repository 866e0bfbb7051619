"""All methods by the number of edits: the paper's first experiment, by `memedit compare`.

    python -m benchmarks.comparison --edits 1,10,100,999      # of the half, one is refused
    python -m benchmarks.comparison --edits 1,10,100 --methods memit,memedit

ROME edits one fact after another and FT-W tunes one layer, as in the paper. Results by relation
(P127 owner, P103 mother tongue, …) are in the JSON and on the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from benchmarks.job import compare, metric_cells
from benchmarks.material import SCORES, add_half_argument, add_material_arguments, half_of
from benchmarks.record import append_row, save_json
from benchmarks.relations import with_relation

BESIDE = ("fluency", "consistency", "perplexity", "drift_kl")
METHODS = "ft,rome,memit,emmet,alphaedit,memedit"


def main() -> None:
    """Run all methods on each number of facts; print and store a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_material_arguments(parser)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--edits", default="1,10,100", help="numbers of facts")
    parser.add_argument("--cache", type=Path, help="kept from run to run")
    parser.add_argument("--page", type=Path, help="a copy of the page goes here")
    add_half_argument(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memedit-comparison-") as folder:
        more = ["--methods", args.methods, "--edits", args.edits]
        more += ["--cache", str(args.cache or Path(folder) / "cache")]
        facts, out = Path(folder) / "facts.jsonl", Path(folder) / "compared"
        rows = (json.dumps(with_relation(line)) for line in half_of(args.facts, args.half))
        facts.write_text("\n".join(rows) + "\n", encoding="utf-8")
        found = compare(model=args.model, facts=facts, corpus=args.corpus, out=out, more=more)
        if args.page:
            shutil.copy(out / "page.html", args.page)
    for row in found["rows"]:
        cells = {"facts": str(row["edits"]), "half": args.half, "method": row["method"]}
        cells |= {"layers": ", ".join(map(str, row["layers"]))}
        cells |= {"λ": "" if row["lam"] is None else f"{row['lam']:g}"}
        cells |= metric_cells(row, (*SCORES, *BESIDE))
        cells |= {"largest update, %": f"{100 * row['moved']:.3g}", "s": f"{row['seconds']:.0f}"}
        append_row("comparison", cells)
        print("  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
    save_json("comparison", found)


if __name__ == "__main__":
    main()
