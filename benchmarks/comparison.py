"""All methods by the number of edits: the paper's first experiment, by `memedit compare`.

    python -m benchmarks.comparison                              # 1, 10, 100 and 1,000 facts
    python -m benchmarks.comparison --edits 1,10,100 --methods memit,memedit

ROME edits one fact after another and FT-W tunes one layer, as in the paper.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.job import compare
from benchmarks.material import SCORES, add_material_arguments, shown
from benchmarks.record import append_row, save_json

BESIDE = ("fluency", "consistency", "perplexity", "drift_kl")
DECIMALS = {"fluency": 2, "perplexity": 2, "drift_kl": 3}
METHODS = "ft,rome,memit,emmet,alphaedit,memedit"


def main() -> None:
    """Run all methods on each number of facts; print and store a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_material_arguments(parser)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--edits", default="1,10,100,1000", help="numbers of facts")
    parser.add_argument("--cache", type=Path, help="kept from run to run")
    parser.add_argument("--page", type=Path, help="a copy of the page goes here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memedit-comparison-") as folder:
        more = ["--methods", args.methods, "--edits", args.edits]
        more += ["--cache", str(args.cache or Path(folder) / "cache")]
        out = Path(folder) / "compared"
        found = compare(model=args.model, facts=args.facts, corpus=args.corpus, out=out, more=more)
        if args.page:
            shutil.copy(out / "page.html", args.page)
    for row in found["rows"]:
        cells = {"facts": str(row["edits"]), "method": row["method"]}
        cells |= {"layers": ", ".join(map(str, row["layers"]))}
        cells |= {"λ": "" if row["lam"] is None else f"{row['lam']:g}"}
        names = (*SCORES, *BESIDE)
        if row["failed"]:
            cells |= dict.fromkeys(names, "") | {"score": row["failed"]}
        else:
            cells |= shown({name: row["metrics"][name] for name in names}, DECIMALS)
            if interval := row["intervals"].get("score"):
                cells["score"] += f" ({interval[0]:.1f} to {interval[1]:.1f})"
        cells |= {"largest update, %": f"{100 * row['moved']:.3g}", "s": f"{row['seconds']:.0f}"}
        append_row("comparison", cells)
        print("  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
    save_json("comparison", found)


if __name__ == "__main__":
    main()
