"""The GPU benchmark in small on the CPU; the real model's part of it is tried by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu_20b import cells, solve_seconds, statistics, targets
from memedit.architecture import architecture_of
from memedit.model import LoadedModel
from memedit.prompts import encode_request
from memedit.requests import EditRequest
from tests.tiny import tiny_model, tiny_tokenizer

SAME: dict[str, Any] = {"device": "cpu", "rate": 1e12}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model = tiny_model("gpt_neox", dtype=torch.bfloat16, max_position_embeddings=512)
    arch = architecture_of(model.config)
    return LoadedModel(model=model, tokenizer=tiny_tokenizer(), known_arch=arch)


def test_a_row_tells_all_figures(loaded: LoadedModel) -> None:
    request = EditRequest(
        case_id="0", prompt="{} is in", subject="The Eiffel Tower", target_new="Rome"
    )
    facts = [encode_request(loaded.tokenizer, request, ("{}",))]
    counted = statistics(loaded, (1, 2), tokens=4096, **SAME)
    run = targets(loaded, 2, facts, budget=64, steps=3, **SAME)
    assert counted["tokens"] == 4096 and counted["tokens_per_s"] > 0
    assert run is not None and 0 < run["share_of_matrix_rate"] < 1
    solved = solve_seconds(64, 32, edits=8, device="cpu")
    row = cells(
        {
            "blocks": 4,
            "hidden": 32,
            "matrix_tflops_bfloat16": 1.0,
            "statistics": counted,
            "z": {"single": run, "best": None},
            "solve": solved,
            "smollm2": {"after": {"efficacy": 100.0, "score": None}},
        }
    )
    assert row["z, best batch"] == "no memory" and "facts/s" in row["z, one at a time"]
    assert row["solve"].startswith("I = 64, 8 edits") and row["SmolLM2, after"] == "efficacy 100.0"


def test_without_memory_there_is_no_figure(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("benchmarks.gpu_20b.optimise_targets", full)
    assert targets(loaded, 2, [], budget=64, steps=3, **SAME) is None
