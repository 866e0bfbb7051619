"""Twenty nights of 50 facts each: from the base every night, or on top of the last.

The third way is one batch of all the facts, which should give what the first gives.

    python -m benchmarks.nights                              # about an hour
    python -m benchmarks.nights --nights 3 --each 4 --looked-at 3      # smaller

Each way has a registry of its own. The one batch takes the z vectors of the nights (they depend on
the base and the fact only), so it costs no second hour. After some of the nights the version is
loaded as anybody would load it and judged on the facts so far (at most `--judged` of them, evenly
spread; after the last night all), with the perplexity of held-out Wikipedia text and the norm of
the edited weights' change against the base.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.ingest_runs import Inbox, add_arguments, fact_rows, write_rows
from benchmarks.job import ROOT
from benchmarks.material import add_material_arguments
from benchmarks.record import append_row, save_json
from memedit.checkpoint import Checkpoint
from memedit.manifest import read_manifest
from workflows.models import resolve_model

_TEXT_TOKENS = 4096


def main() -> None:
    """Measure, and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_material_arguments(parser)
    add_arguments(parser)
    parser.add_argument("--nights", type=int, default=20)
    parser.add_argument("--each", type=int, default=50)
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--looked-at", default="1,5,10,20", help="after which nights")
    args = parser.parse_args()
    looked_at = {int(n) for n in args.looked_at.split(",")}
    rows = fact_rows(args.facts, args.nights * args.each)
    result: dict[str, Any] = {"looked": []}
    with tempfile.TemporaryDirectory(prefix="memedit-nights-") as folder:
        for mode in ("desired", "sequential"):
            inbox = inbox_of(args, Path(folder) / mode, mode)
            for night in range(1, args.nights + 1):
                inbox.deliver(f"{night:03d}", rows[(night - 1) * args.each : night * args.each])
                done = inbox.ingest()
                print(mode, night, done["status"], done["facts"], flush=True)
                if night in looked_at or night == args.nights:
                    some = rows[: night * args.each]
                    judged = some if night == args.nights else spread(some, args.judged)
                    look(result, args, inbox, mode, night, judged)
        batch = inbox_of(args, Path(folder) / "batch", "desired")
        shutil.copytree(Path(folder) / "desired/registry/artifacts", batch.registry / "artifacts")
        batch.deliver("all", rows)
        done = batch.ingest()
        same = shards(Path(folder) / "desired") == shards(batch.folder)
        result["batch"] = {"same_bytes": same, **done}
        if not same:
            look(result, args, batch, "one batch", args.nights, rows)
    save_json("nights", result)
    for found in result["looked"]:
        append_row("nights", cells(found, same=result["batch"]["same_bytes"]))


def inbox_of(args: argparse.Namespace, folder: Path, mode: str) -> Inbox:
    """An inbox and a registry of their own."""
    return Inbox(
        folder=folder, model=args.model, corpus=args.corpus, mode=mode, changes=args.changes
    )


def spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """At most so many of the rows, evenly spread."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def look(
    result: dict[str, Any],
    args: argparse.Namespace,
    inbox: Inbox,
    mode: str,
    night: int,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Judge the version in use, and measure how far its weights are from the base."""
    version = inbox.current()
    found = {
        "mode": mode,
        "night": night,
        "judged": len(rows),
        "metrics": judged(args, version, rows, inbox.folder),
        "delta": weight_change(args.model, version),
    }
    print(found, flush=True)
    result["looked"].append(found)


def judged(
    args: argparse.Namespace, version: Path, rows: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    """The metrics of `memedit evaluate`."""
    facts = folder / "judged.jsonl"
    write_rows(facts, rows)
    words = [sys.executable, "-m", "workflows.cli", "evaluate", "--model", str(version), "--json"]
    words += ["--facts", str(facts), "--text", str(args.corpus), "--on-bad-row", "skip"]
    words += ["--set", f"evaluation.heldout_tokens={_TEXT_TOKENS}"]
    words += ["--set", "evaluation.fluency_facts=0", "--set", "evaluation.drift_prompts=0"]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    metrics: dict[str, Any] = json.loads(done.stdout)["metrics"]
    return metrics


def weight_change(model: str, version: Path) -> dict[str, float]:
    """‖W − W₀‖ / ‖W₀‖ over the edited weights together, and the largest of one weight."""
    base = Checkpoint.open(resolve_model(model).files)
    edited = Checkpoint.open(version)
    change = whole = largest = 0.0
    for name in read_manifest(version).tensors:
        before = base.read(name).double()
        moved = float((edited.read(name).double() - before).square().sum())
        size = float(before.square().sum())
        change, whole = change + moved, whole + size
        largest = max(largest, (moved / size) ** 0.5)
    return {"together": (change / whole) ** 0.5, "largest": largest}


def shards(folder: Path) -> dict[str, bytes]:
    """The weights of the version in use, by file."""
    current = Inbox(folder=folder, model="", corpus=Path()).current()
    return {
        path.name: hashlib.sha256(path.read_bytes()).digest()
        for path in current.glob("*.safetensors")
    }


def cells(found: Mapping[str, Any], *, same: bool) -> dict[str, str]:
    """The row of a look in the table."""
    metrics = found["metrics"]

    def shown(name: str) -> str:
        value = metrics.get(name)
        return "n/a" if value is None else f"{value:.1f}"

    return {
        "mode": found["mode"],
        "night": str(found["night"]),
        "judged": str(found["judged"]),
        **{
            name.replace("_", " "): shown(name)
            for name in (
                "efficacy",
                "efficacy_exact",
                "paraphrase",
                "neighbourhood",
                "score",
                "generation",
                "perplexity",
            )
        },
        "‖ΔW‖/‖W‖": f"{found['delta']['together']:.3f}",
        "one batch has the same bytes": "yes" if same else "no",
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
