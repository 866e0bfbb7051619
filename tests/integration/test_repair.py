"""Repair on the real model: facts that a cautious edit does not say are said after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.workflows.runs import memedit, setting, shards, without_plots

CAUTIOUS = setting(
    *("solve.lam=6000", "moments.tokens=4000", "protect.prompts=60", "repair.rounds=1")
)
QUIET = setting(
    *("evaluation.fluency_facts=0", "evaluation.heldout_tokens=0", "evaluation.drift_prompts=0")
)
FACTS = 6


def test_more_facts_are_said_and_a_second_run_finds_the_same(
    smollm2: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_plots(monkeypatch)
    rows = (shared_data / "counterfact-2000.jsonl").read_text().splitlines()[:FACTS]
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(rows) + "\n")

    def edit(name: str, *more: str) -> dict[str, Any]:
        out = tmp_path / name
        words = ["--model", smollm2, "--facts", facts, "--out", out, "--cache", tmp_path / "cache"]
        words += ["--corpus", shared_data / "wikipedia-sample.parquet", "--method", "memedit"]
        return memedit("edit", *words, "--json", *CAUTIOUS, *QUIET, *more).result

    alone = edit("alone", *setting("repair.rounds=0"))["metrics"]["after"]
    result = edit("repaired", *setting("repair.drift=10"))
    (only,) = result["repairs"]
    assert only["unsaid_before"] == round(FACTS * (1 - alone["efficacy_exact"] / 100)) > 0
    assert only["unsaid_after"] < only["unsaid_before"] and only["kept"]
    exact = result["metrics"]["after"]["efficacy_exact"]
    assert exact == pytest.approx(100 * (FACTS - only["unsaid_after"]) / FACTS)
    report = json.loads((tmp_path / "repaired" / "memedit.json").read_text())
    assert report["method"] == "memedit"

    again = edit("again", *setting("repair.drift=10"))
    assert again["repairs"] == result["repairs"]
    assert shards(tmp_path / "again") == shards(tmp_path / "repaired")
