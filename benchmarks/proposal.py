"""The layers that causal tracing proposes, judged by an edit there beside one at the default's.

    python -m benchmarks.proposal                              # 2 samples of noise
    python -m benchmarks.proposal --samples 10                 # as `memedit trace` has it

`memedit trace` looks for facts that the model knows in the first half of the table; `memedit
compare` then writes facts of the second half with the layers of the model's settings and with the
proposed ones. Both are judged on the same facts, so the change has a paired interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.job import ROOT, compare, judgements, metric_cells
from benchmarks.material import SCORES, add_material_arguments, half_of
from benchmarks.record import append_row, save_json
from memedit.intervals import changes_of
from workflows.models import resolve_model

BESIDE = ("perplexity", "drift_kl")


def main() -> None:
    """Trace, edit at both places, print and store a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_material_arguments(parser)
    parser.add_argument("--limit", type=int, default=100, help="facts to trace at most")
    parser.add_argument("--samples", type=int, default=2, help="of noise")
    parser.add_argument("--count", type=int, default=100, help="facts to write")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--cache", type=Path, help="kept from run to run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memedit-proposal-") as folder:
        here = Path(folder)
        halves = {half: here / f"{half}.jsonl" for half in ("first", "second")}
        for half, path in halves.items():
            path.write_text("\n".join(half_of(args.facts, half)) + "\n", encoding="utf-8")
        traced = trace(args, halves["first"], here / "traced")
        proposal = traced["proposal"]
        del traced["skipped"]  # a line of the data set for each fact that the model does not know
        save_json("proposal-trace", {"traced": traced})
        if proposal is None:
            print("the facts that were traced propose no layers")
            return
        more = ["--methods", args.method, "--edits", str(args.count)]
        more += ["--cache", str(args.cache or here / "cache")]
        rows, judged = {}, {}
        for name, layers in (("default", ()), ("proposed", ("--layers", proposal["flag"]))):
            out = here / name
            found = compare(
                model=args.model,
                facts=halves["second"],
                corpus=args.corpus,
                out=out,
                more=[*more, *layers],
            )
            rows[name] = next(row for row in found["rows"] if row["method"] == args.method)
            judged[name] = judgements(out, args.method)
    changes = changes_of(judged["default"], judged["proposed"])
    for name, row in rows.items():
        cells = {"traced": str(traced["facts"]["traced"]), "noise": str(args.samples)}
        cells |= {"last layer, 95%": "-".join(map(str, proposal["last_interval"]))}
        cells |= {"facts": str(args.count), "method": args.method, "layers": name}
        cells["layers"] += f" ({row['layers'][0]}-{row['layers'][-1]})"
        cells |= metric_cells(row, (*SCORES, *BESIDE))
        low, high = changes["score"]
        cells["score, change"] = f"{low:+.1f} to {high:+.1f}" if name == "proposed" else ""
        append_row("proposal", cells)
        print("  ".join(f"{key} {value}" for key, value in cells.items()), flush=True)
    save_json("proposal", {"rows": rows, "changes": changes, "proposal": proposal})


def trace(args: argparse.Namespace, facts: Path, out: Path) -> dict[str, Any]:
    """What `memedit trace` says."""
    folder = resolve_model(args.model).files.here
    words = [sys.executable, "-m", "workflows.cli", "trace", "--model", str(folder), "--json"]
    words += ["--facts", str(facts), "--on-bad-row", "skip", "--out", str(out)]
    words += ["--limit", str(args.limit), "--set", f"trace.samples={args.samples}"]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
