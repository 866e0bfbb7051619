"""A search on two Ray workers against one process: the same trials, and z sought once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.executors import open_executor
from memedit import stages
from tests.integration.test_edit_on_ray import KINDS, MORE_FACTS
from tests.tiny import save_tiny
from tests.workflows.runs import FACTS, memedit, quick, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def measured(trial: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in trial["metrics"].items() if value is not None}


def test_the_same_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("workflows.session.open_executor", partial(open_executor, threads=1))
    monkeypatch.setattr(stages, "_BATCHES_PER_UNIT", 1)
    monkeypatch.setattr(stages, "FACTS_PER_KEY_UNIT", 2)
    monkeypatch.setattr(stages, "FACTS_PER_SCORE_UNIT", 2)
    base = save_tiny(tmp_path / "base")
    facts = write_rows(tmp_path / "facts.jsonl", [*FACTS, *MORE_FACTS])
    results: dict[str, dict[str, Any]] = {}
    for kind, words in KINDS.items():
        words = (*words, "--facts", facts, "--method", "memedit", "--trials", "3")
        words = (*words, "--objective", "efficacy_exact", "--search", "lam")
        common = quick(base, tmp_path / f"cache of {kind}")
        results[kind] = memedit("tune", *common, *words, "--out", tmp_path / kind).result
    here, there = results["inline"], results["ray"]
    assert len(there["trials"]) == 3
    pairs = list(zip(here["trials"], there["trials"], strict=True))
    pairs += [(here["heldout"][side], there["heldout"][side]) for side in ("start", "chosen")]
    for one, other in pairs:
        assert other["failed"] is None and other["settings"] == one["settings"]
        assert measured(other) == pytest.approx(measured(one), rel=1e-3, abs=1e-5)
        assert (other["z_found"], other["z_reused"]) == (one["z_found"], one["z_reused"])
    assert [trial["z_reused"] for trial in there["trials"]] == [0, 4, 4]
