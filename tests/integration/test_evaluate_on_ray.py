"""`memedit evaluate` on two Ray workers against one process: the same judgements to the bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cluster.executors import open_executor
from memedit import side_effects, stages
from memedit.worker import Worker
from tests.integration.test_edit_on_ray import KINDS, MORE_FACTS
from tests.tiny import save_tiny
from tests.workflows.runs import FACTS, memedit, setting, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_same_judgements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("workflows.session.open_executor", partial(open_executor, threads=1))
    monkeypatch.setattr(stages, "FACTS_PER_SCORE_UNIT", 3)
    for name in ("_PROMPTS_PER_TEXTS", "_PROMPTS_PER_DRIFT", "_WINDOWS_PER_PART"):
        monkeypatch.setattr(side_effects, name, 1)
    base, model = save_tiny(tmp_path / "base"), save_tiny(tmp_path / "model", seed=1)
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. The capital of Italy is Rome. " * 20)
    facts = write_rows(tmp_path / "facts.jsonl", [*FACTS, *MORE_FACTS])
    results: dict[str, dict[str, Any]] = {}
    for kind, words in KINDS.items():
        if kind == "ray":  # all of it is done elsewhere
            monkeypatch.setattr(Worker, "__init__", _not_here)
        ran = memedit(
            *("evaluate", "--model", model, "--base", base, "--facts", facts, "--text", text),
            *("--out", tmp_path / kind, "--json", *words),
            *setting("evaluation.fluency_tokens=4", "evaluation.heldout_window=64"),
        )
        results[kind] = ran.result
    torch.set_num_threads(threads)
    inline, ray = results["inline"], results["ray"]
    for part in ("metrics", "intervals", "before", "changes", "relations", "per_fact"):
        assert inline[part] == ray[part], part
    assert inline["before"]["metrics"]["drift_kl"] == 0 and inline["changes"]
    assert inline["metrics"]["drift_kl"] > 0.01 and inline["metrics"]["perplexity"] > 1
    one, other = (pq.read_table(tmp_path / kind / "facts.parquet") for kind in KINDS)
    assert one.equals(other) and one.num_rows == 2 * len([*FACTS, *MORE_FACTS])


def _not_here(worker: Worker, *arguments: Any, **more: Any) -> None:
    raise AssertionError("the work was to be done in Ray's processes")
