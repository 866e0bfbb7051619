"""Tracing on two Ray workers against one process: the same effects, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cluster.executors import open_executor
from memedit import trace_stages
from tests.integration.test_edit_on_ray import KINDS, MORE_FACTS
from tests.tiny import save_tiny
from tests.workflows.runs import FACTS, memedit, setting, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_same_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("workflows.session.open_executor", partial(open_executor, threads=1))
    # Several units for each worker, though there is little to do.
    monkeypatch.setattr(trace_stages, "FACTS_PER_TRACE_UNIT", 2)
    monkeypatch.setattr(trace_stages, "PROMPTS_PER_UNIT", 3)
    base = save_tiny(tmp_path / "base")
    facts = write_rows(tmp_path / "facts.jsonl", [*FACTS, *MORE_FACTS])
    results: dict[str, dict[str, Any]] = {}
    for kind, words in KINDS.items():
        more = setting("trace.facts=all", "trace.samples=2")
        where = ("--cache", tmp_path / f"cache of {kind}", "--out", tmp_path / kind)
        ran = memedit("trace", "--model", base, "--facts", facts, *where, *words, *more, "--json")
        results[kind] = ran.result
    here, there = (pq.read_table(tmp_path / kind / "effects.parquet") for kind in KINDS)
    assert len(here) > 0 and there.equals(here)
    for part in ("curves", "proposal", "skipped", "settings", "total_effect"):
        assert results["ray"][part] == results["inline"][part]
