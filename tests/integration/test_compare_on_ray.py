"""Every method on two Ray workers against one process: the same metrics, row by row."""

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
from tests.workflows.runs import FACTS, measured, memedit, quick, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize(("methods", "layers"), [("memit,memedit,emmet", "1-2"), ("rome,ft", "2")])
def test_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: str, layers: str
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("workflows.session.open_executor", partial(open_executor, threads=1))
    monkeypatch.setattr(stages, "_BATCHES_PER_UNIT", 1)
    monkeypatch.setattr(stages, "FACTS_PER_KEY_UNIT", 3)
    monkeypatch.setattr(stages, "FACTS_PER_SCORE_UNIT", 3)
    base = save_tiny(tmp_path / "base")
    facts = write_rows(tmp_path / "facts.jsonl", [*FACTS, *MORE_FACTS])
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind, words in KINDS.items():
        words = (*words, "--methods", methods, "--edits", "8", "--facts", facts)
        common = quick(base, tmp_path / f"cache of {kind}", layers=layers)
        ran = memedit("compare", *common, *words, "--out", tmp_path / kind)
        rows[kind] = ran.result["rows"]
    assert len(rows["ray"]) == 1 + len(methods.split(","))
    for here, there in zip(rows["inline"], rows["ray"], strict=True):
        assert here["failed"] is there["failed"] is None
        assert there["moved"] == pytest.approx(here["moved"], rel=1e-4)
        assert measured(there["metrics"]) == pytest.approx(measured(here["metrics"]), rel=1e-3)
        for one, other in zip(here["repairs"], there["repairs"], strict=True):
            assert other == pytest.approx(one, rel=1e-2)
